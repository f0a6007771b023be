"""The methods on singular vectors: their formulas, and what must and must not matter to them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loratool.algebra.lowrank import LowRank
from loratool.combining.method import Space, Updates
from loratool.combining.registry import METHODS, find_method
from loratool.errors import DisagreementError
from tests.combining import reference_spectral
from tests.combining.reference_spectral import CASES
from tests.combining.values import close, low_rank, run, three

WEIGHTS = [0.7, 0.3, 1.2]
NAMES = sorted({name for name, _ in CASES})


def formula(
    name: str, values: list[LowRank], weights: list[float], given: dict[str, Any]
) -> Tensor:
    more: dict[str, Any] = dict(given)
    if name == "pico":
        more["factors"] = [value.scale * value.b.double() for value in values]
    if name == "ctm":
        more["rank"] = max(value.rank for value in values)
    rule = name.removeprefix("core_")
    function = getattr(reference_spectral, name, partial(reference_spectral.in_core_space, rule))
    result = function([value.dense() for value in values], weights, **more)
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize(("name", "given"), CASES, ids=str)
@pytest.mark.parametrize("shape", [(40, 24), (24, 60), (5, 8), (1, 7)], ids=str)
def test_a_method_is_its_formula(name: str, given: dict[str, Any], shape: tuple[int, int]) -> None:
    if min(shape) < 10 and "floor" in given:
        given = {**given, "floor": 0.5}
    values = three(*shape)
    tolerance = 2e-4 if name == "ctm" else 1e-6  # its decomposition stops at 1e-6
    expected = formula(name, values, WEIGHTS, given)
    assert float(expected.norm()) > 0
    assert close(run(name, values, WEIGHTS, **given), expected, tolerance)


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[LowRank], list[float]]:
    """One to four updates of a small shape, ranks above its sides included."""
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    count, seed = draw(st.integers(1, 4)), draw(st.integers(0, 10**6))
    values = [
        low_rank(
            rows, columns, draw(st.integers(1, 6)), seed + i, draw(st.sampled_from([0.5, 2.0]))
        )
        for i in range(count)
    ]
    weights = draw(st.lists(st.sampled_from([-1.0, 0.3, 1.0, 2.0]), min_size=count, max_size=count))
    return values, weights


@pytest.mark.parametrize(
    "name", [n for n in NAMES if not n.startswith("core_") or n == "core_ties"]
)
@settings(max_examples=25)
@given(groups())
def test_any_shape_any_ranks_any_weights(
    name: str, group: tuple[list[LowRank], list[float]]
) -> None:
    values, weights = group
    expected = formula(name, values, weights, {})
    assert close(run(name, values, weights), expected, 1e-5) or float(expected.norm()) < 1e-9


@pytest.mark.parametrize("name", [n for n in NAMES if "dare" not in n and "della" not in n])
def test_order_does_not_matter(name: str) -> None:
    values = three()
    turned = run(name, values[::-1], WEIGHTS[::-1])
    assert close(run(name, values, WEIGHTS), turned, 2e-4 if name == "ctm" else 1e-6)


def rescaled(value: LowRank) -> LowRank:
    """The same update by another convention: the scale in B."""
    return LowRank(value.b.double() * value.scale, value.a.double())


def resplit(value: LowRank) -> LowRank:
    """The same update split in another way."""
    mixing = torch.randn(value.rank, value.rank, dtype=torch.float64)
    return LowRank(
        value.b.double() @ mixing, torch.linalg.solve(mixing, value.a.double()), value.scale
    )


@pytest.mark.parametrize("name", NAMES)
def test_where_the_scale_is_kept_does_not_matter(name: str) -> None:
    values = three()
    expected = run(name, values, WEIGHTS)
    assert close(run(name, [rescaled(value) for value in values], WEIGHTS), expected)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"pico"}))
def test_how_an_update_is_split_does_not_matter(name: str) -> None:
    torch.manual_seed(0)
    values = three()
    expected = run(name, values, WEIGHTS)
    assert close(run(name, [resplit(value) for value in values], WEIGHTS), expected, 1e-5)


@pytest.mark.parametrize("name", ["tsv_m", "svc", "pico"])
def test_a_single_adapter_is_itself(name: str) -> None:
    (value, *_) = three()
    assert close(run(name, [value], [1.0]), value.dense(), 1e-12)


def absent(shape: tuple[int, int]) -> LowRank:
    return LowRank(torch.zeros(shape[0], 0), torch.zeros(0, shape[1]))


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "svc", "pico"])
@pytest.mark.parametrize("untrained", [True, False])
def test_an_adapter_that_changes_nothing_has_no_say(name: str, untrained: bool) -> None:
    values = three()
    expected = run(name, values, WEIGHTS)
    a = values[0].a
    other = LowRank(torch.zeros(40, len(a)), a) if untrained else absent(values[0].shape)
    assert close(run(name, [values[0], other, *values[1:]], [0.7, 5.0, 0.3, 1.2]), expected, 1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["absent", "zero", "weightless"])
def test_nothing_gives_nothing(name: str, kind: str) -> None:
    value = low_rank(6, 5, 2, 1)
    if kind == "absent":
        value = absent((6, 5))
    if kind == "zero":
        value = LowRank(torch.zeros(6, 2), value.a)
    weights = [0.0, 0.0] if kind == "weightless" else [1.0, 1.0]
    assert float(run(name, [value, value], weights).norm()) == 0


def orthogonal(rows: int = 20, columns: int = 16, rank: int = 3) -> list[LowRank]:
    generator = torch.Generator().manual_seed(4)
    u = torch.linalg.qr(torch.randn(rows, 2 * rank, generator=generator).double()).Q
    v = torch.linalg.qr(torch.randn(columns, 2 * rank, generator=generator).double()).Q
    sigma = torch.arange(1.0, rank + 1).double()
    return [
        LowRank(u[:, :rank] * sigma, v[:, :rank].T),
        LowRank(u[:, rank:] * sigma.sqrt(), v[:, rank:].T),
    ]


@pytest.mark.parametrize("name", ["tsv_m", "svc"])
def test_updates_that_do_not_meet_are_added(name: str) -> None:
    values = orthogonal()
    assert close(run(name, values, [1.0, 1.0]), values[0].dense() + values[1].dense(), 1e-12)


@pytest.mark.parametrize("name", ["tsv_m", "svc", "pico"])
def test_a_repeated_adapter_counts_once(name: str) -> None:
    """The sum would be twice it."""
    value = orthogonal()[0]
    got = run(name, [value, value], [1.0, 1.0])
    if name == "pico":
        assert float(got.norm()) == pytest.approx(value.norm())
    else:
        assert close(got, value.dense(), 1e-12)


def test_iso_c_is_flat_and_how_far_the_papers_mean_is() -> None:
    values = three()
    sigma = torch.linalg.svdvals(run("iso_c", values, WEIGHTS))
    summed = torch.linalg.svdvals(sum(v.dense() * w for v, w in zip(values, WEIGHTS, strict=True)))
    assert torch.allclose(sigma[:10], summed[:10].mean().expand(10), rtol=1e-10)
    assert float(sigma[10:].max()) < 1e-10
    assert float(summed.mean()) == pytest.approx(float(sigma[0]) * 10 / 24, rel=1e-10)


def test_pico_turns_down_what_is_crowded() -> None:
    """Two adapters with one common and one own output direction: the common one weighs less."""
    e = torch.eye(4, dtype=torch.float64)
    one = LowRank(e[:, [0, 1]], e[[0, 1]])
    two = LowRank(e[:, [0, 2]], e[[2, 3]])
    got = run("pico", [one, two], [1.0, 1.0])
    crowded, own = float(got[0].norm()), float(got[1].norm())
    assert crowded / own == pytest.approx(2**0.5 * (1 / 1.5) / (1 / 1.25))


def test_knots_says_when_its_floor_leaves_nothing() -> None:
    values = [value * 1e-8 for value in three()]
    with pytest.raises(DisagreementError, match="floor"):
        run("knots_ties", values, WEIGHTS)
    assert float(run("knots_ties", values, WEIGHTS, floor=0.0).norm()) > 0


@pytest.mark.parametrize("name", ["ctm", "iso_c", "iso_cts"])
def test_components_are_the_rank(name: str) -> None:
    got = (
        run(name, three(), WEIGHTS, components=4, density=1.0)
        if name == "ctm"
        else run(name, three(), WEIGHTS, components=4)
    )
    assert int(torch.linalg.matrix_rank(got, rtol=1e-9)) == 4


class LargestTensor(TorchDispatchMode):
    """The largest result of any tensor operation."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, Sequence) else [result]:
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel())
        return result


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.space is not Space.DENSE])
def test_no_matrix_of_the_weights_size_is_made(name: str) -> None:
    """16384 wide, joint rank 12: nothing larger than a few stacked factors."""
    width, method = 16384, find_method(name)
    count = max(2, min(3, method.adapters[1] or 3))
    values = tuple(low_rank(width, width, 4, seed) for seed in range(count))
    with LargestTensor() as seen:
        method(Updates("w", values, (1.0,) * count), method.check({}, count))
    assert seen.elements <= 4 * 12 * width
