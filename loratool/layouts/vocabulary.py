"""Tokens that an adapter adds: which tables of the base they make longer."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.adapter import ModuleKind, Replacement, TokenRows, Update
from loratool.errors import DisagreementError
from loratool.layouts.kinds import Shapes, is_over_vocabulary


def grown_tables(
    updates: Mapping[str, Update], shapes: Shapes, kinds: Mapping[str, ModuleKind]
) -> dict[str, int]:
    """Rows that tables over the vocabulary must have for these updates, where the base has fewer.

    updates, shapes, kinds: by the base's names. Raises DisagreementError where the tables of one
    model would come to have different numbers of tokens, or BART's bias of logits too few.
    """
    tables = {name for name, kind in kinds.items() if is_over_vocabulary(name, kind)}
    grown = {
        name: rows
        for name, update in updates.items()
        if name in tables and (rows := _rows_needed(update, shapes[name])) > shapes[name][0]
    }
    if not grown:
        return {}
    before = {shapes[name][0] for name in grown}
    left = sorted(name for name in tables if shapes[name][0] in before and name not in grown)
    if left or len(before) > 1 or len(set(grown.values())) > 1:
        raise DisagreementError(
            "the adapter adds tokens to some tables of the base and not to others",
            details=[f"{name}: {shapes[name][0]} to {rows} rows" for name, rows in grown.items()]
            + [f"{name}: stays at {shapes[name][0]} rows" for name in left],
            hint="all tables over the vocabulary must grow alike",
        )
    size, rows = before.pop(), next(iter(grown.values()))
    beside = [name for name in shapes if name.endswith("final_logits_bias")]
    if any(shapes[name][-1] == size for name in beside):
        raise DisagreementError(
            f"the adapter adds tokens, and {beside[0]} of the base is no table that they are added "
            "to",
            hint=f"bring the base to {rows} tokens first (resize_token_embeddings({rows}), "
            "save_pretrained)",
        )
    return grown


def _rows_needed(update: Update, stored: tuple[int, ...]) -> int:
    """How many rows the update has values for, counting the base's own first ones."""
    if isinstance(update, Replacement) and update.shape[1:] == stored[1:]:
        return update.shape[0] if update.shape else 0
    if isinstance(update, TokenRows):
        rows = max(update.indices, default=-1) + 1
        if set(range(stored[0], rows)) <= set(update.indices):
            return rows
    return 0
