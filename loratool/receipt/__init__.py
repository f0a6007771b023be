"""What a merge leaves so that the base can be rebuilt bit for bit: value and file.

A receipt holds the base's layout (headers of its files, its index, small files that the merge
changed), which updates went in and with what scales and weights, SHA-256 of the values on both
sides and of the updates, and for each changed tensor the corrections: what must be set right in
the weights that follow from the merged ones alone (``algebra.corrections``), block by block.

It is a safetensors file: ``record`` is JSON, ``header.N`` the header of the base's Nth file,
``file.NAME`` a small file's bytes, ``corrections.NAME`` the corrections of one tensor,
``norms.NAME`` the norms of its lines where a DoRA needs them. Like every
input it may lie: sizes are checked before anything is allocated, and what is rebuilt counts only
if its hash is the recorded one.
"""

from __future__ import annotations

from loratool.receipt.blocks import (
    Corrections,
    bit_patterns,
    blocks_of,
    from_bit_patterns,
    update_sha256,
)
from loratool.receipt.reading import hex_double, read_receipt
from loratool.receipt.value import (
    RECEIPT_FILE,
    AdapterRecord,
    FileRecord,
    Receipt,
    TensorRecord,
    UpdateRecord,
)
from loratool.receipt.writing import as_bytes_tensor, write_receipt

__all__ = [
    "RECEIPT_FILE",
    "AdapterRecord",
    "Corrections",
    "FileRecord",
    "Receipt",
    "TensorRecord",
    "UpdateRecord",
    "as_bytes_tensor",
    "bit_patterns",
    "blocks_of",
    "from_bit_patterns",
    "hex_double",
    "read_receipt",
    "update_sha256",
    "write_receipt",
]
