"""What the change between two checkpoints amplifies in the base: Hu et al. (2022), §7.3.

The directions are those of the change's leading components, as an adapter would hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loratool.algebra.factorize import factorize
from loratool.algebra.ranks import RankLimits, parse_rank_rule
from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.layouts.pairs import Pair
from loratool.layouts.patterns import select
from loratool.ops.amplification import AmplificationReport, AmplificationRow, measured
from loratool.ops.intruders import linear_pairs, pair_matrix
from loratool.plural import counted

SHARE, MOST = 0.9, 64
"""r is the rank that keeps this share of a change's energy, at most so many."""


@dataclass(frozen=True)
class _Job:
    pair: Pair
    device: torch.device

    @property
    def cost(self) -> int:
        return self.pair.base.nbytes + self.pair.tuned.nbytes


def amplification_of_pair(
    base: Path,
    tuned: Path,
    *,
    only: Sequence[str] = (),
    device: str = "auto",
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> AmplificationReport:
    """Lay the leading part of every linear layer's change over the base's weight.

    only: globs over names. Raises InputError, DisagreementError, NothingMatches, UnsupportedInput
    and NonFiniteValues.
    """
    target = resolve_device(device)
    pairs, notes = linear_pairs(base, tuned)
    chosen = select(list(pairs), only, ())
    rows = (engine or Engine()).map(
        _measure,
        [_Job(pair, target) for name, pair in pairs.items() if name in chosen],
        cost=lambda job: job.cost,
        progress=progress or NoProgress(),
        what="measuring",
    )
    changed = tuple(row for row in rows if row is not None)
    unchanged = f"{counted(len(rows) - len(changed), 'weight')} did not change"
    rank = (
        f"ΔW stands for the leading r components of a change; r keeps {100 * SHARE:.0f} % of its "
        f"energy, or is {MOST}"
    )
    return AmplificationReport(
        tuned.resolve().name,
        base.resolve().name,
        str(target),
        changed,
        (rank, *notes, *([unchanged] if len(changed) < len(rows) else [])),
        of_pair=True,
    )


def _measure(job: _Job) -> AmplificationRow | None:
    pair = job.pair
    weight, tuned = (pair_matrix(pair, side, job.device) for side in (pair.base, pair.tuned))
    change = tuned - weight
    if not bool(change.any()):
        return None
    rule = parse_rank_rule(f"energy:{SHARE}", RankLimits(most=MOST))
    factors = factorize(change, rule, key=f"0:{pair.name}:change")
    return measured(pair.name, weight, factors.low_rank())
