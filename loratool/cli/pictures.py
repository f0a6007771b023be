"""Options and output of commands whose report can be looked at: --html, --png, --svg."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli.options import PATH, Command
from loratool.cli.output import Output
from loratool.errors import UsageError
from loratool.report.text import size_text

if TYPE_CHECKING:
    from loratool.ops.pictures import Picture
    from loratool.ops.views.registry import Viewable

_ABOUT = {
    "html": "Also write a page to look at: one file, which opens without a network.",
    "png": "Also write the map and the spectra as a picture.",
    "svg": "The same as SVG.",
}


class Pictures:
    """The files asked for. overwrite: whether what exists may be replaced."""

    def __init__(self, pictures: list[Picture], *, overwrite: bool):
        self._pictures = pictures
        self.overwrite = overwrite
        self._written: list[str] = []

    @property
    def asked(self) -> bool:
        """Whether there are any."""
        return bool(self._pictures)

    def check(self) -> None:
        """Before the work. Raises MissingExtra, UsageError, OutputExists, OutputError."""
        if self._pictures:
            from loratool.ops.pictures import check_pictures

            check_pictures(self._pictures)

    def refuse(self, what: str) -> None:
        """Raises UsageError where pictures were asked for of what has none."""
        if self._pictures:
            raise UsageError(f"--html, --png and --svg: there is no picture of {what}")

    def write(self, report: Viewable) -> None:
        """After it, and before anything is printed, so that an error is the only document."""
        if not self._pictures:
            return
        from loratool.ops.pictures import write_pictures

        sizes = write_pictures(self._pictures, report)
        for picture, nbytes in zip(self._pictures, sizes, strict=True):
            self._written.append(f"wrote {picture.path} ({size_text(nbytes)})")

    def show(self, out: Output) -> None:
        """What was written."""
        for line in self._written:
            out.line(line)


def picture_options(function: Command) -> Command:
    """Give a command --html, --png, --svg and --overwrite as one argument ``pictures``."""

    @functools.wraps(function)
    def run(*arguments: Any, overwrite: bool, **options: Any) -> None:
        asked: dict[str, Path | None] = {kind: options.pop(kind) for kind in _ABOUT}
        pictures: list[Picture] = []
        if any(asked.values()):
            from loratool.ops.pictures import Picture

            pictures = [
                Picture(kind, path, overwrite) for kind, path in asked.items() if path is not None
            ]
        function(*arguments, pictures=Pictures(pictures, overwrite=overwrite), **options)

    decorated: Command = run
    decorated = click.option(
        "--overwrite", is_flag=True, help="Replace an existing file or output."
    )(decorated)
    for kind in reversed(_ABOUT):
        decorated = click.option(f"--{kind}", type=PATH, metavar="FILE", help=_ABOUT[kind])(
            decorated
        )
    return decorated
