"""Folders are gone through once each, whatever is in the way."""

from __future__ import annotations

from pathlib import Path

from loratool.storage.walking import walk


def test_what_cannot_be_listed_is_said(tmp_path: Path) -> None:
    (listing,) = walk(tmp_path / "gone")
    assert listing.files == ()
    assert listing.problem == "No such file or directory"


def test_a_folder_is_named_by_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "a link").symlink_to(tmp_path / "deep" / "real")
    (tmp_path / "deep" / "real").mkdir(parents=True)
    (tmp_path / "deep" / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "deep" / "real" / "file").touch()
    listings = {listing.folder: listing.files for listing in walk(tmp_path)}
    assert listings == {
        tmp_path: (),
        tmp_path / "deep": (),
        tmp_path / "deep" / "real": ("file",),
    }
