"""What must hold before an adapter is taken out of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from loratool.algebra.rounding import MERGEABLE
from loratool.errors import DisagreementError, UnsupportedInput
from loratool.layouts.placing import PlacedUpdate
from loratool.layouts.scales import ScaledBy
from loratool.ops.merge_sides import hashes_of
from loratool.ops.receipt_match import receipt_beside
from loratool.ops.restoring import all_additive, leading
from loratool.ops.sources import Model
from loratool.plural import counted
from loratool.receipt import FileRecord, Receipt


def find_receipt(model: Model, receipt: Path | None) -> Path | None:
    """The receipt that was named, or the one beside the merged checkpoint if there is one."""
    if receipt is not None:
        return receipt
    checkpoint = model.checkpoint
    usual = receipt_beside(checkpoint.path if checkpoint.is_single_file else checkpoint.folder)
    return usual if usual.is_file() else None


def files_as_merged(model: Model) -> tuple[FileRecord, ...]:
    """The base's files where no receipt describes them: those of the merge. Raises
    UnsupportedInput for torch pickles."""
    checkpoint = model.checkpoint
    if not all(file.is_safetensors for file in checkpoint.files):
        raise UnsupportedInput(
            f"{checkpoint.path}: holds torch pickles; merge writes safetensors, so it is no merge "
            "of loratool's",
        )
    return tuple(
        FileRecord(
            str(file.path.relative_to(checkpoint.folder)),
            file.raw_header or b"",
            file.path.stat().st_size,
        )
        for file in checkpoint.files
    )


def check_can_be_taken_off(updates: Mapping[str, tuple[PlacedUpdate, ...]]) -> None:
    """Raises DisagreementError for updates that only a receipt can undo."""
    lost = [name for name, placed in updates.items() if not all_additive(placed)]
    if lost:
        raise DisagreementError(
            f"{counted(len(lost), 'tensor')} cannot be restored without a receipt: the merge "
            "replaced their values, or scaled their rows by norms that are lost",
            details=lost[:12],
            hint="name the receipt with --receipt; merge --receipt leaves one",
        )


def check_dtypes(
    updates: Mapping[str, tuple[PlacedUpdate, ...]],
    scaled: Mapping[str, ScaledBy],
    model: Model,
    receipt: Receipt | None,
) -> None:
    """Raises UnsupportedInput for tensors in dtypes that no sum is taken off."""
    for name in updates:
        if name in scaled or (receipt and receipt.tensors[name].method == "keep"):
            continue
        dtype = model.checkpoint.tensors[name].dtype
        if dtype.torch not in MERGEABLE:
            raise UnsupportedInput(f"{name}: is stored as {dtype.name}, from which nothing can go")


def check_layout(receipt: Receipt, path: Path, model: Model) -> None:
    """Headers alone: every tensor that the receipt builds on is there in the right shape."""
    tensors = model.checkpoint.tensors
    for name, info in receipt.base_tensors(model.checkpoint.folder).items():
        record, merged = receipt.tensors[name], tensors.get(name)
        if record.method == "keep" and not record.merged_sha256:
            continue
        same = record.method == "same"
        fits = merged is not None and merged.shape == info.shape
        if record.method == "keep":  # of a table that got rows
            fits = leading(merged, info.shape) is not None
        if merged is None or not fits or (same and merged.dtype != info.dtype):
            has = f"{merged.dtype.name} {list(merged.shape)}" if merged else "no such tensor"
            raise DisagreementError(
                f"{path}: was made for a merge in which {name} is {list(info.shape)}; "
                f"{model.checkpoint.path} has {has}",
                hint="this receipt belongs to another merged checkpoint",
            )


def notes_on_files(
    receipt: Receipt | None, side_files: Sequence[Path], model: Model
) -> Iterator[str]:
    """Small files that are not what the merge left: they come along as they are now."""
    if receipt is None or receipt.kept is None or model.checkpoint.is_single_file:
        return
    found = hashes_of(side_files, model.checkpoint.folder)
    for name, sha256 in receipt.kept.items():
        if name not in found:
            yield f"{name}: the base had it, the merged folder has it no more"
        elif found[name] != sha256:
            yield f"{name}: was changed since the merge, and is not the base's"
    known = {*receipt.kept, *receipt.side_files}
    for name in found:
        if name not in known:
            yield f"{name}: came into the merged folder since the merge"
