"""The form of a profile."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a consumer accepts.

    one_rank: a single rank and scale for all modules. ranks: the ranks it knows, ascending; None
    for any. whole_modules, biases, embeddings, experts, convolutions, other_kinds (DoRA, LoHa,
    trained tokens …): whether it takes those. refused_modules: last name components that it takes
    no update of. serve: advice, with {rank} for the rank.
    """

    one_rank: bool = False
    ranks: tuple[int, ...] | None = None
    whole_modules: bool = True
    biases: bool = True
    embeddings: bool = True
    experts: bool = True
    convolutions: bool = True
    other_kinds: bool = True
    refused_modules: frozenset[str] = frozenset()
    serve: str = ""
