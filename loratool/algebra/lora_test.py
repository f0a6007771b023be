"""Was this change made by a LoRA, and of which rank?

The smallest r is the answer for which the rest of D looks like rounding and nothing else:
σ_{r+1} is below the noise floor, and ‖D − D_r‖² is no more than the rounding's expected energy
less what r components can absorb of it, within a margin. Components that rise above the floor are
the update's, and absorb r·(m+n)/(m·n); those below may be the rounding's own largest, which are
(√m+√n)²/(m·n) each. An update's may be below as well, where a few rows or columns make the floor
high; so with them the answer is only that it may be a LoRA.

PEFT rounds the update to the weights' dtype before it adds it, which errs by half an ulp of each
entry of D at most. So much is allowed besides.

Rounding is a function of the change, entry by entry. Where entries differ much in size, as they do
in an update of rank below eight or so, that function of a matrix of rank r has further components
of its own, some above the noise floor: 7 to 27 of them for rank one at 4096², fewer for smaller
matrices and higher ranks. Their energy is within the rounding's. So the second condition alone
gives the least rank that explains the change, and both together the largest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loratool.algebra.noise import BIASED, NoiseFloor
from loratool.algebra.spectrum import Spectrum

MARGIN = 0.06
"""Of the rounding's energy. Measured: exact rank 8 lies 0.01–0.02 above the expectation, a tail of
5 % of the update 0.3 and more."""

ARITHMETIC = 1e-7
"""Of ‖D‖²: what float32 products may put into the energy of the rest, well above the 6e-9
measured. Matters for checkpoints in float32, whose rounding is smaller than that."""

MOSTLY_UNCHANGED = 0.6
"""Above this share of unchanged entries rounding hides an update that is not much larger: no
answer. (A larger one would have changed them: it lies in a few rows, or weights were pruned.)"""


@dataclass(frozen=True)
class LoraAnswer:
    """rank: of the LoRA that explains the change, None if none of the resolved ranks does for sure.

    tail: the largest further change, as a share of ‖D‖, that would have gone unnoticed. least: the
    rank from which on less is left than rounding's energy; below ``rank`` where what lies between
    may be a pattern of the rounding. None where no resolved rank explains the change.
    """

    rank: int | None
    tail: float
    least: int | None = None


def lora_rank(spectrum: Spectrum, noise: NoiseFloor, changed_share: float) -> LoraAnswer | None:
    """The answer for one matrix; None where the question cannot be decided.

    That is: without a rounding to compare with (noise energy zero), where the change is near the
    rounding and most entries did not change at all, or where all of it is no larger than that.
    """
    rows, columns = spectrum.shape
    if noise.energy == 0 or spectrum.total_energy == 0:
        return None
    near = noise.share_of(spectrum.total_energy) >= BIASED
    if near and changed_share < 1 - MOSTLY_UNCHANGED:
        return None
    if spectrum.total_energy <= noise.energy * (1 + MARGIN):
        return None
    unseen = (ARITHMETIC + noise.half_ulp**2) * spectrum.total_energy
    above = spectrum.above(noise.threshold).tolist()
    rest = (spectrum.total_energy - spectrum.values.square().cumsum(0)).tolist()
    strong, mean = sum(above), (rows + columns) / (rows * columns)
    most = (math.sqrt(rows) + math.sqrt(columns)) ** 2 / (rows * columns)
    hidden, least = MARGIN * noise.energy + unseen, None
    for rank in range(1, len(rest)):
        absorbed = min(rank, strong) * mean + max(0, rank - strong) * most
        left = noise.energy * (1 - absorbed + MARGIN) + unseen - rest[rank - 1]
        if left >= 0:
            least = least or rank
            if not above[rank]:
                certain = rank if least <= strong else None
                return LoraAnswer(certain, _share(max(left, hidden), spectrum), least)
    # with every value above the floor it is of full rank, whatever little the last ones hold
    return LoraAnswer(None, _share(hidden, spectrum), None if spectrum.is_complete else least)


def _share(energy: float, spectrum: Spectrum) -> float:
    return math.sqrt(energy / spectrum.total_energy)
