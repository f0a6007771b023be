"""What is stated of a truncation is true, on hundreds of matrices, against float64 SVDs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from loratool.algebra import factorize as module
from loratool.algebra.certificate import NEGLIGIBLE
from loratool.algebra.factorize import factorize, residual_norm
from loratool.algebra.lowrank import LowRank
from loratool.algebra.ranks import parse_rank_rule
from loratool.engine import Engine, NoProgress
from tests.algebra.matrices import RANKS, Case, cases, with_spectrum

ALL = list(cases())
FEW = ALL[::12]
STORED = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _small_matrices_are_sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_SIDE", 16)


def check(case: Case) -> int:
    """Check one matrix at every rank; how many claims that were."""
    d = case.matrix()
    dense = d.double().numpy()
    values = np.linalg.svd(dense, compute_uv=False)
    norm = float(np.sqrt(np.sum(values**2)))
    for rank in RANKS:
        factors = factorize(d, parse_rank_rule(str(rank)), key=case.name)
        assert factors.method == "block Krylov"
        best = float(np.sqrt(np.sum(values[rank:] ** 2)))
        value = factors.low_rank()
        missed = distance(dense, value)
        excess = (missed - best) / (best if best >= NEGLIGIBLE * norm else norm)
        assert excess <= factors.bound.excess + 1e-9, (case, rank, excess, factors.bound)
        assert factors.bound.failure <= 4.1e-8
        for dtype in STORED:
            stored = LowRank(value.b.to(dtype), value.a.to(dtype), 0.7)
            if not bool(stored.b.isfinite().all() and stored.a.isfinite().all()):
                continue  # beyond fp16's range
            true, stated = distance(dense, stored), residual_norm(d, stored)
            assert abs(stated - true) <= 1e-6 * true + 1e-12 * norm, (case, rank, dtype)
    return len(RANKS)


@pytest.mark.parametrize("missed", [1.0, 1e-2, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("pattern", ["random", "equal rows", "equal entries", "last rows", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stated_error_is_true_of_many_rows(
    missed: float, pattern: str, dtype: torch.dtype
) -> None:
    """Where most blocks are multiplied in float32, also if rounding follows a pattern."""
    generator = torch.Generator().manual_seed(8)
    rows, columns, rank = 1500, 400, 24
    b, a = (
        torch.randn(rows, rank, generator=generator),
        torch.randn(rank, columns, generator=generator),
    )
    if pattern == "equal rows":
        b = b[:1].expand(rows, rank)
    if pattern == "equal entries":
        b, a = torch.full_like(b, 1 / 3), torch.full_like(a, 0.7)
    size = 2.0**100 if pattern == "huge" else 1.0
    value = LowRank((b * size).to(dtype), a.to(dtype), 0.7)
    rest = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if pattern == "equal entries":
        rest = torch.ones_like(rest)
    if pattern == "last rows":
        rest[:-3] = 0
    d = (value.b.double() @ value.a.double() * value.scale + size * missed * rest).float()
    true, stated = distance(d.double().numpy(), value), residual_norm(d, value)
    norm = float(d.double().norm())
    assert abs(stated - true) <= 1e-6 * true + 1e-12 * norm


@pytest.mark.parametrize("others", [0.0, 1e-3])
@pytest.mark.parametrize(
    ("shape", "alike", "scale", "dtype"),
    [
        ((4096, 2048), slice(300, 1500), 0.7, torch.bfloat16),
        ((4096, 600), slice(1000, 3000), 0.7, torch.float16),
        ((2000, 600), slice(873, 2000), 1 / 3, torch.bfloat16),
    ],
)
def test_the_stated_error_is_true_where_some_rows_are_alike(
    shape: tuple[int, int], alike: slice, scale: float, dtype: torch.dtype, others: float
) -> None:
    """Their products round alike; whole blocks of rows that were checked had none of them."""
    d = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * others * 0.37
    d[alike] = 0.37
    value = factorize(d, parse_rank_rule("1"), key="k").low_rank()
    stored = LowRank((value.b / scale).to(dtype), value.a.to(dtype), scale)
    true, stated = distance(d.double().numpy(), stored), residual_norm(d, stored)
    assert abs(stated - true) <= 1e-6 * true + 1e-12 * float(d.double().norm())


def distance(dense: np.ndarray, value: LowRank) -> float:
    """‖D − s·B·A‖ in float64, not by the package."""
    b, a = value.b.double().numpy(), value.a.double().numpy()
    return float(np.linalg.norm(dense - value.scale * (b @ a)))


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_certificates_hold(case: Case) -> None:
    check(case)


@pytest.mark.slow
def test_certificates_hold_on_hundreds_of_matrices() -> None:
    assert sum(check(case) for case in ALL) >= 500


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_the_exact_method_is_the_optimum(case: Case) -> None:
    d = case.matrix()
    values = np.linalg.svd(d.double().numpy(), compute_uv=False)
    norm = float(np.sqrt(np.sum(values**2)))
    factors = factorize(d, parse_rank_rule("8"), key="k", exact=True)
    best = float(np.sqrt(np.sum(values[8:] ** 2)))
    assert factors.bound.excess == factors.bound.failure == 0
    assert distance(d.double().numpy(), factors.low_rank()) <= best * (1 + 1e-6) + 1e-6 * norm
    assert factors.spectrum.norm == pytest.approx(norm, rel=1e-12)
    resolved = factors.spectrum.values.numpy()
    assert np.allclose(resolved, values[: len(resolved)], rtol=1e-9, atol=3e-8 * values[0])


@pytest.mark.parametrize("scale", [2.0**-99, 2.0**99])
def test_a_power_of_two_changes_nothing_but_the_size(scale: float) -> None:
    d = with_spectrum(220, 180, torch.arange(1, 181, dtype=torch.float64) ** -1.0)
    one, other = (factorize(x, parse_rank_rule("6"), key="k") for x in (d, d * scale))
    assert torch.allclose(one.u, other.u, atol=1e-4)
    assert torch.allclose(one.v, other.v, atol=1e-4)
    assert torch.allclose(one.spectrum.values * scale, other.spectrum.values, rtol=1e-6)
    assert other.bound.excess == pytest.approx(one.bound.excess, rel=0.1)


def test_an_absolute_rule_sees_the_true_size() -> None:
    values = 1e-20 * torch.tensor([5.0, 4.0, 3.0, 0.2, 0.1], dtype=torch.float64)
    d = with_spectrum(200, 180, values)
    assert factorize(d, parse_rank_rule("absolute:1e-20"), key="k").rank == 3
    auto = factorize(d, parse_rank_rule("auto"), key="k", noise_floor=1e-20)
    assert auto.rank == 3
    assert auto.spectrum.noise_floor == 1e-20


@pytest.mark.parametrize("transposed", [False, True])
def test_bytes_do_not_depend_on_threads(transposed: bool) -> None:
    """The randomised method, its bound and the stated error: one job on one BLAS thread."""
    matrices = [
        with_spectrum(600, 540, torch.arange(1, 541, dtype=torch.float64) ** -p, seed)
        for seed, p in enumerate((1.0, 0.3))
    ] * 2

    def work(job: int) -> tuple[Tensor, Tensor, float, float]:
        d = matrices[job].T if transposed else matrices[job]
        factors = factorize(d, parse_rank_rule("16"), key="k")
        value = factors.low_rank()
        return value.b, value.a, factors.bound.excess, residual_norm(d, value)

    def run(workers: int) -> list[tuple[Tensor, Tensor, float, float]]:
        return Engine(workers).map(
            work, list(range(4)), cost=lambda _: 1, progress=NoProgress(), what="x"
        )

    for one, other in zip(run(1), run(4), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        assert one[2:] == other[2:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sketch_dtype_costs_no_accuracy(dtype: torch.dtype) -> None:
    d = with_spectrum(400, 300, torch.arange(1, 301, dtype=torch.float64) ** -1.0)
    factors = factorize(d, parse_rank_rule("8"), key="k", sketch_dtype=dtype)
    values = torch.linalg.svdvals(d.double())
    best = float(values[8:].norm())
    assert residual_norm(d, factors.low_rank()) <= best * (1 + 1e-4)
    assert factors.bound.excess <= 1e-3


def test_a_zero_matrix() -> None:
    for exact in (False, True):
        factors = factorize(torch.zeros(300, 200), parse_rank_rule("4"), key="k", exact=exact)
        assert bool((factors.low_rank().dense() == 0).all())
        assert factors.bound.excess == 0
