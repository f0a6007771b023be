"""An adapter into a checkpoint: the same files, with only the adapted tensors changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.algebra.budget import parse_size
from loratool.engine import Engine, NoProgress, Progress
from loratool.errors import UsageError
from loratool.layouts.placing import TieChoice
from loratool.ops.merge_inputs import Merging, check_base_copies, plan_merging
from loratool.ops.merge_jobs import NOTHING_MORE, WAITING, Asked
from loratool.ops.merge_layout import Layout, OutFile, lay_out
from loratool.ops.merge_receipt import likely_bytes, plan_receipt, receipt_left
from loratool.ops.merge_report import MergeReport, MergeRow
from loratool.ops.merge_resume import file_of, resume_key, split_done
from loratool.ops.merge_sides import SideFiles, find_side_files
from loratool.ops.merge_work import Work, list_work, run_job
from loratool.ops.sources import open_model
from loratool.storage.copying import link_file
from loratool.storage.disk import disk_errors
from loratool.storage.done_log import forget_done, read_done
from loratool.storage.dtypes import dtype_named
from loratool.storage.outputs import (
    FinishedWork,
    Staging,
    check_free_space,
    check_output,
    flushing,
    staged,
)
from loratool.storage.sharing import clone_file
from loratool.storage.writing import has_size, put_header

_DONE_LOG = "done.log"


@dataclass(frozen=True)
class MergePlan:
    """A merge into a new place, decided before a weight is read."""

    merging: Merging
    output: Path
    layout: Layout
    side_files: SideFiles
    link: bool
    receipt: Path | None
    overwrite: bool

    @property
    def writes_single_file(self) -> bool:
        """Whether the output is one file because the base was named as one."""
        return self.merging.base.checkpoint.is_single_file and self.output.suffix == ".safetensors"

    @property
    def output_bytes(self) -> int:
        return self.layout.size + self.side_files.size

    @property
    def written_bytes(self) -> int:
        """Room the output needs: hard links need none."""
        if not self.link:
            return self.output_bytes
        linked = sum(file.size for file in self.layout.files if self.is_untouched(file))
        return self.layout.size - linked + len(self.side_files.config or b"")

    def is_untouched(self, file: OutFile) -> bool:
        """Whether it is a file of the base, to the last byte."""
        updates = self.merging.updates
        return file.twin is not None and not any(t.name in updates for t in file.tensors)

    def to_json(self, workers: int) -> dict[str, Any]:
        return {
            "output_bytes": self.output_bytes,
            "written_bytes": self.written_bytes,
            "files": [file.name for file in self.layout.files],
            "side_files": self.side_files.names,
            "skipped_files": list(self.side_files.skipped),
            **self.merging.to_json(workers),
        }


def plan_merge(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    output: Path,
    *,
    scale: float = 1.0,
    alpha: float | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    max_shard_size: str | None = None,
    base_check: bool = False,
    add_bias: bool = False,
    ties: TieChoice = TieChoice.REFUSE,
    asked: Asked = NOTHING_MORE,
    allow_lossy: bool = False,
    link: bool = False,
    receipt: bool | Path = False,
    overwrite: bool = False,
) -> MergePlan:
    """Read headers and place every update of the adapters. Nothing is written.

    adapters: each with its weight; ``scale`` multiplies all of them. dtype: of every float tensor
    of the output. max_shard_size: new shards of at most that size ("5GB"). link: hard links
    instead of copies for files that stay as they are. receipt: leave one, in the output or at this
    path. The rest as in ``plan_merging``. Raises InputError, DisagreementError (an update that
    matches nothing, shapes that differ), UsageError or OutputError.
    """
    model = open_model(base)
    inputs = [path for path, _ in adapters]
    check_output(output, overwrite=overwrite, inputs=[*model.paths, *inputs])
    merging = plan_merging(
        model,
        adapters,
        scale=scale,
        alpha=alpha,
        device=device,
        include=include,
        exclude=exclude,
        base_check=base_check,
        add_bias=add_bias,
        ties=ties,
        asked=asked,
        grow=True,
        allow_lossy=allow_lossy,
    )
    wanted = dtype_named(dtype) if dtype is not None else None
    layout = lay_out(
        model.checkpoint,
        dtype=wanted,
        added=merging.added,
        grown=merging.placement.grown,
        max_shard_bytes=_bytes_of(max_shard_size),
    )
    side_files = find_side_files(
        model, wanted, untied=ties is TieChoice.APART, tokens=_tokens(merging)
    )
    path = plan_receipt(receipt, model, output, overwrite=overwrite, adapters=inputs)
    plan = MergePlan(merging, output, layout, side_files, link, path, overwrite)
    if plan.writes_single_file and len(layout.files) > 1:
        raise UsageError(
            f"{output}: is one file, --max-shard-size makes {len(layout.files)}",
            hint="name a folder after -o",
        )
    needed = likely_bytes(merging.changed_weights, len(model.checkpoint))[1] if path else 0
    check_free_space(output, plan.written_bytes + needed)
    return plan


def run_merge(
    plan: MergePlan, engine: Engine | None = None, progress: Progress | None = None
) -> MergeReport:
    """Do the work of a plan and publish the merged checkpoint.

    What a killed run of the same plan had finished is taken over. Raises NonFiniteValues and
    RangeOverflow naming the tensor, DisagreementError when the adapter carries a base embedding
    that is not the base's.
    """
    engine, progress = engine or Engine(), progress or NoProgress()
    check_base_copies(plan.merging)
    key = resume_key(plan.merging, plan.layout, plan.side_files.carried, plan.link)
    with staged(plan.output, key) as staging:
        rows = _write_weights(plan, staging, engine, progress)
        only_file = plan.layout.files[0].name if plan.writes_single_file else None
        if only_file is None:
            _write_beside(plan, staging.out)
        known = facts(plan)
        with receipt_left(
            plan.receipt,
            plan.merging,
            staging,
            [file.name for file in plan.layout.files],
            plan.layout.index[0] if plan.layout.index else None,
            overwrite=plan.overwrite,
            engine=engine,
            progress=progress,
        ) as left:
            report = MergeReport.of({**known, "receipt": left}, rows)
        staging.publish(overwrite=plan.overwrite, only_file=only_file)
        return report


def _tokens(merging: Merging) -> tuple[int, int] | None:
    """Sizes of the vocabulary before and after, where it grows."""
    stored = merging.base.checkpoint.tensors
    for name, rows in merging.placement.grown.items():
        return stored[merging.placement.untied.get(name, name)].rows, rows
    return None


def _bytes_of(size: str | None) -> int | None:
    if size is None:
        return None
    nbytes = parse_size(size, 1, 0)
    if not nbytes:
        raise UsageError(f"unknown size {size!r}", hint="write it as 5GB, 2GiB or 500MB")
    return nbytes


def facts(plan: MergePlan) -> dict[str, Any]:
    """What the report repeats of the plan."""
    known = plan.merging.facts()
    notes = [*known["notes"], *plan.side_files.notes]
    grown = dict(plan.merging.placement.grown)
    return {**known, "grown": grown, "skipped_files": list(plan.side_files.skipped), "notes": notes}


def _write_weights(
    plan: MergePlan, staging: Staging, engine: Engine, progress: Progress
) -> list[MergeRow]:
    merging = plan.merging
    log = staging.scratch / _DONE_LOG
    paths = {file.name: staging.out / file.name for file in plan.layout.files}
    intact = {file.name for file in plan.layout.files if has_size(paths[file.name], file.size)}
    recorded = read_done(log)
    # before the file is made anew: to the next run it would look like the one that was written
    forget_done(log, {job for job in recorded if file_of(job) not in intact})
    work: list[Work] = []
    growing = []
    for file in plan.layout.files:
        path = paths[file.name]
        if plan.is_untouched(file) and _taken_whole(plan, file, path):
            continue
        put_header(path, file.header, file.size)
        growing.append(path)
        work += list_work(file, path, merging)
    rows, left = split_done(work, recorded, intact)
    finished = FinishedWork(log)

    def run(item: Work) -> MergeRow | None:
        row = run_job(item.job)
        finished.add(item.key, row.stored() if row else None)
        return row

    with flushing(growing, finished):
        new = engine.map(
            run,
            left,
            cost=lambda item: item.job.cost,
            progress=progress,
            what="merging",
            waiting=WAITING,
        )
    return rows + [row for row in new if row is not None]


def _taken_whole(plan: MergePlan, file: OutFile, path: Path) -> bool:
    """Take a file of the base by a link or by sharing its blocks; False where it must be copied."""
    assert file.twin is not None
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if plan.link:
        path.unlink(missing_ok=True)
        link_file(file.twin, path)
        return True
    return not path.exists() and clone_file(file.twin, path)


def _write_beside(plan: MergePlan, folder: Path) -> None:
    if plan.layout.index is not None:
        name, content = plan.layout.index
        (folder / name).write_bytes(content)
    plan.side_files.write(folder, link=plan.link)
