"""Trained tokens: rows of an embedding that adapters store with absolute values.

Rows that one adapter alone has trained, or several to equal values, are kept. Tokens that collide
are decided as parameters stored whole are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.adapter import Adapter, TokenRows
from loratool.errors import DisagreementError, ShapeMismatch
from loratool.ops.combine_saved import Saved, weighted_mean
from loratool.ops.combine_weights import Source
from loratool.plural import counted
from loratool.storage.tensors import MemoryTensor


@dataclass(frozen=True)
class _Row:
    """One token's values in one adapter."""

    label: str
    weight: float
    values: Tensor


def combine_tokens(
    sources: Sequence[Source], adapters: Sequence[Adapter], saved: Saved
) -> tuple[dict[str, TokenRows], list[str]]:
    """The trained tokens of all adapters, by table, and what there is to say about them.

    Raises DisagreementError for tokens that collide, ShapeMismatch for rows of different lengths.
    """
    tables: dict[str, dict[int, list[_Row]]] = {}
    for source, adapter in zip(sources, adapters, strict=True):
        for name, update in adapter.others.items():
            if isinstance(update, TokenRows):
                values = update.value.read()
                for place, index in enumerate(update.indices):
                    row = _Row(source.label, source.weight, values[place])
                    tables.setdefault(name, {}).setdefault(index, []).append(row)
    if not tables:
        return {}, []
    if saved is Saved.DROP:
        return {}, [f"the trained tokens of {counted(len(tables), 'table')} were dropped, as asked"]
    combined = {name: _table(name, rows, saved) for name, rows in tables.items()}
    count = sum(len(rows.indices) for rows in combined.values())
    return combined, [
        f"kept as in their adapter, without weights: {counted(count, 'trained token')}"
    ]


def _table(name: str, rows: dict[int, list[_Row]], saved: Saved) -> TokenRows:
    widths = {len(row.values) for found in rows.values() for row in found}
    if len(widths) > 1:
        raise ShapeMismatch(f"{name}: trained tokens have {sorted(widths)} values in the adapters")
    collisions = {
        index: found
        for index, found in rows.items()
        if any(not torch.equal(row.values.double(), found[0].values.double()) for row in found)
    }
    if collisions and saved is Saved.REFUSE:
        raise DisagreementError(
            f"{name}: {counted(len(collisions), 'token was', 'tokens were')} trained to different "
            "values",
            details=[
                f"token {index}: in {', '.join(row.label for row in found)}"
                for index, found in list(collisions.items())[:12]
            ],
            hint="absolute values do not add up; choose --saved mean, first or drop",
        )
    indices = tuple(sorted(rows))
    values = [_values(name, rows[index], saved) for index in indices]
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    return TokenRows(indices, MemoryTensor(torch.stack([value.to(dtype) for value in values])))


def _values(name: str, found: list[_Row], saved: Saved) -> Tensor:
    if saved is not Saved.MEAN or len(found) == 1:
        return found[0].values
    stored = [MemoryTensor(row.values) for row in found]
    return weighted_mean(name, stored, [row.weight for row in found]).read()
