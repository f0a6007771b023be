"""What a user knows about an adapter and its file does not say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hints:
    """alpha: LoRA's alpha. fused_parts: which of the equal parts of a fused matrix are adapted, in
    their order; empty where nothing is known."""

    alpha: float | None = None
    fused_parts: tuple[bool, ...] = ()


NOTHING = Hints()
