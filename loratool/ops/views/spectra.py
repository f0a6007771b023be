"""What is said of spectra, as columns, cells and a table of a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loratool.algebra.spectrum import Spectrum
from loratool.ops.spectra import SHARES, rank_for, shape_figures
from loratool.report.page import Cell, Column, SmallTable, Unit
from loratool.report.text import size_text

SPECTRUM_COLUMNS = (
    *(
        Column(f"rank_{share:g}", f"rank for {100 * share:.0f} %", Unit.COUNT, about, True)
        for share in SHARES
        for about in [f"smallest rank that keeps {100 * share:.0f} % of the matrix's energy"]
    ),
    Column("stable_rank", "stable rank", Unit.NUMBER, "‖D‖² / σ₁²", True),
    Column("effective_rank", "effective rank", Unit.NUMBER, "exp of the entropy of σ/Σσ", True),
    Column("participation_rank", "participation", Unit.NUMBER, "(Σσ²)² / Σσ⁴", True),
)


def spectrum_cells(spectrum: Spectrum | None, *, complete: bool) -> dict[str, Cell]:
    """The cells of ``SPECTRUM_COLUMNS``. complete: no value beyond them differs from zero."""
    return {
        **{f"rank_{share:g}": rank_for(spectrum, share) for share in SHARES},
        **shape_figures(spectrum, complete=complete),
    }


def sizes_table(
    spectra: Sequence[Spectrum], adapter_bytes: Callable[[float], tuple[int, bool]]
) -> tuple[SmallTable, ...]:
    """Adapter sizes and ranks by the share of each matrix's energy that they keep."""
    if not spectra:
        return ()
    lines = []
    for share in SHARES:
        nbytes, beyond = adapter_bytes(share)
        ranks = [rank for one in spectra if (rank := rank_for(one, share)) is not None]
        found = [" to ".join(map(str, sorted({min(ranks), max(ranks)})))] if ranks else []
        if unknown := len(spectra) - len(ranks):
            found.append(f"{unknown:,} of {len(spectra):,} beyond those resolved")
        least = "at least " if beyond else ""
        lines.append((f"{100 * share:.0f} %", least + size_text(nbytes), "; ".join(found)))
    title = "An adapter that keeps this share of each matrix's energy"
    return (SmallTable(title, ("share", "size", "ranks"), tuple(lines)),)
