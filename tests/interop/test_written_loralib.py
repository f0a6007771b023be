"""Adapters written in the LoRA authors' layout, loaded by their own library."""

from __future__ import annotations

import json
from pathlib import Path

import click
import loralib
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import loratool as lt
from loratool.cli.combine import combine_command
from loratool.cli.convert import convert_command
from loratool.cli.init import init_command
from loratool.cli.resize import resize_command
from loratool.errors import Unplaced, UsageError
from loratool.formats.written import FORMATS
from tests.ops.adapters import adapter, convolution, updates
from tests.ops.test_combine import biased, dora, experts, saved

MODULES = {"first": (30, 24), "second": (24, 30)}


class Model(nn.Module):
    def __init__(self, rank: int, alpha: float) -> None:
        super().__init__()
        self.first = loralib.Linear(24, 30, r=rank, lora_alpha=alpha, merge_weights=False)
        self.second = loralib.Linear(30, 24, r=rank, lora_alpha=alpha, merge_weights=False)


def deltas(file: Path, alpha: float) -> dict[str, torch.Tensor]:
    """What the authors' layers do with the file: the response to the identity without W0."""
    tensors = load_file(file)
    model = Model(tensors["first.lora_A"].shape[0], alpha)
    missing = model.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys
    assert not any("lora" in key for key in missing.missing_keys)
    found = {}
    for name, layer in (("first", model.first), ("second", model.second)):
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.zero_()
            found[name] = layer(torch.eye(layer.in_features)).T.double()
    return found


def alpha_said(report: object) -> float:
    notes = getattr(report, "notes")  # noqa: B009
    (note,) = (note for note in notes if note.startswith("loralib stores no alpha"))
    return float(note.split("it is ")[1].split(",")[0])


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(expected) and all(
        float((found[name] - expected[name]).norm()) < 1e-5 * float(expected[name].norm())
        for name in expected
    )


@pytest.mark.parametrize("method", ["svd", "cat", "ties"])
def test_a_combination_of_unequal_adapters(tmp_path: Path, method: str) -> None:
    """Ranks that come out different are padded to one, scales brought to one."""
    a = adapter(tmp_path / "a", 4, modules=MODULES)
    b = adapter(tmp_path / "b", 6, 50, modules={"second": (24, 30)}, use_rslora=True)
    for name in ("peft", "loralib"):
        report = lt.combine([a, b], tmp_path / name, weights=[1, 0.5], method=method, format=name)
    file = tmp_path / "loralib" / "lora.safetensors"
    assert close(deltas(file, alpha_said(report)), updates(tmp_path / "peft"))
    body = json.loads((tmp_path / "loralib" / "loratool_report.json").read_text())
    assert body["format"] == "loralib"
    assert not (tmp_path / "loralib" / "adapter_config.json").exists()
    read = lt.open_adapter(tmp_path / "loralib", alpha=alpha_said(report))
    again = {n.removesuffix(".weight"): u.load().dense() for n, u in read.low_rank.items()}
    assert close(again, updates(tmp_path / "peft"))


def test_resizing_and_converting(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", 4, modules=MODULES, lora_alpha=6)
    report = lt.convert(path, tmp_path / "same", format="loralib")
    assert alpha_said(report) == 6
    assert close(deltas(tmp_path / "same" / "lora.safetensors", 6), updates(path))
    back = lt.convert(tmp_path / "same", tmp_path / "back", alpha=6)
    assert not back.notes
    one, two = (load_file(p / "adapter_model.safetensors") for p in (path, tmp_path / "back"))
    assert all(torch.equal(one[key], two[key]) for key in one | two)
    odd = adapter(tmp_path / "odd", 4, modules=MODULES, alpha_pattern={"first": 9})
    with pytest.raises(Unplaced, match="loralib takes one") as raised:
        lt.convert(odd, tmp_path / "no", format="loralib")
    assert "resize --rank full" in str(raised.value.hint)
    told = lt.resize(odd, tmp_path / "yes", rank="full", format="loralib")
    assert close(deltas(tmp_path / "yes" / "lora.safetensors", alpha_said(told)), updates(odd))
    grown = lt.resize(path, tmp_path / "grown", rank=7, format="loralib")
    assert ranks_in(tmp_path / "grown") == {7}
    found = deltas(tmp_path / "grown" / "lora.safetensors", alpha_said(grown))
    assert close(found, updates(path))


def ranks_in(folder: Path) -> set[int]:
    tensors = load_file(folder / "lora.safetensors")
    return {value.shape[0] for key, value in tensors.items() if key.endswith("lora_A")}


@pytest.mark.parametrize("make", [dora, convolution, experts, biased])
def test_what_the_format_cannot_hold_is_refused_before_any_work(
    tmp_path: Path, make: object
) -> None:
    assert callable(make)
    path = make(tmp_path / "a", 2, 0) if make in (experts, biased) else make(tmp_path / "a")
    with pytest.raises(Unplaced, match="has no place in loralib's layout"):
        lt.resize(path, tmp_path / "out", rank=2, format="loralib")
    with pytest.raises(Unplaced, match="has no place in loralib's layout"):
        lt.convert(path, tmp_path / "out", format="loralib")
    if make is not dora:
        with pytest.raises(Unplaced, match="has no place in loralib's layout"):
            lt.combine([path], tmp_path / "out", format="loralib")
    assert not (tmp_path / "out").exists()


def test_values_stored_whole_are_kept(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", torch.ones(2, 3))
    lt.combine([path], tmp_path / "out", format="loralib", rank=2)
    assert torch.equal(
        load_file(tmp_path / "out" / "lora.safetensors")["score.weight"], torch.ones(2, 3)
    )


def test_a_recipe_says_the_format(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", 4, modules=MODULES)
    recipe = tmp_path / "r.yaml"
    lt.combine([path], tmp_path / "one", format="loralib", write_recipe=recipe)
    assert "format: loralib" in recipe.read_text()
    lt.combine_recipe(recipe, tmp_path / "two")
    outer = tmp_path / "outer.yaml"
    outer.write_text("adapters:\n  - recipe: r.yaml\n")
    lt.combine_recipe(outer, tmp_path / "three")
    files = [tmp_path / name / "lora.safetensors" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert close(updates(tmp_path / "three"), updates(path))


def test_formats_that_are_not_there(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", 4, modules=MODULES)
    for run in (
        lambda: lt.combine([path], tmp_path / "out", format="kohya"),
        lambda: lt.resize(path, tmp_path / "out", rank=2, format="kohya"),
        lambda: lt.convert(path, tmp_path / "out", format="kohya"),
    ):
        with pytest.raises(UsageError, match="unknown format 'kohya'") as raised:
            run()
        assert "peft and loralib" in str(raised.value.hint)
    with pytest.raises(UsageError, match="a profile is of PEFT's files"):
        lt.resize(path, tmp_path / "out", rank=2, format="loralib", profile="vllm")


def test_the_help_names_every_format() -> None:
    for command in (combine_command, resize_command, convert_command, init_command):
        (option,) = (p for p in command.params if p.name == "format_name")
        assert isinstance(option, click.Option)
        assert option.metavar == "|".join(FORMATS)
