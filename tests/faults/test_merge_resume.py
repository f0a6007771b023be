"""A killed merge goes on where it was, and ends in the bytes of an undisturbed one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

import loratool as lt
from loratool.ops import merge as merge_op
from loratool.ops import merge_work
from loratool.storage import outputs
from loratool.storage.done_log import append_done, read_done
from tests.builders import snapshot
from tests.ops.builders import LLAMA, llama_like, save_folder, save_peft
from tests.ops.test_merge import factors

QS = [f"model.layers.{i}.self_attn.q_proj" for i in range(12)]


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    base = save_folder(llama_like(layers=12), tmp_path / "base", LLAMA, shards=3)
    (base / "tokenizer.json").write_text("{}")
    adapter = save_peft(tmp_path / "adapter", {q: factors(24, 24, seed=4) for q in QS})
    monkeypatch.setattr(merge_work, "JOB_BYTES", 2000)
    monkeypatch.setattr(outputs, "_FLUSH_SECONDS", 0.0)
    return base, adapter


def interrupt_after(count: int, inputs: tuple[Path, Path], out: Path, **options: Any) -> list[str]:
    """Run a merge that is interrupted after ``count`` jobs are recorded; all it began."""
    begun: list[str] = []
    recorded: list[str] = []
    run, append = merge_op.run_job, outputs.append_done

    def record(log: Path, jobs: dict[str, Any]) -> None:
        append(log, jobs)
        recorded.extend(jobs)

    def job(job: merge_work.Job) -> Any:
        if len(recorded) >= count:
            raise KeyboardInterrupt
        begun.append(f"{job.slot.path.name}@{job.slot.offset}+{getattr(job, 'start', 0)}")
        result = run(job)
        while len(recorded) < count and len(recorded) < len(begun) - 1:
            time.sleep(0.001)  # the flusher is behind
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_op, "WAITING", 0)
        patch.setattr(merge_op, "run_job", job)
        patch.setattr(outputs, "append_done", record)
        with pytest.raises(KeyboardInterrupt) as ended:
            lt.merge(*inputs, out, jobs=1, **options)
    assert "goes on" in "".join(ended.value.__notes__)
    return recorded


def jobs_of(inputs: tuple[Path, Path], out: Path, **options: Any) -> list[str]:
    """Run a merge to its end; the jobs it did."""
    done: list[str] = []
    run = merge_op.run_job

    def job(job: merge_work.Job) -> Any:
        done.append(f"{job.slot.path.name}@{job.slot.offset}+{getattr(job, 'start', 0)}")
        return run(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_op, "run_job", job)
        lt.merge(*inputs, out, jobs=1, **options)
    return done


def leftovers(folder: Path) -> list[Path]:
    return sorted(folder.glob(".out.loratool-partial-*"))


def test_finished_parts_are_not_done_again(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    everything = jobs_of(inputs, tmp_path / "whole")
    before = snapshot(inputs[0])
    first = interrupt_after(12, inputs, out)
    assert len(leftovers(tmp_path)) == 1
    second = jobs_of(inputs, out)
    assert sorted(first + second) == sorted(everything)
    assert snapshot(out) == snapshot(tmp_path / "whole")
    assert snapshot(inputs[0]) == before
    assert leftovers(tmp_path) == []


def test_the_report_counts_what_was_done_before(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    whole = lt.merge(*inputs, tmp_path / "whole")
    interrupt_after(12, inputs, tmp_path / "out")
    assert lt.merge(*inputs, tmp_path / "out").rows == whole.rows


@pytest.mark.parametrize("change", ["option", "adapter", "base", "data"])
def test_what_does_not_fit_is_done_afresh(
    inputs: tuple[Path, Path], tmp_path: Path, change: str
) -> None:
    base, adapter = inputs
    out, options = tmp_path / "out", {}
    interrupt_after(12, inputs, out)
    if change == "option":
        options = {"scale": 0.5}
    elif change == "data":  # as after a crash of the disk: the log is there, the file is not
        (left,) = leftovers(tmp_path)
        for file in (left / "out").glob("*.safetensors"):
            file.write_bytes(b"")
    else:
        touched = base / "config.json" if change == "base" else adapter / "adapter_config.json"
        os.utime(touched, ns=(1, 1))
    done = jobs_of(inputs, out, **options)
    assert sorted(done) == sorted(jobs_of(inputs, tmp_path / "whole", **options))
    assert snapshot(out) == snapshot(tmp_path / "whole")
    assert leftovers(tmp_path) == []


def test_links_survive_a_resumed_merge(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    before = snapshot(inputs[0])
    interrupt_after(12, inputs, tmp_path / "out", link=True)
    lt.merge(*inputs, tmp_path / "out", link=True)
    lt.merge(*inputs, tmp_path / "whole")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert snapshot(inputs[0]) == before


def test_a_line_cut_short_is_no_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert read_done(log) == {}
    append_done(log, {"a": 1, "b": [2]})
    whole = log.read_bytes()
    for length in range(len(whole)):
        log.write_bytes(whole[:length])
        append_done(log, {"c": None})
        found = read_done(log)
        assert found.pop("c", 0) is None
        assert found in ({}, {"a": 1}, {"a": 1, "b": [2]})


def test_a_replaced_output_is_given_back(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed between publish's two renames, the old output lies aside; the next run returns it."""
    out = tmp_path / "out"
    lt.merge(*inputs, out)
    before = snapshot(out)
    interrupt_after(12, inputs, out, scale=0.5, overwrite=True)
    (left,) = leftovers(tmp_path)
    out.rename(left / "replaced")
    with pytest.raises(KeyboardInterrupt), outputs.staged(out):
        raise KeyboardInterrupt
    assert snapshot(out) == before
