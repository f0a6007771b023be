"""How deep inspect looks: what each level reads and finds."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.errors import NonFiniteValues, NothingMatches, UsageError
from loratool.ops.inspect import AdapterReport, CheckpointReport, PairReport
from tests.ops.builders import LLAMA, llama_like, moved, save_folder, save_peft

READ_SO_FAR = Path("/proc/self/io")
OF_THE_MEASUREMENT = 1_000
"""Bytes that looking at ``READ_SO_FAR`` reads itself, and then some."""
NAME = "model.layers.0.mlp.up_proj.weight"


def bytes_read() -> int:
    return int(READ_SO_FAR.read_text().split("rchar: ")[1].split()[0])


def checkpoint(path: Path, **options: object) -> CheckpointReport:
    report = lt.inspect(path, **options)  # type: ignore[arg-type]
    assert isinstance(report, CheckpointReport)
    return report


# Values --------------------------------------------------------------------------------------


def test_values_of_a_checkpoint(tmp_path: Path) -> None:
    state = llama_like(torch.bfloat16)
    up = state[NAME]
    up[3, 4], up[3, 5], up[6], up[1, 1] = math.nan, math.inf, 0.0, torch.finfo(up.dtype).max
    state["model.layers.1.mlp.up_proj.weight"] *= 0
    state["model.layers.1.mlp.down_proj.weight"] = state["model.layers.0.mlp.down_proj.weight"]
    state["model.norm.weight"].fill_(1.0)
    state["model.layers.1.input_layernorm.weight"].fill_(1.0)
    save_folder({k: v.clone() for k, v in state.items()}, tmp_path / "m", LLAMA)
    report = checkpoint(tmp_path / "m", level="values")
    found = {row.name: row.findings() for row in report.values if row.findings()}
    assert found.pop("model.layers.1.mlp.up_proj.weight") == ["all zero"]
    assert found.pop(NAME)[:4] == ["1 NaN", "1 infinite", "1 saturated", "1 of 40 rows zero"]
    assert found == {}
    assert report.equal == (
        ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"),
    ), "tensors of ones are not a replicated layer"
    document = report.to_json()
    row = next(row for row in document["values"] if row["name"] == NAME)
    assert (row["nan"], row["infinite"], row["saturated"], row["zero_rows"]) == (1, 1, 1, 1)
    assert row["largest_at"] == [1, 1]
    json.dumps(document, allow_nan=False)


def test_dtypes_that_can_only_be_copied_are_named(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\1\2\3\4")
    (row,) = checkpoint(path, level="values").values
    assert row.findings() == ["not read: F8_E8M0"]


def test_tensors_of_every_shape(tmp_path: Path) -> None:
    """Scalars, empty ones, kernels: none is an error, and empty ones are not repeated layers."""
    kernel = torch.zeros(4, 3, 2, 2)
    kernel[1, 2, 0, 1] = -5.0
    state = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "empty too": torch.zeros(0, 3),
        "nothing": torch.zeros(0),
        "kernel": kernel,
        "counts": torch.arange(5),
    }
    save_file(state, tmp_path / "x.safetensors")
    report = checkpoint(tmp_path / "x.safetensors", level="values")
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    largest = {row["name"]: row.get("largest_at") for row in document["values"]}
    assert largest["kernel"] == [1, 2, 0, 1]
    assert largest["scalar"] == []
    assert largest["empty"] is None
    assert report.equal == ()


def test_quantised_checkpoints_are_named(tmp_path: Path) -> None:
    save_file({"a.qweight": torch.ones(2, dtype=torch.int32)}, tmp_path / "q.safetensors")
    assert checkpoint(tmp_path / "q.safetensors").quantised == "GPTQ or AWQ"
    config = LLAMA | {"quantization_config": {"quant_method": "fp8"}}
    assert checkpoint(save_folder(llama_like(), tmp_path / "m", config)).quantised == "fp8"
    assert checkpoint(save_folder(llama_like(), tmp_path / "n", LLAMA)).quantised is None


def test_values_of_an_adapter(tmp_path: Path) -> None:
    a, b = torch.randn(4, 24), torch.randn(24, 4)
    modules = {
        f"model.layers.{layer}.self_attn.q_proj": (a.clone(), b.clone()) for layer in range(2)
    }
    modules["model.layers.2.self_attn.q_proj"] = (torch.randn(4, 24), torch.zeros(24, 4))
    report = lt.inspect(save_peft(tmp_path / "a", modules), level="values")
    assert isinstance(report, AdapterReport)
    assert report.zero_b == ("model.layers.2.self_attn.q_proj.weight",)
    assert [row.norm for row in report.rows] == [None] * 3
    first, second = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2))
    assert set(report.equal) == {(f"{first} {p}", f"{second} {p}") for p in "AB"}


def test_spectra_of_a_checkpoint(tmp_path: Path) -> None:
    """Against torch's full decomposition in float64; stored (in, out), kernels, and a large one."""
    state = llama_like(torch.bfloat16)
    state["model.embed_tokens.weight"] = torch.randn(900, 700).bfloat16()
    base = save_folder(state, tmp_path / "m", LLAMA)
    report = checkpoint(base, level="spectra")
    matrices = {name for name, value in state.items() if value.ndim == 2}
    assert {row.name for row in report.weights} == matrices
    for row in report.weights:
        values = torch.linalg.svdvals(state[row.name].double())
        energy = values.square().cumsum(0) / values.square().sum()
        resolved = len(row.spectrum.values)
        assert resolved == (32 if min(row.shape) > 512 else min(row.shape))
        assert torch.allclose(row.spectrum.values, values[:resolved], rtol=1e-2)
        assert row.spectral_norm == pytest.approx(float(values[0]), rel=1e-3)
        assert row.spectrum.norm == pytest.approx(float(values.norm()), rel=1e-6)
        stable = float(values.square().sum() / values[0] ** 2)
        assert row.to_json()["stable_rank"] == pytest.approx(stable, rel=3e-3)
        if resolved < min(row.shape):
            assert row.rank_for(0.9) is None
        else:
            assert row.rank_for(0.9) == int((energy < 0.9).sum()) + 1
    (whole,) = checkpoint(base, level="spectra", exact=True, only=["embed_tokens"]).weights
    assert len(whole.spectrum.values) == 700
    state["lm_head.weight"][0, 0] = math.nan
    broken = save_folder(state, tmp_path / "broken", LLAMA)
    with pytest.raises(NonFiniteValues, match="lm_head"):
        checkpoint(broken, level="spectra")


