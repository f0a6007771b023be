"""Intruders of pairs and adapters, and what mitigating them writes: against float64 and PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor, nn

import loratool as lt
from loratool.errors import NothingMatches, OutputExists, RangeOverflow, UsageError
from tests.builders import snapshot
from tests.cli.invoke import invoke
from tests.ops.builders import (
    GPT2,
    LLAMA,
    State,
    gpt2_like,
    llama_like,
    load_folder,
    save_folder,
    save_peft,
)

FACTOR = 0.25


def planted(state: State, parts: tuple[str, ...], seed: int = 3) -> State:
    """Weights of these modules with a strong random direction added."""
    generator = torch.Generator().manual_seed(seed)
    tuned = {name: value.clone() for name, value in state.items()}
    for name, value in state.items():
        if value.ndim == 2 and any(part in name for part in parts):
            x = torch.randn(value.shape[0], generator=generator)
            y = torch.randn(value.shape[1], generator=generator)
            size = 2 * torch.linalg.matrix_norm(value.float(), 2) / (x.norm() * y.norm())
            tuned[name] = (value.float() + size * torch.outer(x, y)).to(value.dtype)
    return tuned


def by_hand(base: Tensor, tuned: Tensor, factor: float) -> tuple[list[bool], Tensor]:
    """Which of the top 10 are intruders, and the mitigated weight; both weights as (out, in)."""
    known = torch.linalg.svd(base.double(), full_matrices=False).U
    u, values, vh = torch.linalg.svd(tuned.double(), full_matrices=False)
    found = ((u.T @ known).abs().max(dim=1).values < 0.5)[:10]
    places = torch.nonzero(found).flatten()
    part = (u[:, places] * values[places]) @ vh[places]
    return found.tolist(), tuned.double() + (factor - 1) * part


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_pair_and_its_mitigation(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    like, config = {"llama": (llama_like, LLAMA), "gpt2": (gpt2_like, GPT2)}[family]
    state = like(dtype)
    tuned_state = planted(state, ("up_proj", "q_proj", "c_attn"))
    base = save_folder(state, tmp_path / "base", config)
    tuned = save_folder(tuned_state, tmp_path / "tuned", config, shards=2)
    report = lt.mitigate(base, tuned, tmp_path / "out", factor=FACTOR)
    assert report.mitigated is not None
    assert report.rows
    assert report.unchanged > 0
    merged = load_folder(tmp_path / "out")
    assert merged.keys() == tuned_state.keys()
    changed = set()
    for row in report.rows:
        stored = row.name if row.name in state else row.name.removeprefix("transformer.")
        turned = "c_" in stored
        sides = [s[stored].T if turned else s[stored] for s in (state, tuned_state)]
        found, expected = by_hand(*sides, FACTOR)
        assert [one.intruder for one in row.directions] == found
        if not any(found):
            continue
        changed.add(stored)
        expected = expected.T if turned else expected
        rounded = expected.to(dtype)
        assert merged[stored].dtype == dtype
        if dtype is torch.bfloat16:  # ties aside, the one right rounding
            assert float((merged[stored] == rounded).double().mean()) > 0.995
        gap = (merged[stored].double() - expected).abs()
        ulp = torch.finfo(dtype).eps * expected.abs()
        assert bool((gap <= 0.51 * ulp + 3e-6).all())
    assert changed
    assert report.mitigated.tensors == len(changed)
    for name in tuned_state.keys() - changed:
        assert torch.equal(merged[name], tuned_state[name]), name
    again = lt.intruders(base, tuned)
    assert [row.to_json() for row in again.rows] == [row.to_json() for row in report.rows]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in tuned.iterdir()
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "tuned"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 16, bias=False)
        self.up_proj = nn.Linear(16, 28, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(self.q_proj(x))  # type: ignore[no-any-return]


def test_an_adapter_and_peft(tmp_path: Path) -> None:
    """PEFT's own mitigation, at a rank that its truncation does not cut."""
    torch.manual_seed(0)
    net = Net()
    state = {name: value.detach().clone() for name, value in net.state_dict().items()}
    config = LoraConfig(r=16, lora_alpha=24, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(net, config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.mul_(0).add_(torch.randn_like(value) * (0.4 if "lora_B" in name else 0.1))
    model.save_pretrained(str(tmp_path / "adapter"))
    base = save_folder(state, tmp_path / "base", None)
    said: list[str] = []
    reduce_intruder_dimension(model, mitigation_lambda=FACTOR, logging_sink=said.append)
    counted = {line.split(":")[0].split(".")[-1]: line for line in said if "ntruders" in line}
    report = lt.mitigate(base, tmp_path / "adapter", tmp_path / "out", factor=FACTOR)
    assert report.intruders > 0
    for row in report.rows:
        line = counted[row.name.split(".")[-2]]
        assert line.endswith(f"Intruders: {row.intruders}" if row.intruders else "No intruders")
    fresh = Net()
    fresh.load_state_dict(state)
    ours = PeftModel.from_pretrained(copy.deepcopy(fresh), str(tmp_path / "out"))
    for part in ("q_proj", "up_proj"):
        theirs = getattr(model.base_model.model, part).get_delta_weight("intruder_reduced")
        delta = getattr(ours.base_model.model, part).get_delta_weight("default")
        assert torch.allclose(delta, theirs, atol=1e-5)
    written = json.loads((tmp_path / "out" / "loratool_report.json").read_text())
    assert written["mitigated"]["relative_error"] < 1e-6
    assert str(tmp_path) not in json.dumps(written)
    lt.merge(base, tmp_path / "out", tmp_path / "merged")
    merged = load_folder(tmp_path / "merged")
    for part in ("q_proj", "up_proj"):
        before = getattr(model.base_model.model, part).get_delta_weight("default")
        expected = by_hand(state[f"{part}.weight"], state[f"{part}.weight"] + before, FACTOR)[1]
        assert torch.allclose(merged[f"{part}.weight"].double(), expected, atol=1e-5)


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    state = llama_like(torch.float32)
    base = save_folder(state, tmp_path / "base", LLAMA)
    return [base, save_folder(planted(state, ("q_proj",)), tmp_path / "tuned", LLAMA)]


def test_the_command(pair: list[Path], tmp_path: Path) -> None:
    document = json.loads(invoke("inspect", *pair, "--intruders", "--json").out)
    assert document["what"] == "intruders"
    assert document["intruders"] == sum(row["intruders"] for row in document["weights"]) >= 1
    count, weights = document["intruders"], sum(bool(r["intruders"]) for r in document["weights"])
    shown = invoke("inspect", pair[1], "--base", pair[0], "--intruders", "--sort", "energy").out
    assert f"{count} of the 20 strongest directions of 2 weights are intruders" in shown
    before = snapshot(tmp_path)
    mitigating = ["inspect", *pair, "--mitigate", "0.75", "-o", tmp_path / "out"]
    assert "would examine" in invoke(*mitigating, "--dry-run").out
    plan = json.loads(invoke(*mitigating, "--dry-run", "--json").out)
    assert plan["schema"] == "loratool/mitigate-plan/1"
    assert snapshot(tmp_path) == before
    said = invoke(*mitigating).out
    assert f"out: checkpoint with the intruders of {weights} weight" in said
    assert invoke(*mitigating).code == 5
    assert invoke(*mitigating, "--overwrite", "--only", "q_proj").code == 0
    file = tmp_path / "rows.csv"
    invoke("inspect", *pair, "--intruders", "--csv", file)
    assert file.read_text().splitlines()[0].startswith("name,shape,intruders")


@pytest.mark.parametrize(
    "more",
    [
        ["--mitigate", "0.5"],
        ["--mitigate", "1", "-o", "x"],
        ["--mitigate", "-1", "-o", "x"],
        ["--intruders", "-o", "x"],
        ["--intruders", "--epsilon", "0"],
        ["--intruders", "--level", "values"],
        ["--top", "3"],
        ["--dry-run"],
        ["--intruders", "--sort", "change"],
    ],
)
def test_what_makes_no_sense(more: list[str], pair: list[Path], tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    assert invoke("inspect", *pair, *more).code == 2
    assert invoke("inspect", pair[0], "--intruders").code == 2
    assert snapshot(tmp_path) == before


def test_nothing_to_mitigate_writes_nothing(pair: list[Path], tmp_path: Path) -> None:
    state = llama_like(torch.float32)
    near = save_folder({n: v * 1.01 for n, v in state.items()}, tmp_path / "near", LLAMA)
    before = snapshot(tmp_path)
    with pytest.raises(NothingMatches, match="no intruder"):
        lt.mitigate(pair[0], near, tmp_path / "out", factor=0.5)
    with pytest.raises(OutputExists):
        lt.mitigate(*pair, tmp_path / "near", factor=0.5)
    adapter = save_peft(
        tmp_path / "a", {"model.layers.0.self_attn.q_proj": (torch.ones(2, 24), torch.ones(24, 2))}
    )
    with pytest.raises(UsageError, match="--alpha"):
        lt.intruders(pair[0], pair[1], alpha=1.0)
    assert lt.intruders(pair[0], adapter).rows[0].directions
    assert {k: v for k, v in snapshot(tmp_path).items() if not k.startswith("a")} == before


def test_an_update_beyond_float32(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    far = torch.full((2, 24), 1e30), torch.full((24, 2), 1e30)
    adapter = save_peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": far})
    with pytest.raises(RangeOverflow, match="q_proj"):
        lt.intruders(base, adapter)
