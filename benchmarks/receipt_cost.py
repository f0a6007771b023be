"""What undoing a merge costs: weights that cannot be guessed, and bits of the receipt per weight.

One Gaussian matrix per dtype and size of the change, a rank-16 update with Gaussian factors. The
guess is RN(W′ − ΔW), as unmerge makes it; the code is that of a receipt.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from loratool.algebra.corrections import HEADER_BYTES, decode_block, encode_block, read_block_header
from loratool.algebra.lowrank import LowRank
from loratool.algebra.rounding import CertifiedSum
from loratool.receipt import bit_patterns, blocks_of

RATIOS = (0.003, 0.01, 0.03, 0.1)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPE = (2048, 2048)
RANK = 16


def receipt_costs(shape: tuple[int, int] = SHAPE) -> list[dict[str, Any]]:
    """One row per dtype and ratio ‖ΔW‖/‖W0‖: shares, bits per weight, nanoseconds per weight."""
    return [_cost(dtype, ratio, shape) for dtype in DTYPES for ratio in RATIOS]


def _cost(dtype: torch.dtype, ratio: float, shape: tuple[int, int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    w0 = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    b = torch.randn(shape[0], RANK, generator=generator)
    a = torch.randn(RANK, shape[1], generator=generator)
    scale = ratio * float(w0.float().norm()) / LowRank(b, a).norm()
    merged = CertifiedSum([LowRank(b, a, scale)])
    back = CertifiedSum([LowRank(b, a, -scale)])
    misses = nbytes = 0
    coding = 0.0
    for start, stop in blocks_of(shape):
        truth = w0[start:stop]
        after = merged.add_to(truth, start, dtype).values
        guess = bit_patterns(back.add_to(after, start, dtype).values)
        begin = time.process_time()
        code, missed = encode_block(bit_patterns(truth), guess)
        header = read_block_header(code, guess.size)
        restored = decode_block(header, code[HEADER_BYTES:], guess)
        coding += time.process_time() - begin
        assert (restored == bit_patterns(truth)).all()
        misses += missed
        nbytes += len(code)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "ratio": ratio,
        "missed": misses / w0.numel(),
        "bits_per_weight": 8 * nbytes / w0.numel(),
        "bits_per_miss": 8 * nbytes / max(1, misses),
        "coding_ns": 1e9 * coding / w0.numel(),
    }


def main() -> None:
    from report_receipt import receipt_table

    print(receipt_table(receipt_costs()))


if __name__ == "__main__":
    main()
