"""What --cost says, against plans, real adapters and closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loratool as lt
from loratool.algebra.cost import extract_flops
from loratool.errors import UnsupportedInput, UsageError
from loratool.ops import inspect_cost
from loratool.ops.extract_plan import plan_extract
from loratool.ops.inspect import CheckpointReport
from loratool.ops.inspect_cost import CostRow, Speed, parse_ranks
from loratool.ops.merge import plan_merge
from tests.ops.builders import GPT2, LLAMA, gpt2_like, llama_like, moved, save_folder
from tests.ops.test_inspect_levels import READ_SO_FAR, bytes_read, sparse_shards, stored_bytes


def rows_of(base: Path, *ranks: int, **options: object) -> tuple[CostRow, ...]:
    report = lt.inspect(base, cost=ranks, **options)  # type: ignore[arg-type]
    assert isinstance(report, CheckpointReport)
    assert report.costs is not None
    return report.costs.rows


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_against_real_adapters_and_plans(family: str, tmp_path: Path) -> None:
    like, config = {"llama": (llama_like, LLAMA), "gpt2": (gpt2_like, GPT2)}[family]
    state = like(torch.bfloat16)
    base = save_folder(state, tmp_path / "base", config)
    tuned = save_folder(moved(state, size=0.05), tmp_path / "tuned", config)
    for row in rows_of(base, 2, 16, jobs=2):
        out = tmp_path / str(row.rank)
        options = {"rank": str(row.rank), "targets": "all-linear", "drop_rest": True}
        report = lt.extract(base, tuned, out, **options)  # type: ignore[arg-type]
        assert row.parameters == report.adapter_parameters
        assert row.adapter_bytes == report.adapter_bytes
        extraction = plan_extract(base, tuned, tmp_path / "x", rank=row.rank).to_json(2)
        assert row.extract.read_bytes == 2 * sum(t.nbytes for t in state.values())
        assert row.extract.written_bytes == row.adapter_bytes
        assert row.extract.peak_bytes <= extraction["peak_bytes"]
        merge = plan_merge(base, [(out, 1.0)], tmp_path / "x").to_json(2)
        assert row.merge.peak_bytes == pytest.approx(merge["peak_bytes"], rel=1e-2)
        assert row.merge.written_bytes == sum(t.nbytes for t in state.values())


def test_operations() -> None:
    """Of a large matrix, by hand: 9 products of width 24 and 4 of 16 probes; a small one's Gram
    matrix; the product of the factors of both."""
    single, double = extract_flops([(1000, 4000)], 16)
    assert single == 2 * 4_000_000 * (9 * 24 + 4 * 16)
    assert double == 2 * 4_000_000 * 16
    single, double = extract_flops([(400, 100)], 16)
    assert single == 0
    assert double == 400 * 100**2 + 9 * 100**3 + 4 * 400 * 100 * 16


def test_seconds_follow_from_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)

    def seconds(flops: float, copied: float, jobs: int) -> tuple[float, float]:
        monkeypatch.setattr(inspect_cost, "measured_speed", lambda: Speed(flops, copied))
        (row,) = rows_of(base, 4, jobs=jobs)
        return row.merge.seconds, row.extract.seconds

    (row,) = rows_of(base, 4, jobs=1)
    one = seconds(1e9, 1e30, 1)
    assert one[0] == pytest.approx(row.merge.flops / 1e9)
    assert seconds(1e9, 1e30, 2)[0] == pytest.approx(one[0] / 2)
    weights = 2 * (24 * 24 + 12 * 24 + 2 * 40 * 24)
    assert seconds(1e30, 1e9, 1)[1] == pytest.approx(60 * weights / 1e9)


@pytest.mark.skipif(not READ_SO_FAR.exists(), reason="the system does not count reads")
def test_no_tensor_is_read(tmp_path: Path) -> None:
    sparse_shards(tmp_path / "a", 4, 8, 1024)
    rows_of(tmp_path / "a", 8)
    before = bytes_read()
    rows_of(tmp_path / "a", 8, 64)
    assert bytes_read() - before <= stored_bytes(tmp_path / "a") + 10_000


@pytest.mark.parametrize("text", ["", "0", "8,", "x", "-1", "8;9", "99999999999"])
def test_ranks_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="needs ranks"):
        parse_ranks(text)


def test_costs_are_of_one_checkpoint(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    with pytest.raises(UsageError, match="of one checkpoint"):
        lt.inspect(base, base, cost=(8,))
    assert parse_ranks("8, 16") == (8, 16)


def test_packed_weights_tell_no_cost(tmp_path: Path) -> None:
    """And an adapter of 8-bit weights has 16 bits a value."""
    name = "model.layers.0.self_attn.q_proj.weight"
    packed = save_folder({name: torch.zeros(512, 1, dtype=torch.uint8)}, tmp_path / "nf4", LLAMA)
    with pytest.raises(UnsupportedInput, match="U8 of shape"):
        rows_of(packed, 4)
    for dtype, bits in ((torch.float8_e4m3fn, 16), (torch.int8, 16), (torch.float32, 32)):
        path = save_folder({name: torch.zeros(32, 32).to(dtype)}, tmp_path / str(dtype), LLAMA)
        (row,) = rows_of(path, 4)
        assert row.adapter_bytes == 4 * 64 * bits // 8
