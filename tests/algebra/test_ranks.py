"""Rank rules against their formulas, written out again in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratool.algebra.ranks import REGISTRY, RankLimits, parse_rank_rule
from loratool.algebra.spectrum import Spectrum
from loratool.errors import UsageError

SPECTRA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30).map(
    lambda values: np.sort(np.array(values))[::-1].copy()
)
SHARES = st.floats(0.05, 1.0)


def complete(values: np.ndarray) -> Spectrum:
    """A spectrum with nothing unresolved, of a matrix twice as long as wide."""
    total = float((values**2).sum())
    return Spectrum(torch.from_numpy(values), total, (2 * len(values), len(values)))


@given(SPECTRA, SHARES)
def test_energy_and_error(values: np.ndarray, share: float) -> None:
    running = np.cumsum(values**2)
    rank = parse_rank_rule(f"energy:{share!r}")(complete(values))
    assert rank is not None
    assert running[rank - 1] >= share * running[-1] * (1 - 1e-12)
    assert rank == 1 or running[rank - 2] < share * running[-1] * (1 + 1e-12)
    error = parse_rank_rule(f"error:{share * 0.9!r}")(complete(values))
    assert error is not None
    rest = running[-1] - running[error - 1]
    assert rest <= (share * 0.9) ** 2 * running[-1] + 1e-9 * running[-1]


@given(SPECTRA, SHARES)
def test_shares_of_the_nuclear_norm(values: np.ndarray, share: float) -> None:
    running = np.cumsum(values)
    below = int((running < share * running[-1] * (1 - 1e-12)).sum())
    nuclear = parse_rank_rule(f"nuclear:{share!r}")(complete(values))
    assert nuclear == min(below + 1, len(values))
    assert parse_rank_rule(f"quantile:{share!r}")(complete(values)) == max(1, below)


@given(SPECTRA, SHARES)
def test_thresholds(values: np.ndarray, share: float) -> None:
    assert parse_rank_rule(f"ratio:{share!r}")(complete(values)) == int(
        (values >= share * values[0]).sum()
    )
    assert parse_rank_rule(f"absolute:{share!r}")(complete(values)) == int((values >= share).sum())


@given(SPECTRA)
def test_intrinsic_ranks(values: np.ndarray) -> None:
    energy = values**2
    stable = energy.sum() / energy[0]
    assert parse_rank_rule("stable")(complete(values)) == min(
        math.ceil(stable * (1 - 1e-12)), len(values)
    )
    shares = values / values.sum()
    entropy = math.exp(-(shares * np.log(shares)).sum())
    assert complete(values).effective_rank() == pytest.approx(entropy, rel=1e-9)
    assert complete(values).participation_ratio() == pytest.approx(
        energy.sum() ** 2 / (energy**2).sum(), rel=1e-9
    )
    assert parse_rank_rule("effective")(complete(values)) == min(
        math.ceil(entropy * (1 - 1e-12)), len(values)
    )


def test_gavish_donoho_finds_the_signal_in_white_noise() -> None:
    torch.manual_seed(0)
    noise = torch.randn(300, 200, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(300, 5, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(200, 5, dtype=torch.float64)).Q
    d = noise + 90 * u @ v.T
    values = torch.linalg.svdvals(d)
    spectrum = Spectrum(values, float(values.square().sum()), (300, 200))
    assert parse_rank_rule("gavish-donoho")(spectrum) == 5
    # square matrices: the published 4/√3-free constant, 2.858 times the median
    square = Spectrum(values, float(values.square().sum()), (200, 200))
    kept = int((values > 2.86 * values.median()).sum())
    assert parse_rank_rule("gavish-donoho")(square) == kept
    # of an even number of values the median lies between two: 2.858 · (1 + 3)/2 here
    even = torch.tensor([9.0, 5.0, 3.0, 1.0, 1.0, 0.5]).double()
    assert parse_rank_rule("gavish-donoho")(Spectrum(even, 117.25, (6, 6))) == 1


def test_knee_is_where_the_curve_bends() -> None:
    values = np.array([10.0, 9, 8, 1, 0.9, 0.8, 0.7, 0.6])
    assert parse_rank_rule("knee")(complete(values)) == 4
    assert parse_rank_rule("knee")(complete(np.ones(6))) == 6


def test_auto_keeps_what_is_above_the_floor() -> None:
    spectrum = Spectrum(torch.tensor([5.0, 3.0, 1.0, 0.5]).double(), 36.0, (9, 4), noise_floor=2.0)
    assert parse_rank_rule("auto")(spectrum) == 2


@pytest.mark.parametrize("name", [k.name for k in REGISTRY.values() if k.needs_all])
def test_rules_about_all_values_wait_for_them(name: str) -> None:
    text = f"{name}:0.5" if REGISTRY[name].argument else name
    partial = Spectrum(torch.tensor([3.0, 2.0, 1.0]).double(), 20.0, (10, 10))
    assert parse_rank_rule(text)(partial) is None
    assert parse_rank_rule(text).first_guess((10, 12)) == 10
    within = parse_rank_rule(text, RankLimits(most=3))
    assert within(partial) is None, "a largest rank bounds what the rule says of all values"
    assert within.first_guess((10, 12)) == 10
    assert within.likely((10, 12)) == 3


@pytest.mark.parametrize(
    "text", ["1234567", "energy:0.99999991", "energy:1", "error:1e-09", "absolute:2.5e+30", "auto"]
)
def test_a_rule_is_written_as_it_is_read(text: str) -> None:
    """Resumed work is recognised by it."""
    assert str(parse_rank_rule(text)) == text


def test_a_spectrum_cut_short_does_not_decide() -> None:
    cut = Spectrum(torch.tensor([2.0, 1.0], dtype=torch.float64), 10.0, (9, 9))
    assert parse_rank_rule("energy:0.9")(cut) is None
    assert parse_rank_rule("energy:0.4")(cut) == 1
    assert parse_rank_rule("3")(cut) is None
    assert parse_rank_rule("ratio:0.1")(cut) is None
    assert parse_rank_rule("energy:0.9", RankLimits(most=2))(cut) == 2


@given(
    st.integers(1, 40),
    st.integers(1, 10),
    st.integers(0, 30),
    st.integers(1, 8),
    st.integers(1, 50),
)
def test_limits(rank: int, least: int, room: int, multiple: int, side: int) -> None:
    most = least + room
    if not any(value % multiple == 0 for value in range(least, most + 1)):
        with pytest.raises(UsageError, match=f"is a multiple of {multiple}"):
            RankLimits(least, most, multiple)
        return
    limited = RankLimits(least, most, multiple).apply(rank, (side, side + 3))
    assert min(side, least) <= limited <= min(side, most)
    if limited < side:
        assert limited % multiple == 0
        assert limited >= rank or limited + multiple > most


def test_a_rank_below_what_was_asked_for_is_clamped() -> None:
    assert parse_rank_rule("9").clamps(8)
    assert not parse_rank_rule("9").clamps(9)
    assert parse_rank_rule("auto", RankLimits(least=9)).clamps(8)
    assert not parse_rank_rule("auto").clamps(1)


def test_limits_leave_nothing_as_nothing() -> None:
    assert RankLimits().apply(0, (5, 5)) == 0
    assert RankLimits(least=3).apply(0, (5, 5)) == 3


@pytest.mark.parametrize(
    "text", ["0", "-3", "2.5", "", "many", "energy", "energy:2", "full:3", "nan", "inf", "energy:x"]
)
def test_rules_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError):
        parse_rank_rule(text)


@pytest.mark.parametrize(("least", "most"), [(0, None), (1, 0), (5, 4)])
def test_limits_that_make_no_sense(least: int, most: int | None) -> None:
    with pytest.raises(UsageError):
        RankLimits(least, most)


def test_rules_print_as_they_are_typed() -> None:
    for text in ("16", "full", "energy:0.95", "error:0.1", "ratio:0.5", "auto", "knee"):
        assert str(parse_rank_rule(text)) == text
    assert all(kind.summary.endswith(".") or ")" in kind.summary for kind in REGISTRY.values())
