"""A merge into the base's own files, under a journal that can undo or finish it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapter import LowRankUpdate, Replacement
from loratool.engine import Engine, NoProgress, Progress
from loratool.errors import OutputError, UnsupportedInput, UsageError
from loratool.layouts.placed import TieChoice
from loratool.ops.merge_inputs import Merging, check_base_copies, plan_merging
from loratool.ops.merge_jobs import NOTHING_MORE, WAITING, Asked, MergeJob, merge_rows
from loratool.ops.merge_layout import OutTensor
from loratool.ops.merge_report import MergeReport, MergeRow
from loratool.ops.merge_resume import values_identity
from loratool.ops.merge_work import row_ranges
from loratool.ops.sources import Model, open_model
from loratool.provenance import loratool_version
from loratool.storage.checkpoint import Checkpoint
from loratool.storage.in_place import Block, Journal, undone_on_failure
from loratool.storage.outputs import check_free_space
from loratool.storage.tensors import TensorInfo

BLOCK_BYTES = 16 * 2**20
COMMAND = "merge --in-place"
_ELSE = "merge it into a new folder with -o"
_ROW_BY_ROW = (LowRankUpdate, Replacement)
"""Updates of which a row depends on that row of the base alone."""


@dataclass(frozen=True)
class InPlaceJob:
    """A block of a file and the rows of a tensor that lie in it."""

    block: Block
    rows: MergeJob

    @property
    def cost(self) -> int:
        return self.block.nbytes


@dataclass(frozen=True)
class InPlacePlan:
    """A merge into the base, decided before a weight is read. asked: the options, for a rerun."""

    merging: Merging
    jobs: tuple[InPlaceJob, ...]
    asked: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return self.merging.base.checkpoint.folder

    @property
    def files(self) -> list[str]:
        """Names of the files that change."""
        return sorted({job.block.file for job in self.jobs})

    @property
    def largest_block(self) -> int:
        return max((job.block.nbytes for job in self.jobs), default=0)

    def disk_at_least(self, workers: int) -> int:
        """Room for what is in between at any time, and for files that are links."""
        paths = [self.folder / name for name in self.files]
        linked = [path for path in paths if path.is_symlink() or path.stat().st_nlink > 1]
        own = sum(path.stat().st_size for path in linked)
        return own + (workers + WAITING + 1) * self.largest_block

    def disk_at_most(self, workers: int) -> int:
        """The same, and a journal in which nothing could be made small."""
        changed = sum(job.block.nbytes for job in self.jobs)
        return self.disk_at_least(workers) + changed + changed // 100

    def to_json(self, workers: int) -> dict[str, Any]:
        return {
            "in_place": True,
            "files": self.files,
            "disk_at_least": self.disk_at_least(workers),
            "disk_at_most": self.disk_at_most(workers),
            **self.merging.to_json(workers),
            "peak_bytes": self.peak_bytes(workers),
        }

    def peak_bytes(self, workers: int) -> int:
        """Working memory: as of any merge, and each block before and after."""
        return self.merging.peak_bytes(workers) + (workers + WAITING) * 2 * self.largest_block

    def identity(self) -> str:
        """What must be equal for a rerun to finish what was begun."""
        digest = hashlib.sha256(loratool_version().encode())
        for line in values_identity(self.merging):
            digest.update(line.encode())
        for job in self.jobs:
            digest.update(job.block.key.encode())
        return digest.hexdigest()


def plan_in_place(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    *,
    scale: float = 1.0,
    alpha: float | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    base_check: bool = False,
    ties: TieChoice = TieChoice.REFUSE,
    asked: Asked = NOTHING_MORE,
    allow_lossy: bool = False,
) -> InPlacePlan:
    """Read headers and place every update of the adapters. Nothing is written.

    Raises what ``plan_merge`` does, UnsupportedInput for files that cannot be changed in place
    (torch pickles, and shards in subfolders), and UsageError for what would change their sizes.
    """
    if ties is TieChoice.APART:
        raise UsageError("untying adds a tensor, for which files in place have no room", hint=_ELSE)
    model = open_model(base)
    _check_files(model.checkpoint)
    merging = plan_merging(
        model,
        adapters,
        scale=scale,
        alpha=alpha,
        device=device,
        include=include,
        exclude=exclude,
        base_check=base_check,
        ties=ties,
        asked=asked,
        grow=True,
        allow_lossy=allow_lossy,
    )
    for name, rows in merging.placement.grown.items():
        raise UsageError(
            f"{name}: would grow to {rows} tokens, for which files in place have no room",
            hint=_ELSE,
        )
    options = {
        "base": os.path.relpath(base, model.checkpoint.folder),
        "adapters": [[os.path.abspath(path), weight.hex()] for path, weight in adapters],
        "scale": scale.hex(),
        "alpha": None if alpha is None else alpha.hex(),
        "device": device,
        "include": list(include),
        "exclude": list(exclude),
        "ties": str(ties),
        "lost": asked.lost,
        "allow_overflow": asked.allow_overflow,
        "allow_lossy": allow_lossy,
    }
    return InPlacePlan(merging, tuple(_jobs(merging, model)), options)


def plan_again(folder: Path, asked: Mapping[str, Any]) -> InPlacePlan:
    """The plan that a journal in ``folder`` was made from; its owner calls this."""
    return plan_in_place(
        folder / asked["base"],
        [(Path(path), float.fromhex(weight)) for path, weight in asked["adapters"]],
        scale=float.fromhex(asked["scale"]),
        alpha=None if asked["alpha"] is None else float.fromhex(asked["alpha"]),
        device=asked["device"],
        include=asked["include"],
        exclude=asked["exclude"],
        ties=TieChoice(asked.get("ties", TieChoice.REFUSE)),
        asked=Asked(asked["lost"], asked["allow_overflow"]),
        allow_lossy=asked["allow_lossy"],
    )


def run_in_place(
    plan: InPlacePlan, engine: Engine | None = None, progress: Progress | None = None
) -> MergeReport:
    """Do the work of a plan. If anything fails, everything is put back.

    Raises what ``run_merge`` does; Unfinished or OutputError when a journal is there already.
    """
    engine, progress = engine or Engine(), progress or NoProgress()
    check_free_space(plan.folder, plan.disk_at_least(engine.workers))
    check_base_copies(plan.merging)
    facts = {"command": COMMAND, "asked": plan.asked, "identity": plan.identity()}
    blocks = {"blocks": len(plan.jobs), "bytes": sum(job.cost for job in plan.jobs)}
    journal = Journal.begin(plan.folder, plan.files, facts | blocks, plan.largest_block)
    with undone_on_failure(journal):
        for name in plan.files:
            journal.own(name)
        rows = change_blocks(plan, journal, engine, progress)
    journal.end()
    return MergeReport.of({**plan.merging.facts(), "in_place": True, "skipped_files": []}, rows)


def change_blocks(
    plan: InPlacePlan, journal: Journal, engine: Engine, progress: Progress
) -> list[MergeRow]:
    """Change every block that the journal does not know as done."""

    def change(job: InPlaceJob) -> MergeRow:
        return journal.change(job.block, lambda path, at: merge_rows(_reading(job, path, at)))

    return engine.map(
        change,
        [job for job in plan.jobs if not journal.is_done(job.block)],
        cost=lambda job: job.cost,
        progress=progress,
        what="merging in place",
        waiting=WAITING,
    )


def _reading(job: InPlaceJob, path: Path, at: int) -> MergeJob:
    """The job with its rows read from where the block's original bytes lie."""
    rows, source = job.rows, job.rows.source
    assert isinstance(source, TensorInfo)
    row_bytes = source.nbytes // max(1, source.rows)
    return replace(rows, source=replace(source, path=path, offset=at - rows.start * row_bytes))


