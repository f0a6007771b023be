"""GPT-3 175B: all 96 layers by their headers, two of them with all their weights."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from loratool.layouts.architectures import parameters_of
from loratool.layouts.architectures.paper import NAMED
from loratool.layouts.config import ModelConfig
from loratool.layouts.placing import place
from loratool.ops.sources import open_adapter, open_model
from tests.builders import entry, lora_factors, write_peft, write_raw_safetensors
from tests.systems.conftest import Turn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
]

CONFIG = NAMED["gpt3-175b"]
WIDTH, RANK, ALPHA = 12288, 4, 8
MOST_MEMORY = 8 * 10**9
MOST_BY_HEADERS = 10**9
LAYERS_PER_FILE = 8
_RUN = """
import sys
from pathlib import Path
from loratool.cli.main import main
try:
    main(sys.argv[1:])
finally:
    status = Path("/proc/self/status").read_text()
    print(status.partition("VmHWM:")[2].split()[0], file=sys.stderr)
"""
"""VmHWM and not getrusage's figure, in which a child inherits what its parent had."""


def loratool(*arguments: object, most: float) -> dict[str, Any]:
    """A command in a process of its own, which may not need more memory than ``most`` bytes."""
    words = [sys.executable, "-c", _RUN, *map(str, arguments), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    peak = 1024 * int(done.stderr.splitlines()[-1])
    print(f"{arguments[0]}: {peak / 1e9:.2f} GB")
    assert peak <= most
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def sparse(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """Files with true headers and holes for data, some layers in each."""
    folder.mkdir()
    files: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        number = int(name.split(".")[2]) // LAYERS_PER_FILE if ".h." in name else 0
        header = files.setdefault(f"model-{number:05d}.safetensors", {})
        start = max((value["data_offsets"][1] for value in header.values()), default=0)
        header[name] = entry("F16", list(shape), start, start + 2 * math.prod(shape))
    for file, header in files.items():
        path = write_raw_safetensors(folder / file, header)
        size = max(value["data_offsets"][1] for value in header.values())
        os.truncate(path, path.stat().st_size + size)
    weight_map = {name: file for file, header in files.items() for name in header}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def adapter(folder: Path, layers: int) -> Path:
    tensors = {}
    for layer in range(layers):
        module = f"transformer.h.{layer}.attn.c_attn"
        tensors |= {
            name: value / WIDTH**0.5
            for name, value in lora_factors(module, 3 * WIDTH, WIDTH, RANK, seed=layer).items()
        }
    return write_peft(
        folder, tensors, lora_alpha=ALPHA, target_modules=["c_attn"], fan_in_fan_out=True
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """350 GB of holes."""
    folder = tmp_path_factory.mktemp("gpt3") / "base"
    return sparse(folder, parameters_of(ModelConfig(CONFIG)))


def test_gpt3_inspect(whole: Path) -> None:
    report = loratool("inspect", whole, most=MOST_BY_HEADERS)
    assert len(report["tensors"]) == 2 + 96 * 12 + 2
    assert report["parameters"] == pytest.approx(175e9, rel=0.005)
    assert report["bytes"] == 2 * report["parameters"]
    assert sum(file.stat().st_blocks * 512 for file in whole.iterdir()) < 2**22, "holes"


def test_gpt3_estimate(whole: Path) -> None:
    """Rank 4 on query and value as in the paper, from 96 layers of headers."""
    arguments = ("--rank", 4, "--targets", "query,value")
    report = loratool("estimate", whole, *arguments, most=MOST_BY_HEADERS)
    assert report["trained_parameters"] == 18_874_368
    assert report["model_bytes"] == pytest.approx(350e9, rel=0.01)
    assert report["adapter_bytes"]["float16"] == 36 * 2**20


def test_gpt3_init(whole: Path, tmp_path: Path) -> None:
    """An adapter to train all 96 layers from; no weight is read."""
    out = tmp_path / "start"
    arguments = ("-o", out, "--rank", RANK, "--targets", "c_attn")
    report = loratool("init", whole, *arguments, most=MOST_BY_HEADERS)
    assert report["totals"] == {"modules": 96, "parameters": 96 * RANK * 4 * WIDTH}


def test_gpt3_updates_find_their_tensors(whole: Path, tmp_path: Path) -> None:
    """All 96, each stored (in, out). Merging itself asks for 350 GB of free disk first."""
    made = adapter(tmp_path / "adapter", 96)
    model = open_model(whole)
    found = place([(open_adapter(made), 1.0)], model.checkpoint.tensors, model.config)
    names = {f"transformer.h.{layer}.attn.c_attn.weight" for layer in range(96)}
    assert set(found.updates) == names
    assert all(placed[0].transposed for placed in found.updates.values())
    assert not found.notes


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory, large_files: Turn) -> Iterator[Path]:
    """Two layers of full width and no embedding, of values around 0.02, about 7 GB."""
    folder = tmp_path_factory.mktemp("gpt3-layers")
    shapes = parameters_of(ModelConfig({**CONFIG, "n_layer": 2}))
    layers = {name: shape for name, shape in shapes.items() if ".h." in name}
    with large_files():
        base = sparse(folder / "base", layers)
        generator = torch.Generator().manual_seed(0)
        values = torch.empty(2**24, dtype=torch.float16).normal_(0, 0.02, generator=generator)
        assert bool(torch.isfinite(values).all())
        pattern = values.numpy().tobytes()
        for path in base.glob("*.safetensors"):
            size = path.stat().st_size
            with open(path, "r+b") as file:
                length = int.from_bytes(file.read(8), "little")
                file.seek(8 + length)
                left = size - 8 - length
                while left:
                    left -= file.write(pattern[: min(left, len(pattern))])
        yield base
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def made(two_layers: Path) -> Path:
    """An adapter on both layers."""
    return adapter(two_layers.parent / "adapter", 2)


@pytest.fixture(scope="module")
def merged(two_layers: Path, made: Path) -> Path:
    """The two layers and the adapter, merged with a receipt."""
    out = two_layers.parent / "merged"
    loratool("merge", two_layers, made, "-o", out, "--receipt", most=MOST_MEMORY)
    return out


# In this order: the last takes the base away, so that two copies of it are the most on disk.


def test_gpt3_two_layers_inspect(two_layers: Path) -> None:
    report = loratool("inspect", two_layers, most=MOST_BY_HEADERS)
    assert report["parameters"] == pytest.approx(2 * 12 * WIDTH**2, rel=0.001)


def test_gpt3_two_layers_amplification(two_layers: Path, made: Path) -> None:
    """The figures of the paper's table 7, of GPT-3's own width."""
    report = loratool("inspect", made, "--base", two_layers, most=MOST_MEMORY)
    assert len(report["updates"]) == 2
    row = report["updates"][1]
    weight = read(two_layers, row["name"])
    b, a = factors(made, row["name"].removesuffix(".weight"))
    u, v = torch.linalg.qr(b).Q, torch.linalg.qr(a.T).Q
    assert row["inside"] == pytest.approx(inside(weight, u, v), rel=1e-5)


def test_gpt3_two_layers_merge(two_layers: Path, made: Path, merged: Path) -> None:
    for layer in range(2):
        assert_merged(two_layers, merged, made, f"transformer.h.{layer}.attn.c_attn")


def test_gpt3_two_layers_verify(two_layers: Path, made: Path, merged: Path) -> None:
    against = ("--base", two_layers, "--adapter", made)
    assert loratool("verify", merged, *against, most=MOST_MEMORY)["verdict"] == "equal"


def test_gpt3_two_layers_extract(two_layers: Path, made: Path, merged: Path) -> None:
    out = two_layers.parent / "extracted"
    loratool("extract", two_layers, merged, "-o", out, "--rank", RANK, most=MOST_MEMORY)
    for layer in range(2):
        assert_found(out, made, f"transformer.h.{layer}.attn.c_attn")


def test_gpt3_two_layers_unmerge(two_layers: Path, made: Path, merged: Path) -> None:
    before = {path.name: digest(path) for path in two_layers.glob("*.safetensors")}
    shutil.rmtree(two_layers)
    back = two_layers.parent / "back"
    loratool("unmerge", merged, made, "-o", back, most=MOST_MEMORY)
    assert before == {path.name: digest(path) for path in back.glob("*.safetensors")}


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def inside(weight: Tensor, u: Tensor, v: Tensor) -> float:
    """‖Uᵀ·Wᵀ·V‖ of a weight stored (in, out), float64, some rows at a time."""
    total = torch.zeros(v.shape[1], u.shape[1], dtype=torch.float64)
    for start in range(0, weight.shape[0], 1024):
        rows = slice(start, start + 1024)
        total += v[rows].T @ (weight[rows].double() @ u)
    return float(total.norm())


def factors(folder: Path, module: str) -> tuple[Tensor, Tensor]:
    """B and A, float64."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        b, a = (
            file.get_tensor(f"base_model.model.{module}.lora_{side}.weight").double()
            for side in "BA"
        )
    return b, a


def product(folder: Path, module: str, columns: slice) -> Tensor:
    """s·B·A as (in, some of out), float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    b, a = factors(folder, module)
    return config["lora_alpha"] / config["r"] * (a.T @ b[columns].T)


def assert_merged(base: Path, merged: Path, made: Path, module: str) -> None:
    """Each of some columns' values is the half-precision number nearest to the exact one."""
    columns = slice(100, 36864, 1201)
    before, after = (read(folder, f"{module}.weight")[:, columns] for folder in (base, merged))
    exact = (before.double() + product(made, module, columns)).numpy()
    values = after.numpy()
    error = np.abs(values.astype(np.float64) - exact)
    for direction in (-np.inf, np.inf):
        other = np.nextafter(values, np.float16(direction)).astype(np.float64)
        assert bool((error <= np.abs(other - exact)).all())
    assert not torch.equal(before, after)


def assert_found(extracted: Path, made: Path, module: str) -> None:
    columns = slice(0, 36864, 97)
    found, expected = (product(folder, module, columns) for folder in (extracted, made))
    assert float((found - expected).norm() / expected.norm()) < 0.05


def read(folder: Path, name: str) -> Tensor:
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  (not a mapping)
                return file.get_tensor(name)
    raise AssertionError(name)
