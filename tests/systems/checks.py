"""What each command must do to a system of the paper, against something that is not loratool.

Factors, products and norms are made here with torch in float64; transformers and PEFT run the
models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.cli.invoke import invoke
from tests.systems.deploying import check_deploy
from tests.systems.rows import ALPHA, Factors, Row, stored

_BLOCK = 2**22


def check_estimate(row: Row) -> None:
    """From the config alone as from the headers; parameters by the paper's formula."""
    arguments = ("--rank", row.system.rank, "--targets", ",".join(row.system.modules))
    of_headers = row.loratool("estimate", row.base, *arguments)
    of_config = row.loratool("estimate", row.base / "config.json", *arguments)
    expected = sum(row.system.rank * sum(shape) for shape in row.adapted.values())
    assert of_headers["trained_parameters"] == of_config["trained_parameters"] == expected
    assert of_headers["parameters"] == of_config["parameters"]
    assert sum(module["matrices"] for module in of_headers["modules"]) == row.matrices


def check_init(row: Row) -> None:
    """B is zero, so ΔW is; the report counts what training would change."""
    with row.output("start") as output:
        targets = ",".join(row.system.modules)
        rank = row.system.rank
        report = row.loratool("init", row.base, "-o", output, "--rank", rank, "--targets", targets)
        expected = sum(rank * sum(shape) for shape in row.adapted.values())
        assert report["totals"] == {"modules": row.matrices, "parameters": expected}
        factors = dict(stored(output))
    assert len(factors) == 2 * row.matrices
    for name, value in factors.items():
        assert bool(value.any()) == ("lora_A" in name)
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        out, into = row.adapted[f"{module}.weight"]
        assert tuple(value.shape) == ((rank, into) if "lora_A" in name else (out, rank))
    if row.conv1d:
        check_init_of_query_and_value(row)


def check_init_of_query_and_value(row: Row) -> None:
    """Of a fused matrix, as the paper trained GPT-2 and GPT-3: with the paper's parameters."""
    with row.output("parts") as output:
        arguments = ("--rank", row.system.rank, "--targets", "query,value", "--format", "loralib")
        report = row.loratool("init", row.base, "-o", output, *arguments)
        factors = dict(stored(output))
    width = row.config["n_embd"]
    expected = row.matrices * 2 * row.system.rank * (width + width)
    assert report["totals"] == {"modules": row.matrices, "parameters": expected}
    assert sum(value.numel() for value in factors.values()) == expected
    estimated = row.loratool(
        "estimate", row.base, "--rank", row.system.rank, "--targets", "query,value"
    )
    assert estimated["trained_parameters"] == expected


def check_merge(row: Row) -> None:
    """Every adapted weight is the stored number nearest to W0 + s·B·A; all others stay."""
    merged = dict.fromkeys(row.shapes, False)
    for (name, before), (same, after) in zip(stored(row.base), stored(row.merged), strict=True):
        assert name == same
        merged[name] = True
        if name in row.adapted:
            assert_nearest(after, before, row.delta(name))
        else:
            assert torch.equal(before, after)
    assert all(merged.values())
    assert len(row.adapted) == row.matrices


def check_verify(row: Row) -> None:
    """The merge is found right value by value, and the base is found not to hold the adapter."""
    against = ("--base", row.base, "--adapter", row.adapter)
    report = row.loratool("verify", row.merged, *against, "--exact")
    assert report["verdict"] == "equal"
    assert report["totals"]["equal"] == len(row.shapes)
    assert invoke("verify", row.base, *against, "--fast").code == 1


def check_unmerge(row: Row) -> None:
    """The base comes back bit for bit."""
    with row.output("unmerged") as output:
        row.loratool("unmerge", row.merged, row.adapter, "-o", output)
        for path in sorted(row.base.glob("*.safetensors")):
            assert same_bytes(path, output / path.name)


def check_extract(row: Row) -> None:
    """What was merged is found again, on just those matrices, up to the weights' rounding."""
    with row.output("extracted") as output:
        row.loratool("extract", row.base, row.merged, "-o", output, "--rank", row.system.rank)
        bound = 1e-5 if row.dtype is torch.float32 else 0.02
        assert_holds(output, {name: row.delta(name) for name in row.adapted}, row, bound)


def check_convert(row: Row) -> None:
    """A file of the authors' library, as they trained the system, becomes a PEFT adapter."""
    parts = ("--fused-parts", "q,v") if row.conv1d else ()
    tensors, expected = {}, {}
    for name, (b, a) in row.factors.items():
        module, third = name.removesuffix(".weight"), b.shape[0] // 3
        if row.conv1d:  # query and value of the fused matrix, factors of each one under the other
            b = torch.cat([b[:third], b[2 * third :]])
            other = a.flip(0)
            delta = torch.zeros(3 * third, a.shape[1], dtype=torch.float64)
            delta[:third] = b[:third].double() @ a.double()
            delta[2 * third :] = b[third:].double() @ other.double()
            a = torch.cat([a, other])
        else:
            delta = b.double() @ a.double()
        tensors |= {f"{module}.lora_A": a.contiguous(), f"{module}.lora_B": b.contiguous()}
        delta = ALPHA / row.system.rank * delta
        expected[name] = delta.T if row.conv1d else delta
    file = row.folder / "loralib.safetensors"
    save_file(tensors, file)
    with row.output("converted") as output:
        row.loratool("convert", file, "-o", output, "--alpha", ALPHA, *parts)
        assert_holds(output, expected, row, 1e-6)
    file.unlink()


