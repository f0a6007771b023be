"""Storing whole tensors while the others of an extraction are being factorised.

The tensors that are stored whole are compared first. Once it is known which of them changed, and
every rank is given, the adapter is foreseen: as if all that is left had changed. Its whole tensors
are copied from then on, until something turns out otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from loratool.errors import Unplaced
from loratool.formats import peft
from loratool.ops.adapter_folder import METADATA
from loratool.ops.extract_adapter import base_modules, build_adapter
from loratool.ops.extract_forecast import if_changed
from loratool.ops.extract_jobs import ExtractJob, ExtractResult, Treatment
from loratool.ops.extract_plan import ExtractPlan
from loratool.ops.extract_report import Status
from loratool.profiles import fit
from loratool.storage.early import EarlyFile
from loratool.storage.tensors import is_range

LEAST_BYTES = 64 * 2**20
"""Of whole tensors: writing fewer takes no time worth saving."""

_GIVEN = ("fixed", "full")
"""Rules whose rank does not depend on the values."""


class Foreseen:
    """Foresees an adapter and compares what becomes of the tensors with it.

    Its methods are for any thread. file: the adapter's, None where none was begun.
    """

    def __init__(self, plan: ExtractPlan, jobs: Sequence[ExtractJob], folder: Path):
        """Of a plan with these jobs, whose adapter is made in ``folder``."""
        self.file: EarlyFile | None = None
        self._plan, self._jobs, self._folder = plan, jobs, folder
        whole = [j for j in jobs if j.treatment in (Treatment.WHOLE, Treatment.NEW_ROWS)]
        worthwhile = sum(job.pair.whole.nbytes for job in whole) >= LEAST_BYTES
        begins = worthwhile and _is_foreseeable(plan, jobs)
        self._awaited = {job.index for job in whole} if begins else set()
        self._results: dict[int, ExtractResult] = {}
        self._expected: dict[int, Status] = {}
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """How long the copying took."""
        return 0.0 if self.file is None else self.file.seconds

    def awaits(self, job: ExtractJob) -> bool:
        """Whether nothing is foreseen before this job is done."""
        return job.index in self._awaited

    def see(self, job: ExtractJob, result: ExtractResult) -> None:
        """A job is done."""
        with self._lock:
            self._results[job.index] = result
            expected = self._expected.get(job.index)
            if self.file is not None and expected not in (None, result.row.status):
                self.file.give_up()
            is_last = self._awaited == {job.index}
            self._awaited.discard(job.index)
            if is_last:
                self._begin()

    def close(self) -> None:
        """Nothing is written any more."""
        with self._lock:
            self._awaited.clear()
        if self.file is not None:
            self.file.close()

    def _begin(self) -> None:
        left = {j.index: if_changed(j) for j in self._jobs if j.index not in self._results}
        guess = self._results | left
        self.file = _file(self._plan, [guess[job.index] for job in self._jobs], self._folder)
        statuses = {index: result.row.status for index, result in left.items()}
        self._expected = {i: s for i, s in statuses.items() if s is not Status.UNCHANGED}
        if self.file is not None:
            self.file.begin()


def _is_foreseeable(plan: ExtractPlan, jobs: Sequence[ExtractJob]) -> bool:
    factorised = [job for job in jobs if job.treatment is Treatment.LOW_RANK]
    return not plan.drop_rest and all(job.rule.kind.name in _GIVEN for job in factorised)


def _file(plan: ExtractPlan, results: Sequence[ExtractResult], folder: Path) -> EarlyFile | None:
    """The file of an adapter with these results, if enough of it can be copied."""
    task = plan.base.config.task_type
    try:
        adapter = build_adapter(plan.alignment, results, task_type=task, base_model=None)
        fitted = fit(adapter, plan.profile, "").adapter
        tensors, _ = peft.encode(fitted, base_modules(plan.alignment))
    except Unplaced:  # it will be found out by what did change
        return None
    if sum(tensor.nbytes for tensor in tensors.values() if is_range(tensor)) < LEAST_BYTES:
        return None
    return EarlyFile(folder / peft.WEIGHTS_FILE, tensors, METADATA)
