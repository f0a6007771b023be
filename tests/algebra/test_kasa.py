"""KaSA against a float64 SVD and exact sums, and what it does not go with."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import loratool as lt
from loratool.algebra.exact_matrix import Scaled, diagonal_product
from loratool.algebra.kasa import KasaSum
from loratool.errors import DisagreementError, LoratoolError, MalformedFile, UnsupportedInput
from tests.builders import random_tensor
from tests.faults.killing import bytes_of
from tests.ops.builders import LLAMA, llama_like, save_folder

NAME = "model.layers.0.mlp.up_proj"


def without_smallest(w: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(w.double(), full_matrices=False)
    kept = len(s) - rank
    return (u[:, :kept] * s[:kept]) @ vt[:kept]


@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (12, 12), (1200, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_truncation_is_the_svds(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = random_tensor(*shape, dtype=dtype)
    b, d, a = random_tensor(shape[0], 3), random_tensor(3, seed=2), random_tensor(3, shape[1])
    kasa = KasaSum(w, 3, Scaled(diagonal_product(b, d, a), 0.5))
    truth = without_smallest(w, 3)
    for start in (0, 5):
        found = kasa.truncated(w[start:], start).double()
        info = torch.finfo(dtype)
        unit = truth[start:].abs().clamp(min=info.tiny) * info.eps
        assert ((found - truth[start:]).abs() <= 0.51 * unit + 1e-12).all()


def test_the_sum_is_rounded_once() -> None:
    w = random_tensor(6, 9, dtype=torch.bfloat16)
    b, d, a = random_tensor(6, 2), random_tensor(2, seed=2), random_tensor(2, 9, seed=3)
    kasa = KasaSum(w, 2, Scaled(diagonal_product(b, d, a), 1 / 3))
    start = kasa.truncated(w, 0)
    merged = kasa.add_to(w, 0, torch.bfloat16).values
    for i in range(6):
        for j in range(9):
            exact = Fraction(float(start[i, j])) + Fraction(1 / 3) * sum(
                Fraction(float(b[i, k])) * Fraction(float(d[k])) * Fraction(float(a[k, j]))
                for k in range(2)
            )
            off = abs(Fraction(float(merged[i, j])) - exact)
            for step in (-1, 1):
                bits = merged[i, j].clone().view(torch.int16) + step
                assert off <= abs(Fraction(float(bits.view(torch.bfloat16))) - exact)


def adapter(folder: Path, diagonal: Tensor | None, rank: int = 2, **config: object) -> Path:
    folder.mkdir()
    key = f"base_model.model.{NAME}"
    tensors = {
        f"{key}.lora_A.weight": random_tensor(rank, 24),
        f"{key}.lora_B.weight": random_tensor(40, rank, seed=1),
    }
    if diagonal is not None:
        tensors[f"{key}.lora_diag"] = diagonal
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


GOOD = {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}}
BROKEN: dict[str, tuple[Tensor | None, dict[str, object], type[LoratoolError], str]] = {
    "no diagonal": (None, GOOD, DisagreementError, "go together"),
    "no config": (torch.ones(2), {}, DisagreementError, "go together"),
    "another rank": (torch.ones(3), GOOD, MalformedFile, r"lora_diag \[3\] for rank 2"),
    "all of it": (torch.ones(24), GOOD | {"r": 24}, DisagreementError, "leaves nothing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_kasa(tmp_path: Path, case: str) -> None:
    diagonal, config, error, message = BROKEN[case]
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    rank = config.get("r", 2)
    assert isinstance(rank, int)
    with pytest.raises(error, match=message):
        lt.merge(base, adapter(tmp_path / "a", diagonal, rank, **config), tmp_path / "out")


def test_in_place_it_is_the_same(tmp_path: Path) -> None:
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA)
    kasa = adapter(tmp_path / "a", torch.tensor([1.5, -0.5]), **GOOD)
    report = lt.merge(base, kasa, tmp_path / "merged")
    assert (
        "KaSA leaves out the smallest singular components of 1 weight;" in report.facts["notes"][0]
    )
    lt.merge_in_place(base, kasa)
    assert bytes_of(base) == bytes_of(tmp_path / "merged")


def test_it_goes_in_alone(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    kasa = adapter(tmp_path / "a", torch.ones(2), **GOOD)
    for adapters in ([(kasa, 0.5)], [kasa, kasa]):
        with pytest.raises(DisagreementError, match="goes in alone and with weight 1"):
            lt.merge(base, adapters, tmp_path / "out")
    fused = {f"{NAME.removesuffix('up_proj')}gate_up_proj.weight": random_tensor(80, 24)}
    folder = save_folder(fused, tmp_path / "fused", LLAMA)
    with pytest.raises(UnsupportedInput, match="KaSA"):
        lt.merge(folder, kasa, tmp_path / "out")
    with pytest.raises(LoratoolError, match="they can be merged, but"):
        lt.resize(kasa, tmp_path / "r", rank=1)
    with pytest.raises(LoratoolError, match="they can be merged, but"):
        lt.combine([kasa, kasa], tmp_path / "c")
