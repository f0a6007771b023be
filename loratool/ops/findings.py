"""What the changes of many matrices say together: were they a LoRA's, are they lost in rounding?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from loratool.plural import counted


class MatrixFindings(Protocol):
    """What is known of one factorised change.

    lora_rank, lora_least: of the LoRA that explains it to within rounding, at most and at least;
    None if none does, the former also if it lies beyond the ranks that were looked at. lora_tail:
    the further change, as a share of ‖D‖, that would go unnoticed; None where the question cannot
    be decided. noise_share, near_noise: see algebra.noise.
    """

    @property
    def lora_rank(self) -> int | None: ...
    @property
    def lora_least(self) -> int | None: ...
    @property
    def lora_tail(self) -> float | None: ...
    @property
    def noise_share(self) -> float: ...
    @property
    def near_noise(self) -> bool: ...


def lora_summary(matrices: Sequence[MatrixFindings], looked_at: str, others: int = 0) -> str | None:
    """Whether the change is a LoRA's, and of which rank; None without a matrix to ask.

    looked_at: the ranks that were looked at, in words, for the answer no. others: tensors that
    changed and were not asked, of which the answer yes says nothing.
    """
    if not matrices:
        return None
    asked = [row for row in matrices if row.lora_tail is not None]
    explained = [row for row in asked if row.lora_rank is not None]
    found = sorted({r for row in explained for r in (row.lora_least, row.lora_rank) if r})
    count = len(explained)
    beyond = [row.lora_least for row in asked if row.lora_rank is None and row.lora_least]
    undecided = len(matrices) - len(asked)
    if not asked:
        return "whether a LoRA made the change cannot be told: rounding hides it"
    tail = max(row.lora_tail or 0.0 for row in asked)
    unnoticed = f"a further change of {100 * tail:.2g} % of a matrix's would go unnoticed"
    ranks = f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}" if found else ""
    if not found and len(beyond) == len(asked):
        answer = f"the change may be a LoRA's of rank {min(beyond)} or more ({unnoticed})"
        beyond = []
    elif not found:
        answer = f"the change is no LoRA's of {looked_at}: more than rounding is left ({unnoticed})"
    elif count == len(asked):
        what = (
            f"the change of {counted(len(matrices), 'matrix', 'matrices')}"
            if others
            else "the change"
        )
        answer = f"{what} is a LoRA's of rank {ranks}, to within rounding ({unnoticed})"
        answer += f"; {counted(others, 'other tensor')} changed as well" if others else ""
    else:
        answer = (
            f"{count} of {len(asked)} matrices changed as by a LoRA of rank {ranks}, to within "
            f"rounding ({unnoticed}); the rest by no LoRA of {looked_at}"
        )
    if beyond:
        answer += f"; {len(beyond)} of the rest may be a LoRA's of rank {min(beyond)} or more"
    if undecided:
        of = counted(undecided, "matrix", "matrices")
        answer += f"; for {of} it cannot be told, since rounding hides the change"
    return answer


def nothing_changed(base: str, tuned: str, compared: int) -> str:
    """What to say of two checkpoints without a difference in the tensors that were compared."""
    if not compared:
        return f"{base} and {tuned}: no tensor was compared"
    return f"{base} and {tuned} hold the same values in {_every(compared)} compared"


def _every(tensors: int) -> str:
    return "the one tensor" if tensors == 1 else f"all {tensors:,} tensors"


def rounding_notes(matrices: Sequence[MatrixFindings]) -> list[str]:
    """What to say of the part that rounding has in these changes."""
    notes = (_lost_in_noise(matrices), _patterned(matrices))
    return [note for note in notes if note is not None]


def _lost_in_noise(matrices: Sequence[MatrixFindings]) -> str | None:
    """What to say where changes are so small that rounding hides part of them."""
    near = [row for row in matrices if row.near_noise]
    if not near:
        return None
    worst = max(row.noise_share for row in near)
    return (
        f"{len(near)} of {counted(len(matrices), 'matrix', 'matrices')} changed by little more "
        f"than the rounding of their stored values (up to {100 * worst:.0f} % of the change's norm "
        "is rounding): small components are lost in it, and singular values come out too low"
    )


def _patterned(matrices: Sequence[MatrixFindings]) -> str | None:
    """What to say where the rounding of a change may count as components of it."""
    ranges = [
        (row.lora_least, row.lora_rank)
        for row in matrices
        if row.lora_least is not None and row.lora_least != row.lora_rank
    ]
    if not ranges:
        return None
    least, most = ranges[0]
    return (
        f"of {len(ranges)} of {counted(len(matrices), 'matrix', 'matrices')} the rank is not "
        f"certain (the first: from {least} to {most or 'beyond those extracted'}): components "
        "about the noise floor may be the update's or a pattern that the rounding of few "
        "components follows; --rank auto counts those above it"
    )
