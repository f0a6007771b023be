"""Tables that are too wide for the terminal: a paragraph for each row, nothing left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_BETWEEN_COLUMNS = 3
NAME = 32
"""Characters to which names are not broken."""
_BETWEEN = "   "


def fits(width: int, columns: Sequence[str], rows: Sequence[Sequence[str]], text: int) -> bool:
    """Whether a table of these columns fits ``width`` characters; in the first ``text`` of them,
    long names may be broken over several lines.
    """
    needed = 1
    for index, column in enumerate(columns):
        header, *cells = (_width(cell) for cell in (column, *(row[index] for row in rows)))
        longest = max(header, *cells, 0)
        needed += _BETWEEN_COLUMNS
        needed += min(longest, max(NAME, header)) if index < text else longest
    return needed <= width


def paragraphs(
    width: int, columns: Sequence[str], rows: Sequence[Sequence[str]], text: int
) -> Iterator[str]:
    """Lines that say what the table would: the names of a row, then ``column value`` for each of
    its other cells. A line is longer than ``width`` only if a single cell is.
    """
    for row in rows:
        names = [cell for cell in row[:text] if cell]
        others = zip(columns[text:], row[text:], strict=True)
        yield from _packed(width, "  ", names)
        yield from _packed(width, "    ", [f"{column} {cell}" for column, cell in others if cell])


def _packed(width: int, indent: str, pieces: Sequence[str]) -> Iterator[str]:
    line = ""
    for piece in pieces:
        longer = line + _BETWEEN + piece if line else indent + piece
        if line and _width(longer) > width:
            yield line
            longer = indent + piece
        line = longer
    if line:
        yield line


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)
