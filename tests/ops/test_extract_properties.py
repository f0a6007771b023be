"""Extraction of any matrix: what is stated is true, and what is no number is refused by name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import loratool as lt
from loratool.errors import NonFiniteValues, NothingMatches
from tests.algebra.matrices import DECAYS, with_spectrum
from tests.ops.builders import LLAMA, save_folder

NAME = "model.layers.0.mlp.up_proj.weight"
DTYPES = {
    torch.bfloat16: (1e-25, 1e-4, 1.0, 1e15),
    torch.float16: (1e-3, 1.0, 50.0),
    torch.float32: (1e-25, 1e-4, 1.0, 1e15),
    torch.float64: (1e-25, 1.0, 1e15),
}


FLOAT16_MOST = 65504


@dataclass(frozen=True)
class Change:
    """A tensor on both sides, and the rank to extract."""

    base: Tensor
    tuned: Tensor
    rank: int

    @property
    def delta(self) -> np.ndarray:
        """What extraction defines D to be: the difference, rounded once to float32."""
        return (self.tuned.double() - self.base.double()).float().double().numpy()


@st.composite
def changes(draw: st.DrawFn) -> Change:
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    dtype = draw(st.sampled_from(list(DTYPES)))
    scale = draw(st.sampled_from(DTYPES[dtype]))
    decay = DECAYS[draw(st.sampled_from([*DECAYS]))]
    seed = draw(st.integers(0, 2**20))
    values = decay(torch.arange(1, min(rows, columns) + 1, dtype=torch.float64))
    step = with_spectrum(rows, columns, values / values.max(), seed).double() * scale
    base = torch.zeros(rows, columns, dtype=torch.float64)
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * scale
    rank = draw(st.integers(1, min(rows, columns)))
    stored = base.to(dtype)
    return Change(stored, (stored.double() + step).to(dtype), rank)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(changes(), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_what_is_stated_is_true(
    tmp_path_factory: pytest.TempPathFactory, change: Change, dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    base = save_folder({NAME: change.base}, folder / "base", LLAMA)
    tuned = save_folder({NAME: change.tuned}, folder / "tuned", LLAMA)
    delta = change.delta
    norm = float(np.linalg.norm(delta))
    if norm == 0:
        with pytest.raises(NothingMatches):
            lt.extract(base, tuned, folder / "a", rank=change.rank)
        return
    assume(dtype != "float16" or norm < FLOAT16_MOST**2)  # else its factors' range is too small
    (row,) = lt.extract(base, tuned, folder / "a", rank=change.rank, dtype=dtype).rows
    update = lt.open_adapter(folder / "a").low_rank[NAME].load()
    true = float(np.linalg.norm(delta - update.dense().numpy()))
    assert row.delta_norm == pytest.approx(norm, rel=1e-12)
    assert abs(row.relative_error * norm - true) <= 1e-6 * true + 1e-12 * norm
    assert row.rank == change.rank
    assert row.excess_bound == 0
    if dtype == "float32":
        best = float(np.linalg.norm(np.linalg.svd(delta, compute_uv=False)[change.rank :]))
        assert true <= best * (1 + 1e-6) + 2e-6 * norm


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    changes(),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.data(),
    st.booleans(),
)
def test_no_number_is_refused_by_name_and_place(
    tmp_path_factory: pytest.TempPathFactory,
    change: Change,
    value: float,
    data: st.DataObject,
    in_base: bool,
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    row, column = (data.draw(st.integers(0, size - 1)) for size in change.base.shape)
    sick = (change.base if in_base else change.tuned).clone()
    sick[row, column] = value
    sides = (sick, change.tuned) if in_base else (change.base, sick)
    base, tuned = (
        save_folder({NAME: side}, folder / name, LLAMA)
        for side, name in zip(sides, ("base", "tuned"), strict=True)
    )
    with pytest.raises(NonFiniteValues, match=rf"{NAME}: .* \[{row}, {column}\]"):
        lt.extract(base, tuned, folder / "a", rank=change.rank)
    assert not (folder / "a").exists()
