"""A receipt to its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from loratool.provenance import loratool_version
from loratool.receipt.blocks import bit_patterns
from loratool.receipt.value import Receipt
from loratool.storage.tensors import LazyTensor, MemoryTensor
from loratool.storage.writing import write_tensors

VERSION = 1
FORMAT = "loratool_receipt"
VOUCHED_FOR = ("corrections.", "norms.")
"""What the hash of the tensor that it restores answers for."""


def write_receipt(path: Path, receipt: Receipt) -> None:
    """Write the file; corrections are copied from where they are parked."""
    tensors: dict[str, LazyTensor] = {}
    record: dict[str, object] = {
        "loratool": loratool_version(),
        "adapters": [vars(adapter) for adapter in receipt.adapters],
        "index": receipt.index,
        "pickled": receipt.pickled,
        "files": [{"name": file.name, "size": file.size} for file in receipt.files],
        "tensors": {
            name: {
                "method": tensor.method,
                "base_sha256": tensor.base_sha256,
                "merged_sha256": tensor.merged_sha256,
                "misses": tensor.misses,
                "updates": [vars(update) for update in tensor.updates],
            }
            for name, tensor in receipt.tensors.items()
        },
        "added": dict(receipt.added),
    }
    if receipt.kept is not None:
        record["kept"] = dict(receipt.kept)
    tensors["record"] = as_bytes_tensor(json.dumps(record, ensure_ascii=False).encode())
    for index, file in enumerate(receipt.files):
        tensors[f"header.{index}"] = as_bytes_tensor(file.header)
    tensors |= {f"file.{name}": data for name, data in receipt.side_files.items()}
    sha256 = seal(tensors)
    for name, tensor in receipt.tensors.items():
        if tensor.corrections is not None:
            tensors[f"corrections.{name}"] = tensor.corrections
        if tensor.norms is not None:
            tensors[f"norms.{name}"] = tensor.norms
    write_tensors(path, tensors, {"format": FORMAT, "version": str(VERSION), "sha256": sha256})


def seal(tensors: Mapping[str, LazyTensor]) -> str:
    """SHA-256 of all but what is vouched for by the hash of the tensor it restores."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not name.startswith(VOUCHED_FOR):
            digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
            digest.update(bit_patterns(tensors[name].read()).data)
    return digest.hexdigest()


def as_bytes_tensor(data: bytes) -> MemoryTensor:
    """Bytes as the tensor that a receipt stores."""
    return MemoryTensor(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else _EMPTY)


_EMPTY = torch.empty(0, dtype=torch.uint8)
