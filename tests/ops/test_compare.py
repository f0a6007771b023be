"""compare: adapters against each other, through files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool as lt
from loratool.algebra.initial import Start
from loratool.errors import (
    DisagreementError,
    NonFiniteValues,
    NothingMatches,
    RangeOverflow,
    UnsupportedInput,
    UsageError,
)
from loratool.ops.compare_report import PhiGrid, mean_grid
from tests.ops.builders import LLAMA, llama_like, moved, save_folder, save_peft

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"


def factors(seed: int, *modules: str, rank: int = 4) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (
            torch.randn(rank, 20, generator=generator),
            torch.randn(12, rank, generator=generator),
        )
        for module in modules
    }


def test_figures_against_dense_matrices(tmp_path: Path) -> None:
    """Two modules, two ranks, rsLoRA on one side: everything from the scaled dense updates."""
    one, two = factors(1, Q, V), factors(2, Q, V, rank=3)
    paths = [
        save_peft(tmp_path / "one", one),
        save_peft(tmp_path / "two", two, lora_alpha=5, use_rslora=True),
    ]
    report = lt.compare(paths)
    dense = []
    for pairs, scale in ((one, 2.0), (two, 5 / 3**0.5)):
        dense.append({m: scale * b.double() @ a.double() for m, (a, b) in pairs.items()})
    inner = {m: float((dense[0][m] * dense[1][m]).sum()) for m in (Q, V)}
    norms = [{m: float(d[m].norm()) for m in (Q, V)} for d in dense]
    for row in report.rows:
        module = row.name.removesuffix(".weight")
        assert row.norms == pytest.approx([norms[0][module], norms[1][module]])
        (pair,) = row.pairs
        assert pair.cosine == pytest.approx(inner[module] / row.norms[0] / row.norms[1])
        assert pair.norm_ratio == pytest.approx(row.norms[1] / row.norms[0])
        assert row.linear[0] == pytest.approx(1 + inner[module] / row.norms[0] ** 2)
        assert row.linear[1] == pytest.approx(1 + inner[module] / row.norms[1] ** 2)
        assert (row.ranks, row.entries, row.is_sampled) == ((4, 3), 240, False)
    (total,) = report.pairs
    whole = [sum(norm**2 for norm in side.values()) ** 0.5 for side in norms]
    assert [adapter.norm for adapter in report.adapters] == pytest.approx(whole)
    assert total.cosine == pytest.approx(sum(inner.values()) / whole[0] / whole[1])
    assert report.linear[0] == pytest.approx(1 + sum(inner.values()) / whole[0] ** 2)


def test_an_adapter_with_itself(tmp_path: Path) -> None:
    path = save_peft(tmp_path / "a", factors(1, Q, V))
    report = lt.compare([path, path])
    (total,) = report.pairs
    assert total.cosine == pytest.approx(1.0)
    assert total.sign_agreement == 1.0
    assert total.common == pytest.approx((1.0, 1.0))
    assert report.linear == pytest.approx((2.0, 2.0))
    assert all(row.joint.left == row.joint.right == 4 for row in report.rows)
    assert all(max(row.pairs[0].angles_left) < 1e-5 for row in report.rows)


def test_alone_and_shared_modules(tmp_path: Path) -> None:
    """The cosine of the wholes counts what one lacks as zero; the module is listed."""
    one = save_peft(tmp_path / "one", factors(1, Q, V))
    two = save_peft(tmp_path / "two", factors(1, Q))
    report = lt.compare([one, two])
    assert report.adapters[0].alone == (f"{V}.weight",)
    assert report.adapters[1].alone == ()
    (total,) = report.pairs
    assert total.shared == 1
    norms = [report.adapters[i].norm for i in range(2)]
    assert total.cosine == pytest.approx(norms[1] / norms[0])
    assert next(row for row in report.rows if not row.pairs).ties is None


def test_three_adapters(tmp_path: Path) -> None:
    paths = [save_peft(tmp_path / str(i), factors(i, Q)) for i in range(3)]
    report = lt.compare(paths)
    assert [pair.pair for pair in report.pairs] == [(0, 1), (0, 2), (1, 2)]
    swapped = lt.compare(paths[::-1])
    assert swapped.pairs[0].cosine == pytest.approx(report.pairs[2].cosine)
    assert swapped.ties(0) == pytest.approx(report.ties(2))


def test_names_that_differ_by_a_prefix(tmp_path: Path) -> None:
    one = save_peft(tmp_path / "one", factors(1, Q, V))
    short = {name.removeprefix("model."): value for name, value in factors(1, Q, V).items()}
    report = lt.compare([one, save_peft(tmp_path / "two", short)])
    assert report.pairs[0].cosine == pytest.approx(1.0)
    assert "prefix 'model.'" in report.notes[0]


def test_mixed_formats(tmp_path: Path) -> None:
    """PEFT beside the authors' own format, which needs alpha."""
    found = factors(1, Q)
    one = save_peft(tmp_path / "one", found, lora_alpha=8)
    a, b = found[Q]
    save_file({f"{Q}.lora_A": a, f"{Q}.lora_B": b}, tmp_path / "two.safetensors")
    report = lt.compare([one, tmp_path / "two.safetensors"], alpha=8)
    assert report.pairs[0].cosine == pytest.approx(1.0)
    assert [adapter.format for adapter in report.adapters] == ["PEFT", "loralib"]
    with pytest.raises(UsageError, match="does not store alpha"):
        lt.compare([one, tmp_path / "two.safetensors"])
    with pytest.raises(UsageError, match="stores its own alpha"):
        lt.compare([one, one], alpha=8)


