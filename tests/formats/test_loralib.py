"""The LoRA authors' files, the real one included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratool.errors import LoratoolError, MalformedFile, UnsupportedInput, UsageError
from loratool.ops.sources import is_adapter, open_adapter
from tests.builders import random_tensor

A, B = random_tensor(2, 6), random_tensor(4, 2, seed=1)


def write(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({name.replace("__", "."): value.clone() for name, value in tensors.items()}, path)
    return path


def test_the_authors_roberta(shared_data: Path) -> None:
    """24 updates on query and value, and MNLI's head, as the paper describes it."""
    path = shared_data / "roberta_base_lora_mnli.bin"
    with pytest.raises(UsageError, match="does not store alpha") as caught:
        open_adapter(path)
    assert "--alpha" in (caught.value.hint or "")
    adapter = open_adapter(path, alpha=16)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    assert len(adapter.low_rank) == 24
    assert sum(update.rank * sum(update.shape) for update in adapter.low_rank.values()) == 294_912
    for layer in range(12):
        for part in ("query", "value"):
            module = f"roberta.encoder.layer.{layer}.attention.self.{part}"
            update = adapter.low_rank[f"{module}.weight"]
            assert (update.rank, update.scale, update.shape) == (8, 2.0, (768, 768))
            expected = 2.0 * stored[f"{module}.lora_B"] @ stored[f"{module}.lora_A"]
            torch.testing.assert_close(
                update.load().dense().float(), expected, rtol=1e-5, atol=1e-7
            )
    head = {name for name in stored if "lora_" not in name}
    assert set(adapter.replacements) == head
    assert {name.split(".")[0] for name in head} == {"classifier"}
    for name in head:
        assert torch.equal(adapter.replacements[name].value.read(), stored[name])


def test_scale_is_alpha_over_rank(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", m__q__lora_A=A, m__q__lora_B=B, head__bias=B[:, 0])
    assert is_adapter(path)
    adapter = open_adapter(path, alpha=3)
    assert adapter.format == "loralib"
    assert set(adapter.updates) == {"m.q.weight", "head.bias"}
    dense = adapter.low_rank["m.q.weight"].load().dense().float()
    torch.testing.assert_close(dense, 1.5 * B @ A)


@pytest.mark.parametrize("alpha", [0, -8])
def test_an_alpha_that_scales_by_nothing(tmp_path: Path, alpha: float) -> None:
    path = write(tmp_path / "a.safetensors", m__q__lora_A=A, m__q__lora_B=B)
    with pytest.raises(UsageError, match=f"alpha {alpha} is not positive"):
        open_adapter(path, alpha=alpha)


def test_a_merged_linear_asks_for_its_parts(tmp_path: Path) -> None:
    """Two of three groups: A is (2·r, in), B is (2·d, r)."""
    path = write(
        tmp_path / "a.safetensors",
        h__c_attn__lora_A=random_tensor(2 * 4, 16),
        h__c_attn__lora_B=random_tensor(2 * 16, 4),
    )
    with pytest.raises(UsageError, match=r"h\.c_attn: adapts 2 parts .*\(MergedLinear\)"):
        open_adapter(path, alpha=8)


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        ({"m__lora_A": A}, MalformedFile, "m.lora_A has no lora_B beside it"),
        (
            {"m__lora_A": A, "m__lora_B": B, "n__lora_B": B},
            MalformedFile,
            "n.lora_B has no lora_A beside it",
        ),
        (
            {"m__lora_A": random_tensor(2, 3, 3), "m__lora_B": B},
            UnsupportedInput,
            "not convolutions",
        ),
        ({"m__lora_A": A[:0], "m__lora_B": B[:, :0]}, MalformedFile, "rank 0"),
        ({"m__weight": A}, UnsupportedInput, "no known adapter format"),
    ],
)
def test_files_that_are_wrong(
    tmp_path: Path, tensors: dict[str, torch.Tensor], kind: type[LoratoolError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        open_adapter(write(tmp_path / "a.safetensors", **tensors), alpha=8)
