"""Storing whole tensors while the others of an extraction are still being factorised.

What the adapter will hold is foreseen where every rank is given. Its whole tensors are copied as
soon as the large ones are known to have changed, as long as it looks as if everything else had.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loratool.errors import Unplaced
from loratool.formats import peft
from loratool.ops.adapter_folder import METADATA
from loratool.ops.extract_adapter import base_modules
from loratool.ops.extract_forecast import if_changed, largest_adapter
from loratool.ops.extract_jobs import ExtractJob, ExtractResult, Treatment
from loratool.ops.extract_plan import ExtractPlan
from loratool.ops.extract_report import Status
from loratool.profiles import fit
from loratool.storage.early import EarlyFile

LEAST_BYTES = 64 * 2**20
"""Of whole tensors: writing fewer takes no time worth saving."""

_LARGE = 1 / 64
"""Of ``LEAST_BYTES``: tensors that are waited for. Small ones, such as norms, come last."""

_GIVEN = ("fixed", "full")
"""Rules whose rank does not depend on the values."""


class Foreseen:
    """Compares what becomes of the tensors with what was foreseen. Its methods are for any thread.

    file: the adapter's, None where nothing is foreseen.
    """

    def __init__(self, file: EarlyFile | None, expected: Sequence[tuple[ExtractJob, Status]]):
        self.file = file
        self._expected = {job.index: status for job, status in expected}
        self._awaited = {
            job.index
            for job, status in expected
            if status is Status.WHOLE and job.pair.whole.nbytes >= _LARGE * LEAST_BYTES
        }
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """How long the copying took."""
        return 0.0 if self.file is None else self.file.seconds

    def see(self, job: ExtractJob, result: ExtractResult) -> None:
        """A job is done."""
        if self.file is None:
            return
        if result.row.status is not self._expected[job.index]:
            self.file.give_up()
        with self._lock:
            is_last = self._awaited == {job.index}
            self._awaited.discard(job.index)
        if is_last:
            self.file.begin()


@contextmanager
def foreseen(plan: ExtractPlan, jobs: Sequence[ExtractJob], folder: Path) -> Iterator[Foreseen]:
    """Of a plan with these jobs, whose adapter is made in ``folder``."""
    file = _file(plan, jobs, folder)
    expected = [(job, if_changed(job, plan.drop_rest).row.status) for job in jobs if file]
    try:
        yield Foreseen(file, expected)
    finally:
        if file is not None:
            file.close()


def _file(plan: ExtractPlan, jobs: Sequence[ExtractJob], folder: Path) -> EarlyFile | None:
    whole = sum(job.pair.whole.nbytes for job in jobs if job.treatment is Treatment.WHOLE)
    if plan.drop_rest or whole < LEAST_BYTES:
        return None
    if any(job.rule.kind.name not in _GIVEN for job in jobs if job.treatment is Treatment.LOW_RANK):
        return None
    task = plan.base.config.task_type
    try:
        adapter = fit(
            largest_adapter(jobs, plan.alignment, task, drop_rest=False), plan.profile, ""
        )
        tensors, _ = peft.encode(adapter.adapter, base_modules(plan.alignment))
    except Unplaced:  # it will be found out by what did change
        return None
    return EarlyFile(folder / peft.WEIGHTS_FILE, tensors, METADATA)
