"""What inspect, compare, list and estimate print, character by character, without colour.

The expected text is in snapshots/, one file per view and width. After a change that is meant,
renew the files and read the difference before committing it:

    LORATOOL_RENEW_SNAPSHOTS=1 python -m pytest tests/cli/test_snapshots.py && git diff tests/cli
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratool.cli.main import main
from tests.ops.builders import LLAMA, State, save_folder, save_peft

SNAPSHOTS = Path(__file__).parent / "snapshots"
WIDTHS = (60, 100, 200)
DAY = 1_750_000_000


def whole_numbers(rows: int, columns: int, start: int) -> torch.Tensor:
    """The same on every machine: no random numbers, no rounding."""
    return ((torch.arange(rows * columns) * 7 + start) % 13 - 6).reshape(rows, columns).float() / 8


def save_adapter(folder: Path, rank: int, start: int) -> None:
    pairs = {
        f"model.layers.{layer}.self_attn.q_proj": (
            whole_numbers(rank, 8, start + layer),
            whole_numbers(8, rank, start + layer + 2),
        )
        for layer in range(4)
    }
    save_peft(folder, pairs, lora_alpha=2 * rank, base_model_name_or_path="org/base")


def models(folder: Path) -> None:
    base: State = {"model.embed_tokens.weight": whole_numbers(24, 8, 0)}
    for layer in range(4):
        base |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": whole_numbers(8, 8, layer),
            f"model.layers.{layer}.mlp.up_proj.weight": whole_numbers(16, 8, layer + 3),
            f"model.layers.{layer}.input_layernorm.weight": torch.ones(8),
        }
    tuned = {name: value.clone() for name, value in base.items()}
    for layer in range(4):
        for module, rank in (("self_attn.q_proj", 1), ("mlp.up_proj", 2)):
            weight = tuned[f"model.layers.{layer}.{module}.weight"]
            for part in range(rank):
                weight[part] += (layer + 1) / 16 * 2.0 ** (torch.arange(8) == part)
    save_folder(base, folder / "base", LLAMA)
    save_folder(tuned, folder / "tuned", LLAMA, shards=2)
    ailing = {name: value.clone() for name, value in base.items()}
    ailing["model.layers.1.mlp.up_proj.weight"][2] = 0
    ailing["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    ailing["model.layers.3.mlp.up_proj.weight"] = base["model.layers.0.mlp.up_proj.weight"].clone()
    save_folder(ailing, folder / "ailing", LLAMA)
    save_adapter(folder / "first", 2, 0)
    save_adapter(folder / "second", 3, 0)
    save_adapter(folder.parent / "third", 2, 5)
    shutil.copytree(folder / "first", folder / "copy of first")
    os.truncate(folder / "copy of first" / "adapter_model.safetensors", 900)
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, folder / "kohya.safetensors")
    for path in folder.rglob("*"):
        os.utime(path, (DAY, DAY))


VIEWS = {
    "list": ["list", ".", "--sort", "size", "-v"],
    "checkpoint": ["inspect", "base"],
    "values": ["inspect", "ailing", "--level", "values"],
    "adapter": ["inspect", "second"],
    "forecast": [
        *("inspect", "second", "--base", "base", "--level", "values", "--device", "cpu"),
    ],
    "amplification": ["inspect", "second", "--base", "base", "--device", "cpu"],
    "compare": ["compare", "first", "second"],
    "compare-three": ["compare", "first", "second", "../third"],
    "estimate": ["estimate", "base", "--rank", "4"],
    "estimate-paper": ["estimate", "gpt3-175b", "--rank", "4", "--targets", "query,value"],
    "adapters": ["inspect", "first", "second"],
    "weights": ["inspect", "base", "--level", "spectra", "--device", "cpu"],
    "intruders": ["inspect", "base", "tuned", "--intruders", "--top", "4", "--device", "cpu"],
    "pair-headers": ["inspect", "base", "tuned", "--level", "headers"],
    "pair-values": ["inspect", "base", "tuned", "--level", "values"],
    "pair": ["inspect", "tuned", "--base", "base", "--device", "cpu"],
}


class Utf8(io.StringIO):
    """A pipe to something that reads UTF-8."""

    encoding = "utf-8"  # type: ignore[assignment]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "models"
    place.mkdir()
    models(place)
    return place


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("view", VIEWS)
def test_what_is_printed(
    view: str, width: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stdout", stdout := Utf8())
    with pytest.raises(SystemExit) as ended:
        main(VIEWS[view])
    assert ended.value.code == 0
    shown = stdout.getvalue()
    snapshot = SNAPSHOTS / f"{view}-{width}.txt"
    if os.environ.get("LORATOOL_RENEW_SNAPSHOTS"):
        snapshot.write_text(shown, encoding="utf-8")
    assert shown == snapshot.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(SNAPSHOTS.glob("*.txt")), ids=lambda path: path.stem)
def test_tables_fit_their_width(path: Path) -> None:
    """Tables and maps do; sentences are wrapped by the terminal."""
    width = int(path.stem.rpartition("-")[2])
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(("  ", " ─")) or set(line) & set("░▒▓█▁▂▃"):
            assert len(line) <= width, line


def test_no_snapshot_is_left_over() -> None:
    expected = {f"{view}-{width}.txt" for view in VIEWS for width in WIDTHS}
    assert {path.name for path in SNAPSHOTS.iterdir()} == expected
