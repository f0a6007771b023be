"""Laws that hold for any number of updates of any shapes, ranks, scales and weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.algebra.lowrank import LowRank
from loratool.algebra.spectrum import Spectrum
from loratool.algebra.truncation import truncate
from loratool.combining.method import Updates
from loratool.combining.registry import METHODS, find_method
from tests.combining.reference_spectral import FLATTENING
from tests.combining.values import low_rank, run

NAME = "layers.0.q.weight"
SUMS: dict[str, dict[str, Any]] = {
    "svd": {},
    "cat": {},
    "task_arithmetic": {},
    "linear": {"normalize": False},
}
MASKED: dict[str, dict[str, Any]] = {"dare_linear": {}, "breadcrumbs": {}, "magnitude_prune": {}}
"""Sums of updates whose masks do not depend on the weights."""

BY_PLACE = {"slerp", "nearswap"}
RANDOM = {name for name in METHODS if "dare" in name or "della" in name}
ANY_ORDER = sorted(set(METHODS) - BY_PLACE - RANDOM - {"ctm"})
"""Methods that do not tell the adapters apart. ctm stops an iteration at 1e-6: test_spectral."""

laws = settings(max_examples=20, deadline=None)


@st.composite
def updates(draw: st.DrawFn, least: int = 1, most: int = 4) -> list[LowRank]:
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    count, seed = draw(st.integers(least, most)), draw(st.integers(0, 10**6))
    return [
        low_rank(
            rows,
            columns,
            draw(st.integers(1, 6)),
            seed + i,
            draw(st.sampled_from([0.5, 2.0, 1 / 3])),
        )
        for i in range(count)
    ]


def weights_for(draw: st.DataObject, values: Sequence[LowRank], low: float = -2) -> list[float]:
    one = st.floats(low, 2).filter(lambda x: abs(x) > 0.01)
    return draw.draw(st.lists(one, min_size=len(values), max_size=len(values)))


def size_of(values: Sequence[LowRank], weights: Sequence[float]) -> float:
    return sum(abs(w) * value.norm() for w, value in zip(weights, values, strict=True))


def combined(name: str, values: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    method = find_method(name)
    parameters = method.check(SUMS[name], len(values))
    result = method(Updates(NAME, tuple(values), tuple(weights)), parameters)
    assert isinstance(result, LowRank)
    return result


def everything(spectrum: Spectrum) -> int:
    return len(spectrum.values)


@laws
@given(updates(), st.data())
def test_cat_is_exact_and_ranks_add_up(values: list[LowRank], data: st.DataObject) -> None:
    weights = weights_for(data, values)
    result = combined("cat", values, weights)
    exact = sum((w * v.dense() for w, v in zip(weights, values, strict=True)), torch.zeros(()))
    assert result.rank == sum(value.rank for value in values)
    assert float((result.dense() - exact).norm()) <= 1e-14 * size_of(values, weights)


@laws
@given(updates(), st.data())
def test_svd_at_full_rank_is_cat(values: list[LowRank], data: st.DataObject) -> None:
    weights = weights_for(data, values)
    whole = truncate(combined("svd", values, weights), everything).value
    off = whole.dense() - combined("cat", values, weights).dense()
    assert float(off.norm()) <= 1e-12 * size_of(values, weights)
    assert whole.rank <= min(sum(value.rank for value in values), *whole.shape)


@pytest.mark.parametrize("name", [*SUMS, *MASKED])
@laws
@given(updates(), st.integers(-4, 4), st.integers(-4, 4), st.data())
def test_weights_are_linear(
    name: str, values: list[LowRank], x: int, y: int, data: st.DataObject
) -> None:
    one, two = weights_for(data, values), weights_for(data, values)
    options = (SUMS | MASKED)[name]
    both = [x * v + y * w for v, w in zip(one, two, strict=True)]
    parts = [run(name, values, weights, **options) for weights in (one, two)]
    off = run(name, values, both, **options) - (x * parts[0] + y * parts[1])
    size = abs(x) * size_of(values, one) + abs(y) * size_of(values, two)
    assert float(off.norm()) <= (1e-13 if name in SUMS else 2e-6) * size


@pytest.mark.parametrize("name", ANY_ORDER)
@settings(max_examples=8, deadline=None)
@given(updates(least=2), st.data())
def test_order_does_not_matter(name: str, values: list[LowRank], data: st.DataObject) -> None:
    values = values[: find_method(name).adapters[1]]
    weights = weights_for(data, values, low=0.01)
    order = data.draw(st.permutations(range(len(values))))
    turned = run(name, [values[i] for i in order], [weights[i] for i in order])
    expected = run(name, values, weights)
    if name == "model_stock":  # t has a pole
        assert float((turned - expected).norm()) <= 1e-6 * float(expected.norm()) + 1e-9
        return
    assert float((turned - expected).norm()) <= 1e-4 * size_of(values, weights)


@pytest.mark.parametrize("name", SUMS)
@laws
@given(updates(most=1), st.integers(1, 3), st.floats(0.01, 30))
def test_an_adapter_and_its_negative_are_nothing(
    name: str, values: list[LowRank], copies: int, weight: float
) -> None:
    """Cut to its numerical rank, the sum has none."""
    (value,) = values
    terms, weights = [value] * (copies + 1), [weight] * copies + [-weight * copies]
    if copies == 3:  # in another convention, too
        terms[-1] = LowRank(value.b * 4, value.a / 8, value.scale * 2)
    assert truncate(combined(name, terms, weights), everything).value.rank == 0


@laws
@given(updates(), st.data())
def test_iso_c_has_the_mean_of_the_nonzero_values(
    values: list[LowRank], data: st.DataObject
) -> None:
    """The paper's mean is over min(m, n) values, which for full-rank updates is the same."""
    weights = weights_for(data, values)
    exact = sum((w * v.dense() for w, v in zip(weights, values, strict=True)), torch.zeros(()))
    sigma = torch.linalg.svdvals(exact)
    rank = int((sigma > 1e-9 * sigma[0]).sum())
    found = torch.linalg.svdvals(run("iso_c", values, weights))
    assert torch.allclose(found[:rank], sigma[:rank].mean().expand(rank), rtol=1e-7)
    assert float(found[rank:].sum()) <= 1e-9 * float(sigma[0])
    papers = float(sigma.mean())
    assert papers == pytest.approx(float(found[0]) * rank / min(exact.shape), rel=1e-7)