# Pairs ---------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    state = llama_like(torch.bfloat16)
    base = save_folder(state, tmp_path / "base", LLAMA)
    return base, save_folder(moved(state, size=0.05), tmp_path / "tuned", LLAMA)


def pair_report(base: Path, tuned: Path, **options: object) -> PairReport:
    report = lt.inspect(base, tuned, **options)  # type: ignore[arg-type]
    assert isinstance(report, PairReport)
    return report


def test_figures_of_a_pair(pair: tuple[Path, Path]) -> None:
    """Against numpy's decomposition in float64."""
    states = [load_file(folder / "model.safetensors") for folder in pair]
    for row in pair_report(*pair).matrices:
        delta = states[1][row.name].double() - states[0][row.name].double()
        values = torch.linalg.svdvals(delta)
        energy = values.square().cumsum(0) / values.square().sum()
        shares = values / values.sum()
        spectrum = row.spectrum
        assert spectrum is not None
        assert spectrum.is_complete
        document = row.to_json()
        for share in (0.9, 0.95, 0.99):
            assert row.rank_for(share) == int((energy < share).sum()) + 1
        entropy = -float((shares * shares.log()).sum())
        assert document["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-4)
        participation = float(values.square().sum() ** 2 / (values**4).sum())
        assert document["participation_rank"] == pytest.approx(participation, rel=1e-4)
        assert row.changed_share == float((delta != 0).double().mean())
        assert row.above_noise == int((values > spectrum.noise_floor).sum())
        beta = min(delta.shape) / max(delta.shape)
        omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
        median = float(values.median())
        assert document["gavish_donoho"] == int((values > omega * median).sum())


def test_adapter_sizes(pair: tuple[Path, Path]) -> None:
    report = pair_report(*pair)
    expected = sum(
        (row.rank_for(0.9) or 0) * sum(row.spectrum.shape) * 2
        for row in report.matrices
        if row.spectrum
    )
    assert report.adapter_bytes(0.9) == (expected, False)


def test_ranks_beyond_what_was_resolved_are_not_guessed(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.up_proj.weight"
    base = {name: torch.randn(700, 600, generator=generator)}
    tuned = {name: base[name] + torch.randn(700, 600, generator=generator)}
    paths = [save_folder(state, tmp_path / str(i), LLAMA) for i, state in enumerate((base, tuned))]
    (row,) = pair_report(*paths).matrices
    assert row.rank_for(0.9) is None
    assert row.to_json()["effective_rank"] is None
    assert pair_report(*paths).adapter_bytes(0.9)[1], "only a lower bound"
    (row,) = pair_report(*paths, exact=True).matrices
    values = torch.linalg.svdvals(tuned[name].double() - base[name].double())
    energy = values.square().cumsum(0) / values.square().sum()
    assert row.rank_for(0.9) == int((energy < 0.9).sum()) + 1
    assert row.spectrum is not None
    assert len(row.spectrum.values) == 600


def test_levels_of_a_pair(pair: tuple[Path, Path]) -> None:
    values = pair_report(*pair, level="values")
    deep = pair_report(*pair)
    assert values.matrices == []
    assert [row.delta_norm for row in values.rows] == [row.delta_norm for row in deep.rows]
    headers = pair_report(*pair, level="headers")
    assert headers.rows == ()
    assert len(headers.paired) == len(deep.paired) == len(deep.rows)
    only = pair_report(*pair, only=["up_proj"])
    assert {row.name.split(".")[-2] for row in only.rows} == {"up_proj"}
    with pytest.raises(NothingMatches, match="up_porj"):
        pair_report(*pair, only=["up_porj"])


def test_integers_are_said_to_be_left_out(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.safetensors" for index in range(2)]
    for index, path in enumerate(paths):
        save_file({"w": torch.ones(2, 2) + index, "counts": torch.arange(3) + index}, path)
    report = pair_report(*paths)
    assert [row.name for row in report.rows] == ["w"]
    assert report.notes[0] == "1 tensor of integers not compared (counts)"


def test_base_makes_a_pair(pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    assert lt.inspect(tuned, base=base).to_json() == lt.inspect(base, tuned).to_json()


def test_what_cannot_be_asked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = save_peft(
        tmp_path / "a", {"model.layers.0.self_attn.q_proj": (torch.ones(2, 24), torch.ones(24, 2))}
    )
    with pytest.raises(UsageError, match="goes with --level spectra"):
        lt.inspect(pair[0], exact=True)
    with pytest.raises(UsageError, match="unknown level"):
        lt.inspect(pair[0], level="deep")
    with pytest.raises(UsageError, match="always exact"):
        lt.inspect(adapter, exact=True)
    with pytest.raises(UsageError, match="at level values"):
        lt.inspect(adapter, base=pair[0], level="headers")


# Headers -------------------------------------------------------------------------------------


def sparse_shards(folder: Path, files: int, layers: int, width: int) -> int:
    """A checkpoint of GPT-3's kind whose values are holes; its parameters are returned."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    shapes = {
        f"model.layers.{layer}.{part}.weight": shape
        for layer in range(layers)
        for part, shape in {
            **{f"self_attn.{side}_proj": (width, width) for side in "qkvo"},
            "mlp.up_proj": (4 * width, width),
            "mlp.down_proj": (width, 4 * width),
            "input_layernorm": (width,),
        }.items()
    } | {"model.embed_tokens.weight": (50257, width)}
    weight_map = {}
    for index in range(files):
        name = f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        header, position = {}, 0
        for tensor in list(shapes)[index::files]:
            size = 2 * math.prod(shapes[tensor])
            header[tensor] = {
                "dtype": "BF16",
                "shape": list(shapes[tensor]),
                "data_offsets": [position, position + size],
            }
            position += size
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(folder / name, 8 + len(text) + position)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    return sum(math.prod(shape) for shape in shapes.values())


def stored_bytes(folder: Path) -> int:
    """Of headers, index and config: all that there is to read but values."""
    total = 0
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                total += 8 + struct.unpack("<Q", file.read(8))[0]
        else:
            total += path.stat().st_size
    return total


@pytest.mark.skipif(not READ_SO_FAR.exists(), reason="the system does not count reads")
@pytest.mark.parametrize("what", ["checkpoint", "pair", "adapter"])
def test_headers_reads_no_tensor(what: str, tmp_path: Path) -> None:
    sparse_shards(tmp_path / "a", 4, 8, 1024)
    sparse_shards(tmp_path / "b", 4, 8, 1024)
    save_peft(
        tmp_path / "adapter",
        {"model.layers.0.self_attn.q_proj": (torch.ones(64, 4096), torch.ones(4096, 64))},
    )
    paths = {
        "checkpoint": [tmp_path / "a"],
        "pair": [tmp_path / "a", tmp_path / "b"],
        "adapter": [tmp_path / "adapter"],
    }[what]
    lt.inspect(*paths, level="headers")  # imports are behind us
    before = bytes_read()
    lt.inspect(*paths, level="headers")
    assert bytes_read() - before <= sum(map(stored_bytes, paths)) + OF_THE_MEASUREMENT


WITHIN = """
import json, sys, time
import loratool as lt
read = lambda: int(open("/proc/self/io").read().split("rchar: ")[1].split()[0])
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
lt.inspect(sys.argv[1])
before, started, held = read(), time.process_time(), peak()
report = lt.inspect(sys.argv[2])
grown = peak() - held
spent = time.process_time() - started
print(json.dumps([report.parameters, report.files, read() - before, grown, spent]))
"""


@pytest.mark.skipif(not READ_SO_FAR.exists(), reason="the system does not count reads")
def test_400_files_of_175_billion_parameters(tmp_path: Path) -> None:
    parameters = sparse_shards(tmp_path / "gpt3", 400, 96, 12288)
    sparse_shards(tmp_path / "small", 1, 1, 8)
    assert parameters > 174e9
    command = [sys.executable, "-c", WITHIN, str(tmp_path / "small"), str(tmp_path / "gpt3")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    counted, files, read, grown_kib, spent = json.loads(done.stdout)
    assert (counted, files) == (parameters, 400)
    assert read <= 1.1 * stored_bytes(tmp_path / "gpt3"), "4 KiB of each file would be 1.6 MB"
    assert grown_kib * 1024 < 50e6
    assert spent < 10, "seconds of processor time; it takes about 0.1"
