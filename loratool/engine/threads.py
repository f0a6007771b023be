"""Jobs on a pool of threads, each job on one BLAS thread.

One BLAS thread per job makes a job's bytes independent of how many jobs run beside it, and keeps
the pool from oversubscribing the cores. Reduced-precision float32 products (TF32, oneDNN's bf16
mode) are off while jobs run: error bounds elsewhere count on true float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


class Progress(Protocol):
    """Told how far a command is. Called from any thread."""

    def start(self, what: str, total: int) -> None:
        """A stage begins that consists of ``total`` bytes of work."""

    def advance(self, amount: int) -> None:
        """``amount`` bytes more are done."""

    def finish(self) -> None:
        """The stage is over."""


class NoProgress:
    """Says nothing."""

    def start(self, what: str, total: int) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def finish(self) -> None:
        pass


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Engine:
    """Runs jobs on ``workers`` threads (default: the cores this process may use)."""

    workers: int = field(default_factory=_usable_cores)

    def map(
        self,
        work: Callable[[Job], Result],
        jobs: Sequence[Job],
        *,
        cost: Callable[[Job], int],
        progress: Progress,
        what: str,
        waiting: int = 0,
        ahead: Callable[[Job], None] | None = None,
        urgent: Callable[[Job], bool] | None = None,
    ) -> list[Result]:
        """``work`` of every job, results in the jobs' order. The first error stops the rest.

        waiting: threads beyond the workers, for jobs that spend part of their time waiting for
        the disk. ahead: when a job starts, this is told the one that starts after all that are
        running; it should ask for that job's data without waiting, so that reading overlaps
        computing. urgent: jobs that start before all others. Apart from that expensive ones start
        first, so that the last core to finish is not alone for long.
        """
        costs = [cost(job) for job in jobs]
        progress.start(what, sum(costs))

        can_wait = [urgent is not None and not urgent(job) for job in jobs]
        order = sorted(range(len(jobs)), key=lambda index: (can_wait[index], -costs[index]))

        def timed(place: int) -> Result:
            later = place + self.workers + waiting
            if ahead is not None and later < len(order):
                ahead(jobs[order[later]])
            index = order[place]
            result = work(jobs[index])
            progress.advance(costs[index])
            return result

        try:
            with _exact_float32(), _pool(self.workers + waiting) as pool:
                futures = {index: pool.submit(timed, place) for place, index in enumerate(order)}
                try:
                    wait(futures.values(), return_when=FIRST_EXCEPTION)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                failed = [f for f in futures.values() if f.done() and f.exception() is not None]
                if failed:
                    pool.shutdown(wait=True, cancel_futures=True)
                    failed[0].result()
                return [futures[index].result() for index in range(len(jobs))]
        finally:
            progress.finish()


_HEAPED_BYTES = 2**25 - 2**16


def _keep_small_memory() -> None:
    """Have memory of up to 32 MB come from the heap, where it stays when it is freed.

    glibc asks the system for each piece above 128 KB and hands it back, page by page, until one of
    that size was freed once; so free one of the largest that it learns from. Elsewhere this does
    nothing, and nothing is written to it anywhere.
    """
    torch.empty(_HEAPED_BYTES, dtype=torch.uint8, device="cpu")


def _settle_thread() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)  # tiny weights are values like any other


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    before = torch.get_num_threads()
    _keep_small_memory()
    try:
        with ThreadPoolExecutor(workers, initializer=_settle_thread) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


@contextmanager
def _exact_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
