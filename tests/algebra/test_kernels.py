"""The compiled pass and the plain one make the same decisions, not only the same bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.algebra.kernels import decide_bf16
from loratool.algebra.lowrank import LowRank
from loratool.algebra.native import SWITCH
from loratool.algebra.rounding import CertifiedSum, RoundedBlock
from loratool.errors import NonFiniteValues
from tests.algebra.reference import exact_merge, same_bits
from tests.algebra.test_rounding import tensors

pytest.importorskip("llvmlite")


def both(w0: torch.Tensor, terms: list[LowRank]) -> tuple[RoundedBlock, RoundedBlock]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(SWITCH, raising=False)
        assert decide_bf16() is not None
        compiled = CertifiedSum(terms).add_to(w0, 0, torch.bfloat16)
        patch.setenv(SWITCH, "1")
        assert decide_bf16() is None
        return compiled, CertifiedSum(terms).add_to(w0, 0, torch.bfloat16)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, list[LowRank]]:
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    terms = []
    for _ in range(draw(st.integers(1, 2))):
        rank = draw(st.integers(1, 5))
        b = draw(tensors(rows, rank, torch.float32))
        terms.append(LowRank(b, draw(tensors(rank, columns, torch.bfloat16)), 16 / 3))
    return draw(tensors(rows, columns, torch.bfloat16)), terms


@settings(max_examples=200, deadline=None)
@given(cases())
def test_same_everything(case: tuple[torch.Tensor, list[LowRank]]) -> None:
    compiled, plain = both(*case)
    assert same_bits(compiled.values, plain.values)
    for field in ("changed", "level2", "level3", "overflowed"):
        assert getattr(compiled, field) == getattr(plain, field)


def test_same_on_a_large_block() -> None:
    torch.manual_seed(4)
    w0 = (torch.randn(300, 700) * 0.02).bfloat16()
    term = LowRank(torch.randn(300, 16) * 0.02, torch.randn(16, 700) * 0.02, 2.0)
    compiled, plain = both(w0, [term])
    assert same_bits(compiled.values, plain.values)
    assert compiled.level2 == plain.level2 > 0
    assert compiled.changed == plain.changed == int((compiled.values != w0).sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_seen(bad: float) -> None:
    w0 = torch.zeros(4, 6).bfloat16()
    w0[3, 2] = bad
    term = LowRank(torch.ones(4, 1), torch.ones(1, 6))
    with pytest.raises(NonFiniteValues, match=r"\[3, 2\]"):
        CertifiedSum([term]).add_to(w0, 0, torch.bfloat16)


def test_values_near_the_end_of_float32() -> None:
    """Where float32 products overflow and cancel, float64 decides."""
    w0 = torch.tensor([[3e38, 1.0]]).bfloat16()
    b, a = torch.tensor([[1e30, -1e30]]), torch.tensor([[1e30, 1.0], [1e30, 1.0]])
    compiled, plain = both(w0, [LowRank(b, a)])
    expected = exact_merge(w0, [(b, a, 1.0)], torch.bfloat16)
    assert same_bits(compiled.values, expected)
    assert same_bits(plain.values, expected)


def test_subnormal_weights_and_updates() -> None:
    w0 = torch.tensor([[1e-40, 2e-39]]).bfloat16()
    b, a = torch.tensor([[1e-20]]), torch.tensor([[1e-20, 3e-20]])
    expected = exact_merge(w0, [(b, a, 1.0)], torch.bfloat16)
    assert same_bits(CertifiedSum([LowRank(b, a)]).add_to(w0, 0, torch.bfloat16).values, expected)