def test_parameters_stored_whole_are_said(tmp_path: Path) -> None:
    path = save_peft(tmp_path / "one", factors(1, Q), modules_to_save=["lm_head"])
    file = path / "adapter_model.safetensors"
    tensors = load_file(file) | {"base_model.model.lm_head.weight": torch.ones(3, 20)}
    save_file(tensors, file)
    report = lt.compare([path, save_peft(tmp_path / "two", factors(2, Q))])
    assert len(report.notes) == 1
    assert report.notes[0].endswith("only low-rank updates are: 1 parameter stored whole")


def test_refusals(tmp_path: Path) -> None:
    one = save_peft(tmp_path / "one", factors(1, Q))
    with pytest.raises(UsageError, match="one adapter"):
        lt.compare([one])
    with pytest.raises(NothingMatches, match="no module in common"):
        lt.compare([one, save_peft(tmp_path / "two", factors(1, V))])
    a, b = factors(1, Q)[Q]
    wide = save_peft(tmp_path / "wide", {Q: (torch.cat([a, a], dim=1), b)})
    with pytest.raises(DisagreementError, match=r"\[12, 20\] in .*one and \[12, 40\] in .*wide"):
        lt.compare([one, wide])
    a[1, 2] = float("nan")
    with pytest.raises(NonFiniteValues, match=rf"broken: {Q}"):
        lt.compare([one, save_peft(tmp_path / "broken", {Q: (a, b)})])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sizes_do_not_matter(tmp_path: Path, size: float) -> None:
    """Of float32 factors near the ends of their range, too."""
    paths = [save_peft(tmp_path / str(i), factors(i, Q)) for i in range(2)]
    large = [
        save_peft(tmp_path / f"large-{i}", {Q: (factors(i, Q)[Q][0] * size, factors(i, Q)[Q][1])})
        for i in range(2)
    ]
    expected, got = (lt.compare(pair).pairs[0] for pair in (paths, large))
    assert got.cosine == pytest.approx(expected.cosine, rel=1e-5)
    assert got.sign_agreement == expected.sign_agreement
    assert got.phi_left.whole == pytest.approx(expected.phi_left.whole)


def test_sizes_beyond_float64_squares_are_refused(tmp_path: Path) -> None:
    a, b = factors(1, Q)[Q]
    path = save_peft(tmp_path / "huge", {Q: (a.double() * 1e120, b.double())})
    with pytest.raises(RangeOverflow, match="too large"):
        lt.compare([path, path])


def test_an_empty_update_is_refused(tmp_path: Path) -> None:
    path = save_peft(tmp_path / "empty", {Q: (torch.zeros(2, 20), torch.zeros(0, 2))})
    with pytest.raises(UnsupportedInput, match="is empty"):
        lt.compare([path, path])


def test_include_exclude_and_sample(tmp_path: Path) -> None:
    paths = [save_peft(tmp_path / str(i), factors(i, Q, V)) for i in range(2)]
    assert [row.name for row in lt.compare(paths, include=["q_proj"]).rows] == [f"{Q}.weight"]
    assert [row.name for row in lt.compare(paths, exclude=["q_proj"]).rows] == [f"{V}.weight"]
    row = lt.compare(paths, sample=60).rows[0]
    assert (row.entries, row.is_sampled) == (60, True)
    assert row.pairs[0].cosine == lt.compare(paths).rows[0].pairs[0].cosine


def test_an_untrained_adapter(tmp_path: Path) -> None:
    """B = 0: no figure where there is none, and JSON that holds."""
    a, b = factors(1, Q)[Q]
    paths = [
        save_peft(tmp_path / "zero", {Q: (a, torch.zeros_like(b))}),
        save_peft(tmp_path / "one", {Q: (a, b)}),
    ]
    report = lt.compare(paths)
    pair = report.rows[0].pairs[0]
    assert pair.cosine is None
    assert pair.norm_ratio is None
    assert pair.common == (None, 0.0)
    assert pair.phi_left.whole is None
    assert report.rows[0].linear == (None, pytest.approx(1.0))
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extracted_adapters_claim_no_common_start(tmp_path: Path, dtype: torch.dtype) -> None:
    """Two tunings that learned much the same: their A agree, and no training ever shared a seed."""
    base = llama_like(dtype)
    folder = save_folder(base, tmp_path / "base", LLAMA)
    common = moved(base, size=0.05, rank=4)
    for name, seed in (("one", 1), ("two", 2)):
        tuned = moved(common, size=0.0005, seed=seed)
        lt.extract(
            folder,
            save_folder(tuned, tmp_path / f"tuned-{name}", LLAMA),
            tmp_path / name,
            rank=4,
            include=["q_proj", "k_proj", "up_proj", "down_proj"],
            drop_rest=True,
        )
    (pair,) = lt.compare([tmp_path / "one", tmp_path / "two"]).pairs
    assert pair.start is not None
    assert pair.start.cosine > 0.9
    assert pair.start.chance < 1e-6
    assert pair.start.start is Start.ORTHOGONALISED


def test_jobs_do_not_matter(tmp_path: Path) -> None:
    paths = [save_peft(tmp_path / str(i), factors(i, Q, V)) for i in range(3)]
    assert lt.compare(paths, jobs=1).to_json() == lt.compare(paths, jobs=4).to_json()


def test_mean_of_grids() -> None:
    one = PhiGrid((1, 2), (1,), ((0.2,), (0.4,)))
    two = PhiGrid((1,), (1,), ((0.6,),))
    assert mean_grid([one, two]) == PhiGrid((1, 2), (1,), ((0.4,), (0.4,)))
    assert mean_grid([one, two, two]).i == (1,)
