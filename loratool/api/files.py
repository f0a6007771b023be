"""Functions that open files, and that write a report to look at."""

from __future__ import annotations

from pathlib import Path

from loratool.adapter import Adapter
from loratool.api.arguments import PathArg
from loratool.ops import pictures as _pictures
from loratool.ops.sources import open_adapter as _open_adapter
from loratool.ops.views.registry import Viewable
from loratool.storage.checkpoint import Checkpoint
from loratool.storage.checkpoint import open_checkpoint as _open_checkpoint


def open_adapter(path: PathArg, *, alpha: float | None = None) -> Adapter:
    """An adapter's updates by parameter name; tensors are read when asked for.

    ``alpha``: for formats that do not store it. Raises a LoratoolError subclass.
    """
    return _open_adapter(Path(path), alpha)


def open_checkpoint(path: PathArg) -> Checkpoint:
    """A checkpoint's tensors by name; each is read when asked for.

    Raises a LoratoolError subclass.
    """
    return _open_checkpoint(Path(path))


def write_html(report: Viewable, path: PathArg, *, overwrite: bool = False) -> None:
    """Write a report of ``inspect``, ``intruders`` or ``compare`` as one HTML file.

    It needs no other file and no network. Takes the extra ``report``. Raises a LoratoolError
    subclass; nothing is written then.
    """
    _pictures.write_pictures([_pictures.Picture("html", Path(path), overwrite)], report)


def write_picture(report: Viewable, path: PathArg, *, overwrite: bool = False) -> None:
    """Write such a report's map and spectra as a PNG or SVG, by the suffix of ``path``.

    Takes the extra ``report``. Raises a LoratoolError subclass; nothing is written then.
    """
    _pictures.write_pictures([_pictures.picture_at(Path(path), overwrite=overwrite)], report)
