"""A merge is the same bytes whatever the linear algebra underneath, within the memory it states."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratool.ops.merge import plan_merge
from tests.conftest import REPOSITORY

ROWS, COLUMNS, RANK = 4096, 1024, 16
LAYERS = 6

MERGE = """
import sys
from pathlib import Path
import torch
{before}
from loratool.engine import Engine
from loratool.ops.merge import plan_merge, run_merge
folder = Path(sys.argv[1])
plan = plan_merge(folder / "base", [(folder / "adapter", 1.0)], Path(sys.argv[2]))
{around}
"""
RUN = "run_merge(plan, Engine(int(sys.argv[3])))"
WATCHED = """
import re, threading
def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
run_merge(plan, Engine(1))  # what libraries keep for themselves is there before
before, most, over = anonymous(), 0, threading.Event()
def watch():
    global most
    while not over.wait(0.001):
        most = max(most, anonymous())
thread = threading.Thread(target=watch)
thread.start()
again = plan_merge(folder / "base", [(folder / "adapter", 1.0)], Path(sys.argv[2] + "-again"))
run_merge(again, Engine(int(sys.argv[3])))
over.set()
thread.join()
print(most - before)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("anywhere"), torch.bfloat16)


def make_model(folder: Path, dtype: torch.dtype) -> Path:
    """A base of 25 million weights and a rank-16 adapter for it."""
    random = torch.Generator().manual_seed(0)
    base, factors = {}, {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.up_proj"
        weight = torch.randn(ROWS, COLUMNS, generator=random) * 0.02
        base[f"{name}.weight"] = weight.to(dtype)
        key = f"base_model.model.{name}"
        factors[f"{key}.lora_A.weight"] = torch.randn(RANK, COLUMNS, generator=random) * 1e-2
        factors[f"{key}.lora_B.weight"] = torch.randn(ROWS, RANK, generator=random) * 1e-2
    for part, tensors, file in (
        ("base", base, "model.safetensors"),
        ("adapter", factors, "adapter_model.safetensors"),
    ):
        (folder / part).mkdir()
        save_file(tensors, folder / part / file, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3 * RANK, "target_modules": ["up_proj"]}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    return folder


def merge(
    model: Path,
    output: Path,
    *,
    workers: int = 2,
    environment: dict[str, str] | None = None,
    before: str = "",
    around: str = RUN,
) -> str:
    """Merge in a process of its own; what it prints."""
    code = MERGE.format(before=before, around=around)
    done = subprocess.run(
        [sys.executable, "-c", code, model, output, str(workers)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


SETTINGS: dict[str, dict[str, object]] = {
    "one thread": {"workers": 1, "environment": {"OMP_NUM_THREADS": "1"}},
    "four threads": {"workers": 4, "environment": {"OMP_NUM_THREADS": "4"}},
    "no compiled pass": {"environment": {"LORATOOL_NO_COMPILED": "1"}},
    "the oldest instructions": {
        "environment": {
            "ATEN_CPU_CAPABILITY": "default",
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX",
        }
    },
    "reproducible branches": {"environment": {"MKL_CBWR": "COMPATIBLE"}},
    "tiny values flushed outside": {"before": "torch.set_flush_denormal(True)"},
    "reduced precision asked for outside": {
        "before": "torch.set_float32_matmul_precision('medium')"
    },
}


@pytest.fixture(scope="module")
def usual(model: Path) -> str:
    merge(model, model / "usual")
    return digest(model / "usual")


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_bytes(setting: str, usual: str, model: Path, tmp_path: Path) -> None:
    merge(model, tmp_path / "merged", **SETTINGS[setting])  # type: ignore[arg-type]
    assert digest(tmp_path / "merged") == usual


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("workers", "dtype"), [(1, torch.bfloat16), (3, torch.bfloat16), (1, torch.float32)]
)
def test_the_stated_memory_is_kept(workers: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(tmp_path, dtype)
    stated = plan_merge(model / "base", [(model / "adapter", 1.0)], tmp_path / "x").merging
    peaks = [
        int(merge(model, tmp_path / name, workers=workers, around=WATCHED, environment=environment))
        for name, environment in (("compiled", {}), ("plain", {"LORATOOL_NO_COMPILED": "1"}))
    ]
    assert 0.3 * stated.peak_bytes(workers) < max(peaks) <= stated.peak_bytes(workers)
