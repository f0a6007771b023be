"""loratool compare, as it is typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.builders import lora_factors, write_peft
from tests.cli.invoke import invoke
from tests.cli.test_json import the_document

MODULES = ("h.0.attn.c_attn", "h.1.attn.c_attn", "h.0.mlp.c_fc")


def adapters(folder: Path, count: int = 2) -> list[Path]:
    paths = []
    for index in range(count):
        tensors = {}
        for module in MODULES[: 3 - (index == 1)]:
            tensors |= lora_factors(module, 24, 8, 2, seed=10 * index)
        paths.append(write_peft(folder / f"adapter-{index}", tensors, fan_in_fan_out=True))
    return paths


def test_two_adapters(tmp_path: Path) -> None:
    ended = invoke("compare", *adapters(tmp_path))
    assert (ended.code, ended.err) == (0, "")
    for text in ("adapter-0", "h.*.attn.c_attn", "φ(i, j) left", "only in A: 1 module:", "A in B"):
        assert text in ended.out


def test_updates_of_zero_have_no_figure_but_of_a(tmp_path: Path) -> None:
    """As adapters are before training."""
    paths = []
    for index in range(2):
        tensors = lora_factors(MODULES[0], 24, 8, 2, seed=index)
        untrained = {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()}
        paths.append(write_peft(tmp_path / f"{index}", untrained, fan_in_fan_out=True))
    ended = invoke("compare", *paths)
    assert (ended.code, ended.err) == (0, "")
    assert "φ(i, j) of A" in ended.out
    assert "φ(i, j) left" not in ended.out.replace("\n", " ")


def test_three_adapters_show_a_matrix(tmp_path: Path) -> None:
    ended = invoke("compare", *adapters(tmp_path, 3))
    assert ended.code == 0
    for text in ("cosine of the updates", "A B", "A C", "B C", "in brackets"):
        assert text in ended.out
    assert "φ(i, j) left" not in ended.out
    assert "φ(i, j) left" in invoke("compare", *adapters(tmp_path / "v", 3), "-v").out


def test_a_sample_is_said(tmp_path: Path) -> None:
    ended = invoke("compare", *adapters(tmp_path), "--sample", "40")
    assert "from random rows of 2 modules, 80 of 384 entries" in ended.out


@pytest.mark.parametrize("count", [2, 3])
def test_the_document(tmp_path: Path, count: int) -> None:
    report = tmp_path / "report.json"
    ended = invoke("compare", *adapters(tmp_path, count), "--json", "--report", report)
    document = the_document(ended)
    assert document["schema"] == "loratool/compare/1"
    assert len(document["pairs"]) == count * (count - 1) // 2
    assert set(document["pairs"][0]["initial_a"]) == {
        "verdict", "cosine", "distance", "positive_rows", "rows", "chance",
    }  # fmt: skip
    module = document["modules"][0]
    assert module["entries"] == module["entries_total"] == 192
    assert str(tmp_path) not in ended.out
    assert report.is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument"),
        (["adapter-0"], 2, "one adapter cannot be compared"),
        (["adapter-0", "gone"], 3, "gone: no such file or folder"),
        (["adapter-0", "adapter-1", "--include", "q_proj"], 4, "'q_proj' matches nothing"),
        (["adapter-0", "other"], 4, "no module in common"),
        (["adapter-0", "adapter-1", "--sample", "0"], 2, "--sample"),
    ],
)
def test_failures(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    adapters(tmp_path)
    write_peft(tmp_path / "other", lora_factors("lm_head", 24, 8, 2))
    monkeypatch.chdir(tmp_path)
    ended = invoke("compare", *arguments)
    assert ended.code == code
    assert message in ended.err
    assert ended.out == ""
    document = the_document(invoke("compare", *arguments, "--json"))
    assert document["schema"] == "loratool/error/1"
    assert document["error"]["exit_code"] == code


def test_an_adapter_with_nothing_to_compare_has_no_figures(tmp_path: Path) -> None:
    """And no part in the suggestion, whose command would refuse it."""
    dora = lora_factors(MODULES[0], 24, 8, 2)
    dora[f"base_model.model.{MODULES[0]}.lora_magnitude_vector.weight"] = torch.ones(24)
    paths = [
        *adapters(tmp_path),
        write_peft(tmp_path / "dora", dora, fan_in_fan_out=True, use_dora=True),
    ]
    out = invoke("compare", *paths).out
    assert re.search(r"^  C$", out, re.MULTILINE), "no cosine with itself either"
    assert re.search(r"^  B C +0$", out, re.MULTILINE)
    (suggested,) = re.findall("suggested: (.*)", out)
    assert suggested.startswith(f"loratool combine {paths[0]} {paths[1]} --method")


def test_the_page_of_two_has_their_overlaps(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    ended = invoke("compare", *adapters(tmp_path), "--html", page, "--json")
    (pair,) = the_document(ended)["pairs"]
    text = page.read_text()
    for what in ("left singular vectors", "right singular vectors", "factors A"):
        assert f"first i and j {what}, mean over modules" in text
    assert f"{pair['phi_left_grid']['values'][0][0]:.3f}" in text
    assert "suggested: combine --method svd --rank energy:0.99, because" in text
