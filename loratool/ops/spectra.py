"""What is said of a spectrum: of a change, an update, or a weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loratool.algebra.ranks import parse_rank_rule
from loratool.algebra.spectrum import Spectrum

SPECTRUM_VALUES = 32
"""How many leading singular values are resolved of a large matrix."""

SHARES = (0.9, 0.95, 0.99)
"""Of the energy, for which ranks and adapter sizes are stated."""


def rank_for(spectrum: Spectrum | None, share: float) -> int | None:
    """Smallest rank that keeps this share of ‖D‖², 0 of nothing; None where it was not resolved."""
    if spectrum is None or not spectrum.total_energy:
        return None if spectrum is None else 0
    return parse_rank_rule(f"energy:{share}")(spectrum)


def ranks_by_share(spectrum: Spectrum | None) -> dict[str, int | None]:
    """``rank_for`` by share, for documents."""
    return {f"{share:g}": rank_for(spectrum, share) for share in SHARES}


def factor_bytes(spectra: Iterable[tuple[Spectrum, int]], share: float) -> tuple[int, bool]:
    """Size of an adapter that keeps this share of each matrix's energy, and whether it is only a
    lower bound, because some rank lies beyond what was resolved.

    spectra: each with the bits of a stored value.
    """
    total, beyond = 0, False
    for spectrum, bits in spectra:
        rank = rank_for(spectrum, share)
        beyond |= rank is None
        least = len(spectrum.values) if rank is None else rank
        total += least * sum(spectrum.shape) * bits // 8
    return total, beyond


def sizes_by_share(spectra: Iterable[tuple[Spectrum, int]]) -> dict[str, Any] | None:
    """``factor_bytes`` by share, for documents; None without a spectrum."""
    known = list(spectra)
    if not known:
        return None
    sizes = {share: factor_bytes(known, share) for share in SHARES}
    return {
        f"{share:g}": {"bytes": size, "at_least": beyond} for share, (size, beyond) in sizes.items()
    }


def shape_figures(spectrum: Spectrum | None, *, complete: bool) -> dict[str, Any]:
    """Three counts of the directions that matter; the last two look at all values, and are None
    unless those are there."""
    known = spectrum if complete else None
    return {
        "stable_rank": spectrum.stable_rank() if spectrum else None,
        "effective_rank": known.effective_rank() if known else None,
        "participation_rank": known.participation_ratio() if known else None,
    }
