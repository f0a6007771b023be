"""Jobs run in any number of threads, results in order, the first error stopping the rest."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from loratool.engine import Engine, NoProgress
from loratool.engine.devices import resolve_device
from loratool.errors import UsageError


class Counting(NoProgress):
    def __init__(self) -> None:
        self.total = self.done = 0
        self.lock = threading.Lock()

    def start(self, what: str, total: int) -> None:
        self.total = total

    def advance(self, amount: int) -> None:
        with self.lock:
            self.done += amount


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_keep_the_jobs_order(workers: int) -> None:
    progress = Counting()
    jobs = list(range(40))
    results = Engine(workers).map(
        lambda job: job * job, jobs, cost=lambda job: job, progress=progress, what="squares"
    )
    assert results == [job * job for job in jobs]
    assert progress.done == progress.total == sum(jobs)


def test_the_first_error_stops_the_rest() -> None:
    ran = []

    def work(job: int) -> None:
        ran.append(job)
        if job == 99:
            raise ValueError("the largest job, so the first")
        time.sleep(0.01)

    with pytest.raises(ValueError, match="largest"):
        Engine(2).map(
            work, list(range(100)), cost=lambda job: job, progress=NoProgress(), what="jobs"
        )
    assert len(ran) < 20


def test_expensive_jobs_start_first() -> None:
    order: list[int] = []
    Engine(1).map(order.append, [1, 9, 4], cost=lambda job: job, progress=NoProgress(), what="x")
    assert order == [9, 4, 1]


def test_urgent_jobs_start_before_all_others() -> None:
    order: list[int] = []
    Engine(1).map(
        order.append,
        [1, 9, 4, 2],
        cost=lambda job: job,
        progress=NoProgress(),
        what="x",
        urgent=lambda job: job < 3,
    )
    assert order == [2, 1, 9, 4]


def test_one_blas_thread_per_job_and_settings_restored() -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        seen = Engine(2).map(
            lambda _: (torch.get_num_threads(), torch.get_float32_matmul_precision()),
            [1, 2, 3],
            cost=lambda _: 1,
            progress=NoProgress(),
            what="x",
        )
        assert set(seen) == {(1, "highest")}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before[1])
    assert torch.get_num_threads() == before[0]


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    for text in ("gpu", "cuda:x", "cpu:0", ""):
        with pytest.raises(UsageError):
            resolve_device(text)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            resolve_device("cuda")


@pytest.mark.parametrize(("workers", "waiting"), [(1, 0), (2, 0), (2, 1)])
def test_the_job_after_those_that_run_is_announced_first(workers: int, waiting: int) -> None:
    order: list[tuple[str, int]] = []
    lock = threading.Lock()
    in_step = threading.Barrier(workers + waiting)

    def note(what: str, job: int) -> None:
        with lock:
            order.append((what, job))

    def work(job: int) -> None:
        in_step.wait()
        note("work", job)
        in_step.wait()

    jobs = list(range(6, 0, -1))
    Engine(workers).map(
        work,
        jobs,
        cost=lambda job: job,
        progress=NoProgress(),
        what="x",
        waiting=waiting,
        ahead=lambda job: note("ahead", job),
    )
    announced = [job for what, job in order if what == "ahead"]
    assert sorted(announced, reverse=True) == jobs[workers + waiting :]
    assert all(order.index(("ahead", job)) < order.index(("work", job)) for job in announced)
