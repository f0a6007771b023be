"""Merging and rounding in exact rational arithmetic: slow, plain, independent of the package."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

# precision in bits (with the hidden one), smallest exponent of a normal number, largest finite
FORMATS = {
    torch.bfloat16: (8, -126, Fraction(float(torch.finfo(torch.bfloat16).max))),
    torch.float16: (11, -14, Fraction(65504)),
    torch.float32: (24, -126, Fraction(float(torch.finfo(torch.float32).max))),
}


def round_fraction(value: Fraction, dtype: torch.dtype) -> float:
    """Nearest number of ``dtype``, ties to even, infinity beyond the largest finite + half ulp."""
    if value == 0:
        return 0.0
    precision, lowest, largest = FORMATS[dtype]
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    while Fraction(2) ** exponent > size:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    step = Fraction(2) ** (max(exponent, lowest) - precision + 1)
    count = size / step
    floor = count.numerator // count.denominator
    rest = count - floor
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and floor % 2):
        floor += 1
    rounded = floor * step
    if rounded > largest:
        return float("inf") if value > 0 else float("-inf")
    return float(rounded) if value > 0 else -float(rounded)


def exact_merge(
    w0: Tensor, terms: list[tuple[Tensor, Tensor, float]], dtype: torch.dtype
) -> Tensor:
    """RN(w0 + Σ s·b@a), element by element. Where the sum is w0 exactly, w0's own sign of zero."""
    result = torch.empty(w0.shape, dtype=torch.float64)
    for i in range(w0.shape[0]):
        for j in range(w0.shape[1]):
            update = Fraction(0)
            for b, a, scale in terms:
                dot = sum(
                    (
                        Fraction(float(b[i, k])) * Fraction(float(a[k, j]))
                        for k in range(b.shape[1])
                    ),
                    Fraction(0),
                )
                update += Fraction(scale) * dot
            total = Fraction(float(w0[i, j])) + update
            value = round_fraction(total, dtype)
            result[i, j] = float(w0[i, j]) if total == 0 and w0[i, j] == 0 else value
    return result.to(dtype)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal values with equal signs of zero."""
    width = torch.int32 if first.element_size() == 4 else torch.int16
    return torch.equal(first.contiguous().view(width), second.contiguous().view(width))