def assert_holds(adapter: Path, expected: dict[str, Tensor], row: Row, bound: float) -> None:
    """A PEFT adapter holds just these updates, as the weights are stored, to this precision."""
    factors = dict(stored(adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert not config.get("alpha_pattern")
    assert len(factors) == 2 * len(expected) == 2 * row.matrices
    scale = config["lora_alpha"] / config["r"]
    for name, delta in expected.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        b, a = (factors[f"{module}.lora_{side}.weight"].double() for side in "BA")
        found = scale * (b @ a)
        error = (found.T if row.conv1d else found) - delta
        assert float(error.norm() / delta.norm()) < bound


def check_inspect(row: Row) -> None:
    """Checkpoint and adapter by their headers and small cores."""
    checkpoint = row.loratool("inspect", row.base)
    assert {tensor["name"]: tuple(tensor["shape"]) for tensor in checkpoint["tensors"]} == (
        row.shapes
    )
    adapter = row.loratool("inspect", row.adapter)
    assert {update["name"] for update in adapter["updates"]} == set(row.adapted)
    for update in adapter["updates"]:
        exact = float(row.delta(update["name"]).norm())
        assert abs(update["norm"] - exact) < 1e-9 * exact
        assert update["rank"] == row.system.rank


def check_amplification(row: Row) -> None:
    """Every update is laid over its weight; the first is measured again by QR of its factors,
    whose spaces are those of its singular vectors."""
    report = row.loratool("inspect", row.adapter, "--base", row.base)
    found = {update["name"]: update for update in report["updates"]}
    assert set(found) == set(row.adapted)
    name, weight = next((n, value) for n, value in stored(row.base) if n in row.adapted)
    b, a = row.factors[name]
    u, v = (torch.linalg.qr(side).Q for side in (b.double(), a.double().T))
    seen = (weight.T if row.conv1d else weight).double()
    exact = float((u.T @ seen @ v).norm())
    delta = float(row.delta(name).norm())
    assert abs(found[name]["inside"] - exact) < 1e-5 * exact
    assert abs(found[name]["amplification"] - delta / exact) < 1e-5 * delta / exact
    shown = invoke("inspect", row.adapter, "--base", row.base)
    assert "amplif" in shown.out


def check_compare(row: Row) -> None:
    """φ(A, A', i, j) between ranks and seeds, as the paper draws it: of full SVDs of the A's."""
    rank = row.system.rank
    other = row.random_factors(2 * rank, seed=2)
    path = row.write_adapter("other", other)
    report = row.loratool("compare", row.adapter, path)
    grid = report["pairs"][0]["phi_a_grid"]
    ours, theirs = right_vectors(row.factors), right_vectors(other)
    assert (grid["i"][-1], grid["j"][-1]) == (rank, 2 * rank)
    for i, values in zip(grid["i"], grid["values"], strict=True):
        for j, value in zip(grid["j"], values, strict=True):
            assert abs(value - phi(ours, theirs, i, j)) < 1e-6
    shown = invoke("compare", row.adapter, path)
    assert re.search(r"A 1 +0\.\d\d", shown.out), "a row of the figure in the terminal"


def right_vectors(factors: Factors) -> list[Tensor]:
    """Those of every A, (r, in) float64."""
    return [torch.linalg.svd(a.double(), full_matrices=False).Vh for _, a in factors.values()]


def phi(one: list[Tensor], other: list[Tensor], i: int, j: int) -> float:
    """‖V_iᵀ V'_j‖²_F / min(i, j), mean over the adapted weights."""
    shares = [
        float((v[:i] @ w[:j].T).square().sum()) / min(i, j) for v, w in zip(one, other, strict=True)
    ]
    return sum(shares) / len(shares)


CHECKS: dict[str, Callable[[Row], None]] = {
    "estimate": check_estimate,
    "init": check_init,
    "extract": check_extract,
    "merge": check_merge,
    "unmerge": check_unmerge,
    "verify": check_verify,
    "inspect": check_inspect,
    "amplification": check_amplification,
    "compare": check_compare,
    "convert": check_convert,
    "deploy": check_deploy,
}


def assert_nearest(after: Tensor, before: Tensor, delta: Tensor) -> None:
    """No other number of its dtype is nearer to before + delta than after is."""
    exact = (before.double() + delta).numpy()
    values = after.numpy()
    error = np.abs(values.astype(np.float64) - exact)
    for direction in (-np.inf, np.inf):
        other = np.nextafter(values, values.dtype.type(direction)).astype(np.float64)
        assert bool((error <= np.abs(other - exact) + 1e-15).all())
    assert not torch.equal(after, before)


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files are the same, without reading them whole."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as left, open(other, "rb") as right:
        while block := left.read(_BLOCK):
            if block != right.read(_BLOCK):
                return False
    return True
