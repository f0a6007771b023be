"""Tables in terminals of any width: nothing of them is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.cli.narrow import paragraphs
from loratool.cli.output import Output, fitting
from tests.cli.invoke import invoke
from tests.cli.test_snapshots import Utf8, models

CELLS = st.text("ab.0…名", max_size=12)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[list[str]], int]:
    count = draw(st.integers(1, 6))
    row = st.lists(CELLS, min_size=count, max_size=count)
    return draw(row), draw(st.lists(row, min_size=1, max_size=3)), draw(st.integers(0, count))


def printed(width: int, columns: list[str], rows: list[list[str]], text: int) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        patch.setattr(sys, "stdout", stdout := Utf8())
        out = Output("inspect", as_json=False, quiet=False, verbose=False, debug=False)
        out.table("a title", columns, rows, text=text)
        return stdout.getvalue().splitlines()


@given(tables(), st.integers(24, 120))
def test_every_cell_is_there_whole(
    table: tuple[list[str], list[list[str]], int], width: int
) -> None:
    """Cells are shorter than the narrowest terminal here, so none has to be broken."""
    columns, rows, text = table
    lines = printed(width, columns, rows, text)
    for row in rows:
        for cell in row:
            assert any(cell in line for line in lines), cell


def test_a_long_name_is_broken_before_a_table_is_given_up() -> None:
    name = "model." * 12
    lines = printed(60, ["tensor", "rank"], [[name, "8"]], 1)
    assert "tensor" in lines[2]
    assert "".join(line.split()[0] for line in lines[4:-1]) == name


def test_a_name_longer_than_the_terminal_is_broken_in_a_paragraph() -> None:
    name = "layers." * 20
    columns = ["tensor", *(f"column {i}" for i in range(5))]
    lines = printed(40, columns, [[name, *"12345"]], 1)
    assert max(map(len, lines)) <= 40
    assert name in "".join(lines).replace(" ", "")
    assert all(f"column {i} {i + 1}" in "\n".join(lines) for i in range(5))


def test_a_paragraph() -> None:
    row = ["h.0", "rank 4", "1", "", "25 %"]
    assert list(paragraphs(22, ["module", "update", "n", "empty", "share"], [row], 2)) == [
        "  h.0   rank 4",
        "    n 1   share 25 %",
    ]
    assert list(paragraphs(19, ["module", "update", "n", "empty", "share"], [row], 2)) == [
        "  h.0   rank 4",
        "    n 1",
        "    share 25 %",
    ]


def test_columns_are_chosen_by_their_worth() -> None:
    lines = [{"module": "m" * 10, "rank": "16", "error": "0.25 %", "share": ""}]
    order, worth = ("module", "rank", "error", "share"), ("error", "rank", "share")

    def chosen(width: int) -> list[str]:
        return fitting(width, lines, order, ("module",), worth)

    assert chosen(80) == ["module", "rank", "error"]  # an empty column is no column
    assert chosen(24) == ["module", "error"]
    assert chosen(10) == ["module"]
    assert fitting(80, [], order, ("module",), worth) == ["module"]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_what_extract_did_fits_as_a_table(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models(tmp_path / "m")
    monkeypatch.chdir(tmp_path / "m")
    monkeypatch.setenv("COLUMNS", str(width))
    out = invoke("extract", "base", "tuned", "-o", "new", "--rank", "2").out
    (head,) = [line for line in out.splitlines() if line.startswith("  module ")]
    assert ("share of change" in head) == (width >= 80)
    assert ("energy kept" in head) == (width >= 100)
    assert len(head) <= width
    assert "  model.layers.*.self_attn.q_proj " in out
