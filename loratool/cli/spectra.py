"""What views of spectra have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loratool.cli.output import Output, span
from loratool.report.text import size_text

SHARES = (0.9, 0.95, 0.99)


def show_sizes(
    out: Output,
    what: str,
    size_for: Callable[[float], tuple[int, bool]],
    ranks_for: Callable[[float], Sequence[int | None]],
) -> None:
    """How large an adapter is that keeps so much of each matrix's energy."""
    sizes = []
    for share in SHARES:
        size, beyond = size_for(share)
        asked = ranks_for(share)
        ranks = [rank for rank in asked if rank is not None]
        most = f"rank {span(ranks)}" if ranks else "ranks beyond those resolved"
        if ranks and len(ranks) < len(asked):
            most += f", {len(asked) - len(ranks):,} of {len(asked):,} beyond those resolved"
        sizes.append(
            f"{100 * share:.0f} %: {'at least ' if beyond else ''}{size_text(size)} ({most})"
        )
    out.line(f"an adapter that keeps this share of each {what}: {'; '.join(sizes)}")


def known_ranks(ranks: Sequence[int | None], resolved: int) -> str:
    """A span of ranks; ``>32`` where one lies beyond those resolved."""
    known = [rank for rank in ranks if rank is not None]
    if len(known) == len(ranks):
        return span(known)
    return f"{min(known):g}–>{resolved}" if known else f">{resolved}"
