"""Corrections: any truth from any guess, bit for bit; damaged codes are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from loratool.algebra.corrections import (
    HEADER_BYTES,
    decode_block,
    encode_block,
    read_block_header,
)
from loratool.errors import MalformedFile

DTYPES = [np.uint8, np.uint16, np.uint32, np.uint64]


def restored(code: bytes, guess: np.ndarray) -> np.ndarray:
    header = read_block_header(code, guess.size)
    return decode_block(header, code[HEADER_BYTES:], guess)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A truth and a guess that misses some of it, by little or by anything."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    truth = draw(arrays(dtype, st.integers(1, 300)))
    others = draw(arrays(dtype, truth.shape))
    near = truth + draw(arrays(dtype, truth.shape, elements=st.integers(0, 3)))
    choice = draw(arrays(np.uint8, truth.shape, elements=st.integers(0, 9)))
    rare = draw(st.integers(0, 9))
    return truth, np.where(choice < rare, truth, np.where(choice == 9, others, near))


@given(pairs())
@settings(max_examples=300, deadline=None)
def test_the_truth_comes_back(pair: tuple[np.ndarray, np.ndarray]) -> None:
    truth, guess = pair
    code, misses = encode_block(truth, guess)
    assert misses == int((truth != guess).sum())
    assert np.array_equal(restored(code, guess), truth)
    assert len(code) <= HEADER_BYTES + truth.nbytes, "never longer than the values"


def test_every_bit_pattern_of_16_bits() -> None:
    """All exponents, both zeros, infinities and NaN among them, against shuffled ones."""
    truth = np.arange(2**16, dtype=np.uint16)
    guess = np.random.default_rng(0).permutation(truth)
    assert np.array_equal(restored(encode_block(truth, guess)[0], guess), truth)
    far = truth ^ np.uint16(0x8000)
    assert np.array_equal(restored(encode_block(truth, far)[0], far), truth)


@pytest.mark.parametrize("share", [0.004, 0.03, 0.2])
def test_near_the_entropy(share: float) -> None:
    """Positions within 0.7 bit of their entropy each, steps of one in two bits."""
    random = np.random.default_rng(1)
    truth = random.integers(2**14, 2**15, 10**6).astype(np.uint16)
    missed = random.random(truth.size) < share
    guess = np.where(missed, truth + random.choice([-1, 1], truth.size), truth).astype(np.uint16)
    entropy = -(share * math.log2(share) + (1 - share) * math.log2(1 - share)) / share
    bits = 8 * len(encode_block(truth, guess)[0]) / int(missed.sum())
    assert entropy + 2 <= bits * 1.01
    assert bits < entropy + 2.7


def a_code(width: type = np.uint16) -> tuple[bytes, np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    truth = random.integers(0, 2**15, 4000).astype(width)
    guess = truth.copy()
    where = random.choice(truth.size, 90, replace=False)
    guess[where] += random.integers(1, 200, 90).astype(width)
    return encode_block(truth, guess)[0], truth, guess


def test_any_damaged_byte_is_refused_or_gives_other_values() -> None:
    code, truth, guess = a_code()
    refused = 0
    for index in range(len(code)):
        for flip in (1, 0x80, 0xFF):
            damaged = bytearray(code)
            damaged[index] ^= flip
            try:
                restored(bytes(damaged), guess)
            except MalformedFile:
                refused += 1
    assert refused > 100
    assert np.array_equal(restored(code, guess), truth)


def test_any_shortened_code_is_refused() -> None:
    code, _, guess = a_code()
    for length in range(len(code)):
        with pytest.raises(MalformedFile):
            restored(code[:length], guess)


@given(st.binary(min_size=HEADER_BYTES, max_size=80))
@settings(max_examples=300, deadline=None)
def test_noise_is_refused_or_decoded_never_a_crash(noise: bytes) -> None:
    guess = np.zeros(64, np.uint16)
    try:
        restored(noise, guess)
    except MalformedFile:
        return


def test_huge_counts_cost_nothing() -> None:
    """A header that claims more than the block can hold is refused before anything is made."""
    code, _, guess = a_code()
    header = bytearray(code[:HEADER_BYTES])
    header[2:6] = b"\xff" * 4
    with pytest.raises(MalformedFile, match="claims 4,294,967,295 differences"):
        read_block_header(bytes(header), guess.size)
