"""--html, --png, --svg: what is written, what is refused, and what stays as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loratool as lt
from tests.cli.invoke import invoke
from tests.ops.builders import LLAMA, llama_like, moved, save_folder, save_peft
from tests.report.reading import read, table_of


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    state = llama_like(torch.bfloat16, layers=2)
    base = save_folder(state, tmp_path / "base", LLAMA)
    return [base, save_folder(moved(state, size=0.05), tmp_path / "tuned", LLAMA)]


def adapter(folder: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        f"model.layers.{layer}.self_attn.q_proj": (
            torch.randn(2, 24, generator=generator),
            torch.randn(24, 2, generator=generator),
        )
        for layer in range(2)
    }
    return save_peft(folder, factors)


def test_all_three_beside_the_one_document(pair: list[Path], tmp_path: Path) -> None:
    files = [tmp_path / f"out.{kind}" for kind in ("html", "png", "svg")]
    options = [part for file in files for part in (f"--{file.suffix[1:]}", file)]
    plain = invoke("inspect", *pair, "--json")
    ended = invoke("inspect", *pair, "--json", *options)
    assert ended.code == 0
    assert ended.out == plain.out
    names = [row["name"] for row in json.loads(ended.out)["changed"]]
    page = read(files[0].read_text(encoding="utf-8"))
    assert [cells[0] for cells in table_of(page)] == names
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert files[2].read_text(encoding="utf-8").startswith("<svg")
    assert sorted(tmp_path.iterdir()) == sorted([*files, *pair])
    said = invoke("inspect", *pair, *options, "--overwrite").out
    assert f"wrote {files[0]} (" in said


def test_every_kind_of_look_has_a_page(pair: list[Path], tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", 1)
    file = tmp_path / "page.html"
    titles = []
    for arguments in (
        ["inspect", *pair],
        ["inspect", pair[1], "--base", pair[0]],
        ["inspect", *pair, "--level", "headers"],
        ["inspect", pair[0]],
        ["inspect", pair[0], "--level", "values"],
        ["inspect", one],
        ["inspect", one, "--base", pair[0]],
        ["inspect", one, "--base", pair[0], "--level", "values"],
        ["inspect", *pair, "--intruders"],
        ["inspect", one, two],
        ["compare", one, two],
    ):
        ended = invoke(*arguments, "--html", file, "--overwrite", "-q")
        assert (ended.code, ended.out, ended.err) == (0, "", ""), arguments
        page = read(file.read_text(encoding="utf-8"))
        titles.append(page.all("h1")[0].text)
    assert titles == [
        *["base → tuned"] * 3,
        *["base"] * 2,
        *(
            "one",
            "one in base",
            "one merged into base",
            "tuned beside base",
            "2 adapters",
            "one · two",
        ),
    ]


def test_what_is_there_stays(pair: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("<!DOCTYPE html><p>mine")
    refused = invoke("inspect", *pair, "--html", file)
    assert refused.code == 5
    assert "exists already" in refused.err
    assert file.read_text() == "<!DOCTYPE html><p>mine"
    assert invoke("inspect", *pair, "--html", file, "--overwrite").code == 0
    picture = tmp_path / "diary.png"
    picture.write_text("not a picture")
    refused = invoke("inspect", *pair, "--png", picture, "--overwrite")
    assert refused.code == 5
    assert "another kind" in refused.err
    assert picture.read_text() == "not a picture"
    assert invoke("inspect", *pair, "--html", pair[0], "--overwrite").code == 5
    assert invoke("inspect", *pair, "--html", file / "below" / "it.html").code == 5


def test_all_or_nothing(pair: list[Path], tmp_path: Path) -> None:
    """A picture that cannot be made keeps the page from being written, and is the one document."""
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    arguments = ("inspect", *pair, "--level", "headers", "--html", page, "--png", picture)
    ended = invoke(*arguments, "--json")
    assert ended.code == 2
    assert "nothing to draw" in json.loads(ended.out)["error"]["message"]
    assert not page.exists()
    assert not picture.exists()
    arguments = ("inspect", pair[0], "--level", "values", "--sort", "energy", "--html", page)
    assert invoke(*arguments).code == 2
    assert not page.exists()
    plan = ("--mitigate", "0.5", "-o", tmp_path / "milder", "--dry-run", "--html", page)
    assert "no picture of a plan" in invoke("inspect", *pair, *plan).err
    twice = invoke("inspect", *pair, "--png", picture, "--svg", tmp_path / "." / "picture.png")
    assert twice.code == 2
    assert "two outputs" in twice.err


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_what_is_in_the_way_is_said_before_the_work(command: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("mine")
    ended = invoke(command, tmp_path / "not there", tmp_path / "nor there", "--html", file)
    assert (ended.code, ended.err.splitlines()[0]) == (5, f"error: {file}: exists already")


def test_the_api_writes_the_same(pair: list[Path], tmp_path: Path) -> None:
    report = lt.inspect(*pair)
    lt.write_html(report, tmp_path / "api.html")
    invoke("inspect", *pair, "--html", tmp_path / "cli.html")
    assert (tmp_path / "api.html").read_bytes() == (tmp_path / "cli.html").read_bytes()
    lt.write_picture(report, tmp_path / "api.svg")
    invoke("inspect", *pair, "--svg", tmp_path / "cli.svg")
    assert (tmp_path / "api.svg").read_bytes() == (tmp_path / "cli.svg").read_bytes()
    with pytest.raises(lt.LoratoolError, match="no name of a picture"):
        lt.write_picture(report, tmp_path / "picture.pdf")
    with pytest.raises(lt.LoratoolError, match="exists already"):
        lt.write_html(report, tmp_path / "api.html")


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    """Before anything is read, in a process that really cannot import it."""
    code = (
        "import sys; sys.modules['vl_convert'] = None; "
        "from loratool.cli.main import main; main(sys.argv[1:])"
    )
    file = tmp_path / "page.html"
    for options in (["--html", file], ["--png", file], ["--svg", file]):
        ended = subprocess.run(
            [sys.executable, "-c", code, "inspect", tmp_path / "not there", *options],
            capture_output=True,
            text=True,
            env=os.environ,
            check=False,
        )
        assert ended.returncode == 2
        assert ended.stderr.splitlines() == [
            "error: pages and pictures need vl-convert, which is not installed",
            "  pip install 'vl-convert-python>=1.7', or loratool with its extra: report",
        ]
        assert ended.stdout == ""
    assert not file.exists()
