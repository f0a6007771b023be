"""What the changes of many matrices say together: were they a LoRA's, are they lost in rounding?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class MatrixFindings(Protocol):
    """What is known of one factorised change.

    lora_rank: of the LoRA that explains it to within rounding, None if none does. lora_tail: the
    further change, as a share of ‖D‖, that would go unnoticed; None where the question cannot be
    decided. noise_share, near_noise: see algebra.noise.
    """

    @property
    def lora_rank(self) -> int | None: ...
    @property
    def lora_tail(self) -> float | None: ...
    @property
    def noise_share(self) -> float: ...
    @property
    def near_noise(self) -> bool: ...


def lora_summary(matrices: Sequence[MatrixFindings], looked_at: str) -> str | None:
    """Whether the change is a LoRA's, and of which rank; None without a matrix to ask.

    looked_at: the ranks that were looked at, in words, for the answer no.
    """
    if not matrices:
        return None
    asked = [row for row in matrices if row.lora_tail is not None]
    found = sorted({row.lora_rank for row in asked if row.lora_rank is not None})
    count = sum(row.lora_rank is not None for row in asked)
    undecided = len(matrices) - len(asked)
    if not asked:
        return "whether a LoRA made the change cannot be told: rounding hides it"
    tail = max(row.lora_tail or 0.0 for row in asked)
    unnoticed = f"a further change of {100 * tail:.2g} % of a matrix's would go unnoticed"
    ranks = f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}" if found else ""
    if not found:
        answer = f"the change is no LoRA's of {looked_at}: more than rounding is left ({unnoticed})"
    elif count == len(asked):
        answer = f"the change is a LoRA's of rank {ranks}, to within rounding ({unnoticed})"
    else:
        answer = (
            f"{count} of {len(asked)} matrices changed as by a LoRA of rank {ranks}, to within "
            f"rounding ({unnoticed}); the others by no LoRA of {looked_at}"
        )
    if undecided:
        answer += f"; for {undecided} matrices it cannot be told, since rounding hides their change"
    return answer


def noise_warning(matrices: Sequence[MatrixFindings]) -> str | None:
    """What to say where changes are so small that rounding hides part of them."""
    near = [row for row in matrices if row.near_noise]
    if not near:
        return None
    worst = max(row.noise_share for row in near)
    return (
        f"{len(near)} of {len(matrices)} matrices changed by little more than the rounding of "
        f"their stored values (up to {worst:.0%} of the change's norm is rounding): small "
        "components are lost in it, and singular values come out too low"
    )
