"""What is in a checkpoint or an adapter, and where a fine-tune lives: the reports of all three."""

from __future__ import annotations

from loratool.ops.inspect_adapter import AdapterReport, inspect_adapter
from loratool.ops.inspect_adapters import AdaptersReport, inspect_adapters
from loratool.ops.inspect_checkpoint import CheckpointReport, inspect_checkpoint
from loratool.ops.inspect_pair import PairReport, inspect_pair

__all__ = [
    "AdapterReport",
    "AdaptersReport",
    "CheckpointReport",
    "PairReport",
    "inspect_adapter",
    "inspect_adapters",
    "inspect_checkpoint",
    "inspect_pair",
]
