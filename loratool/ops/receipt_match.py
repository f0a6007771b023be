"""Whether the adapters somebody names are the ones that a receipt records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loratool.adapter import Adapter
from loratool.errors import DisagreementError, LoratoolError
from loratool.layouts.placing import PlacedUpdate
from loratool.ops.restoring import describe_updates
from loratool.plural import counted
from loratool.receipt import (
    RECEIPT_FILE,
    AdapterRecord,
    Receipt,
    UpdateRecord,
    hex_double,
    read_receipt,
    update_sha256,
)

Updates = Mapping[str, tuple[PlacedUpdate, ...]]
Given = tuple[Path, float, Adapter]


def given_as_recorded(
    receipt: Receipt,
    path: Path,
    given: Sequence[Given],
    placed: Updates,
    left_out: Sequence[str] = (),
) -> dict[str, tuple[PlacedUpdate, ...]]:
    """The updates that the receipt records, by tensor, in its order.

    given: the adapters, in the order that ``placed`` counts them by. Adapters may be given in any
    order, and may hold updates that were left out of the merge. left_out: those that --include and
    --exclude leave out now. Raises DisagreementError that names what differs.
    """
    if len(given) != len(receipt.adapters):
        raise DisagreementError(
            f"{path}: {counted(len(receipt.adapters), 'adapter was', 'adapters were')} merged, the "
            f"number given is {len(given)}",
            details=[_as_argument(adapter) for adapter in receipt.adapters],
        )
    chosen: dict[int, int] = {}
    for index, recorded in enumerate(receipt.adapters):
        ours = dict(_updates_of(receipt, index))
        free = [number for number in range(len(given)) if number not in chosen.values()]
        free.sort(key=lambda number: number != index)
        problems = {number: _difference(ours, placed, number) for number in free}
        fitting = [number for number in free if problems[number] is None]
        if not fitting:
            first = problems[free[0]]
            assert first is not None
            hint = f"{path} records what was"
            if left_out:
                hint += f"; --include and --exclude leave out {counted(len(left_out), 'update')}"
            raise DisagreementError(
                f"{given[free[0]][0]}: is not the adapter {recorded.name!r} that was merged: "
                f"{first}",
                hint=hint,
            )
        weight = hex_double(recorded.weight)
        same = [number for number in fitting if given[number][1] == weight]
        if not same:
            raise DisagreementError(
                f"{given[fitting[0]][0]}: was merged with weight {weight!r}, and is given with "
                f"{given[fitting[0]][1]!r}",
                hint=f"write it as {_as_argument(recorded)}",
            )
        chosen[index] = same[0]
    return {
        name: _of_tensor(placed.get(name, ()), record.updates, chosen)
        for name, record in receipt.tensors.items()
        if record.updates
    }


def _as_argument(adapter: AdapterRecord) -> str:
    weight = hex_double(adapter.weight)
    return adapter.name if weight == 1 else f"{adapter.name}:{weight!r}"


def _updates_of(receipt: Receipt, index: int) -> Iterator[tuple[str, list[UpdateRecord]]]:
    for name, record in receipt.tensors.items():
        mine = [update for update in record.updates if update.adapter == index]
        if mine:
            yield name, mine


def _difference(
    recorded: Mapping[str, Sequence[UpdateRecord]], placed: Updates, number: int
) -> str | None:
    """The first thing in which the given adapter ``number`` is not the recorded one."""
    for name, updates in recorded.items():
        found = _ours(placed.get(name, ()), updates, number)
        if len(found) != len(updates):
            return f"it has no update for {name}"
        for update, candidate in zip(updates, found, strict=True):
            (described,) = describe_updates([candidate])
            if described.scale != update.scale:
                theirs, ours = _number(update.scale), _number(described.scale)
                return f"{update.source} has the scale {ours}, was merged with {theirs}"
            if described.sha256 != update.sha256:
                return f"{update.source} holds other values"
    return None


def _ours(
    placed: Sequence[PlacedUpdate], recorded: Sequence[UpdateRecord], number: int
) -> list[PlacedUpdate]:
    """Of the given adapter ``number``, the updates that were merged into a tensor, in order."""
    sources = {update.source for update in recorded}
    return [update for update in placed if update.adapter == number and update.source in sources]


def _of_tensor(
    placed: Sequence[PlacedUpdate], recorded: Sequence[UpdateRecord], chosen: Mapping[int, int]
) -> tuple[PlacedUpdate, ...]:
    """One tensor's updates in the receipt's order and numbering."""
    found: list[PlacedUpdate] = []
    for index in dict.fromkeys(update.adapter for update in recorded):
        mine = [update for update in recorded if update.adapter == index]
        found += [replace(u, adapter=index) for u in _ours(placed, mine, chosen[index])]
    return tuple(found)


def _number(text: str) -> str:
    return f"{hex_double(text)!r}" if text else "none"


def receipt_beside(output: Path) -> Path:
    """Where the receipt of a merged checkpoint is found unless it was put elsewhere."""
    if output.is_dir() or output.suffix != ".safetensors":
        folder = output if output.is_dir() or not output.is_file() else output.parent
        return folder / RECEIPT_FILE
    return output.with_name(f"{output.stem}.{RECEIPT_FILE}")


def recorded_in(receipt: Path, adapter: Adapter) -> str | None:
    """The name under which a receipt records this adapter as merged in; None where it does not, or
    cannot be read."""
    try:
        found = read_receipt(receipt)
    except LoratoolError:
        return None
    hashes = {
        update.sha256: found.adapters[update.adapter].name
        for record in found.tensors.values()
        for update in record.updates
    }
    if not hashes:
        return None
    first = next(iter(adapter.updates.values()))
    return hashes.get(update_sha256(first))