@pytest.mark.parametrize(
    "name", [n for n, m in METHODS.items() if m.adapters[0] == 1 and n not in FLATTENING]
)
@settings(max_examples=8, deadline=None)
@given(updates(most=1))
def test_one_adapter_at_weight_one_is_itself(name: str, values: list[LowRank]) -> None:
    known = {parameter.name for parameter in find_method(name).parameters}
    given = {"density": 1.0} if "density" in known else {}
    off = run(name, values, [1.0], **given) - values[0].dense()
    assert float(off.norm()) <= 1e-5 * values[0].norm()


def convention(value: LowRank, alpha: float, factor: float) -> LowRank:
    """The same update as training with another alpha, or rank stabilisation, would have it."""
    return LowRank(
        value.b.double() / factor, value.a.double() * factor / alpha, value.scale * alpha
    )


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"pico"}))
@settings(max_examples=8, deadline=None)
@given(updates(least=2), st.sampled_from([0.25, 3.0, 16**0.5]), st.sampled_from([0.1, 1.0, 7.0]))
def test_the_scaling_convention_does_not_matter(
    name: str, values: list[LowRank], alpha: float, factor: float
) -> None:
    """pico looks at s·B by its definition: there the scale may move, but not between B and A."""
    values = values[: find_method(name).adapters[1]]
    weights = [0.75, 0.5, 1.25, 1.0][: len(values)]
    others = [convention(value, alpha, factor) for value in values]
    off = run(name, others, weights) - run(name, values, weights)
    assert float(off.norm()) <= 2e-4 * size_of(values, weights)


PEAK = r"""
import json, re, sys, tempfile
from pathlib import Path
import torch
from loratool.adapter import LowRankUpdate
from loratool.algebra.ranks import parse_rank_rule
from loratool.combining.registry import find_method
from loratool.ops.combine_jobs import CombineJob, combine_weight
from loratool.storage.dtypes import F32
from loratool.storage.tensors import MemoryTensor
torch.set_num_threads(1)
width, rank = int(sys.argv[1]), 4
def peak():
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", text)[1])
def update(seed):
    g = torch.Generator().manual_seed(seed)
    b, a = torch.randn(width, rank, generator=g), torch.randn(rank, width, generator=g)
    return LowRankUpdate(MemoryTensor(b), MemoryTensor(a), 0.5, 2.0)
def work(name, folder):
    method = find_method(name)
    count = min(3, method.adapters[1] or 3)
    updates = tuple(update(seed) for seed in range(count))
    rule = None if method.keeps_rank else parse_rank_rule("4")
    job = CombineJob(0, "w", ("a",) * count, updates, (1.0,) * count, name,
        method.check({}, count), rule, F32, torch.device("cpu"), 0, False, Path(folder))
    combine_weight(job)
with tempfile.TemporaryDirectory() as folder:
    width = 64
    for name in sys.argv[2:]:
        work(name, folder)
    before, width = peak(), int(sys.argv[1])
    found = {}
    for name in sys.argv[2:]:
        work(name, folder)
        found[name] = peak() - before
print(json.dumps(found))
"""


def peaks(width: int, names: list[str]) -> dict[str, int]:
    """Growth of a fresh process's largest resident memory by whole jobs, one after the other.

    VmHWM is the process's own; ru_maxrss starts at what its parent had.
    """
    command = [sys.executable, "-c", PEAK, str(width), *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path.cwd(), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_of_jobs_on_factors_and_cores() -> None:
    """Loading, combining, cutting, measuring, parking: a matrix of 16384² is 1 GiB in float32."""
    names = [name for name, method in METHODS.items() if method.space != "dense"]
    assert max(peaks(16384, names).values()) < 2**27


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_of_elementwise_jobs() -> None:
    """Blocks of rows, and no result held that is beyond 2**27 bytes; 6144² are 144 MiB."""
    assert max(peaks(6144, ["dare_linear"]).values()) < 2**27


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_largest_allocation_is_seen() -> None:
    """The measurement itself: a method that builds the matrix would fail."""
    assert max(peaks(2048, ["ties"]).values()) > 4 * 2048 * 2048
