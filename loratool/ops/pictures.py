"""Reports as files to look at: an HTML page, a PNG or an SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import UsageError
from loratool.ops.views.registry import Viewable, page_of
from loratool.report.drawing import png, require_drawing, svg
from loratool.report.figure import figure
from loratool.report.html import render_page
from loratool.report.page import Page
from loratool.storage.publishing import check_file, publish_file


@dataclass(frozen=True)
class _Kind:
    """beginnings: what its files begin with, by which --overwrite knows them."""

    beginnings: tuple[bytes, ...]
    render: Callable[[Page], bytes]


KINDS = {
    "html": _Kind((b"<!doctype html", b"<html"), lambda page: render_page(page).encode("utf-8")),
    "png": _Kind((b"\x89PNG\r\n\x1a\n",), lambda page: png(figure(page))),
    "svg": _Kind((b"<svg", b"<?xml"), lambda page: svg(figure(page))),
}


@dataclass(frozen=True)
class Picture:
    """A file that is to show a report. kind: html, png or svg."""

    kind: str
    path: Path
    overwrite: bool = False

    def check(self) -> None:
        """What can be refused before the report is made. Raises MissingExtra, OutputExists,
        OutputError."""
        require_drawing()
        check_file(self.path, KINDS[self.kind].beginnings, overwrite=self.overwrite)


def check_pictures(pictures: Sequence[Picture]) -> None:
    """All at once. Raises what ``Picture.check`` does, and UsageError for one place named twice."""
    places = [picture.path.resolve() for picture in pictures]
    for picture in pictures:
        if places.count(picture.path.resolve()) > 1:
            raise UsageError(f"{picture.path}: is named for two outputs")
        picture.check()


def write_pictures(pictures: Sequence[Picture], report: Viewable) -> list[int]:
    """Draw all, then write all; how many bytes each has.

    Raises what ``check_pictures`` does, and UsageError for a report that has no picture.
    """
    check_pictures(pictures)
    page = page_of(report)
    contents = [KINDS[picture.kind].render(page) for picture in pictures]
    for picture, content in zip(pictures, contents, strict=True):
        publish_file(picture.path, content, overwrite=picture.overwrite)
    return [len(content) for content in contents]


def picture_at(path: Path, *, overwrite: bool) -> Picture:
    """A PNG or SVG by its file's suffix. Raises UsageError."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise UsageError(f"{path}: is no name of a picture", hint="name it .png or .svg")
    return Picture(kind, path, overwrite)
