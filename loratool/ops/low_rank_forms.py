"""Adapters as sets of low-rank updates, for the commands that work on those."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace

from loratool.adapter import (
    Adapter,
    DenseUpdate,
    DoraUpdate,
    HadamardUpdate,
    KasaUpdate,
    KroneckerUpdate,
    Update,
)
from loratool.adapter.forms import form_rank, low_rank_form
from loratool.errors import UnsupportedInput
from loratool.plural import counted


def in_low_rank_form(adapter: Adapter) -> tuple[Adapter, list[str]]:
    """LoHa and LoKr updates replaced by the low-rank ones that they are, and notes about it.

    Those whose factors would be larger than the weight stay.
    """
    updates: dict[str, Update] = dict(adapter.updates)
    ranks: dict[str, list[int]] = defaultdict(list)
    for name, update in adapter.updates.items():
        if isinstance(update, HadamardUpdate | KroneckerUpdate):
            form = low_rank_form(update)
            if form is not None:
                updates[name] = form
                ranks["LoHa" if isinstance(update, HadamardUpdate) else "LoKr"].append(form.rank)
    notes = [
        f"{len(found)} {kind} updates are taken as the low-rank updates that they are, of rank "
        f"{_span(found)}"
        for kind, found in ranks.items()
    ]
    return replace(adapter, updates=updates), notes


def refuse_others(label: str, adapter: Adapter, also: Collection[type]) -> None:
    """Raises UnsupportedInput for updates that are neither low-rank, nor absolute values, nor of
    the kinds ``also``."""
    others = {n: u for n, u in adapter.others.items() if type(u) not in also}
    if others:
        raise UnsupportedInput(
            f"{label}: {counted(len(others), 'update is', 'updates are')} not low-rank: they can "
            "be merged, but this command cannot take them",
            details=[f"{name}: {_why(update)}" for name, update in list(others.items())[:12]],
            hint="leave them out with combine --exclude; or merge the adapter into its base "
            "(loratool merge) and extract a plain one from the result (loratool extract)",
        )


def _why(update: Update) -> str:
    text = update.describe()
    if isinstance(update, DoraUpdate | KasaUpdate):
        return f"{text}: what it changes depends on the weight of the base"
    if isinstance(update, HadamardUpdate | KroneckerUpdate):
        rows, columns = update.shape
        return f"{text}: its rank of {form_rank(update)} is too high for a {rows}×{columns} matrix"
    if isinstance(update, DenseUpdate):
        return f"{text}: no factors"
    return text


def _span(ranks: list[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"