def _jobs(merging: Merging, model: Model) -> list[InPlaceJob]:
    jobs = []
    for name, updates in merging.placement.updates.items():
        info = model.checkpoint.tensors[name]
        tensor = OutTensor(name, info, info.dtype, info.offset)
        by_rows = all(isinstance(update.update, _ROW_BY_ROW) for update in updates)
        row_bytes = info.nbytes // max(1, info.rows)
        for start, stop in row_ranges(tensor, BLOCK_BYTES if by_rows else info.nbytes):
            block = Block(
                info.path.name,
                info.offset + start * row_bytes,
                (stop - start) * row_bytes,
                info.dtype.bits // 8,
            )
            slot = tensor.slot(info.path)
            rows = MergeJob(
                info,
                updates,
                start,
                stop,
                slot,
                merging.device,
                merging.asked,
                merging.scaled.get(name),
            )
            jobs.append(InPlaceJob(block, rows))
    return jobs


def _check_files(checkpoint: Checkpoint) -> None:
    for file in checkpoint.files:
        if not file.is_safetensors:
            raise UnsupportedInput(
                f"{file.path}: is a torch pickle, which cannot be changed in place",
                hint=_ELSE,
            )
        if file.path.parent != checkpoint.folder:
            raise UnsupportedInput(
                f"{file.path}: lies in a subfolder of its checkpoint; in place works on one folder",
                hint=_ELSE,
            )
        if not os.access(checkpoint.folder, os.W_OK) or not os.access(file.path, os.W_OK):
            raise OutputError(f"{file.path}: may not be written")
