"""Compiled loops over rows: a change and what is summed of it, and sums of squares.

Sums go to ``LANES`` running sums per row, as ``energies.row_squares`` says, so that they equal the
plain ones bit for bit. Vectors are written out, wide enough for any processor; LLVM splits them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loratool.algebra.native import ADDRESS, SIZE, bf16_bits, compiled, counting, machine_code

LANES = 64

Compare = Callable[[Tensor, Tensor, Tensor, Tensor, np.ndarray, np.ndarray], int]
Squares = Callable[[Sequence[Tensor], np.ndarray], None]

_EXPONENT, _HALF_EXPONENT = 0x7F800000, 0x7C00
_SMALLEST_HALF = 2.0**-14


def compare(before: torch.dtype, after: torch.dtype) -> Compare | None:
    """The compiled comparison of two sides of these dtypes, or None where there is none.

    Called with before and after (rows, columns), and what it fills: the change in float32 and in
    bfloat16 (rows, columns), columns' noise (columns,) and rows' sums (3, rows) float64: of squares
    of the change, of squares of before, and of the powers that ``noise`` takes from after. Returns
    how many entries differ.
    """
    known = (torch.bfloat16, torch.float16, torch.float32)
    return compiled(_compare(before, after)) if before in known and after in known else None


def squares(*dtypes: torch.dtype) -> Squares | None:
    """The compiled sums of squares of a matrix, or of the difference of two, of these dtypes; or
    None where there are none.

    Called with them and rows' sums (rows,) float64, which it fills.
    """
    known = {torch.float32, torch.float64}
    return compiled(_squares(*dtypes)) if known.issuperset(dtypes) else None


@cache
def _compare(before: torch.dtype, after: torch.dtype) -> Callable[[], Compare]:
    def make() -> Compare:
        code = _comparison(before, after)
        loop = machine_code(code, "compare", [*[ADDRESS] * 6, SIZE, SIZE])

        def run(
            w0: Tensor,
            w: Tensor,
            change: Tensor,
            rough: Tensor,
            columns: np.ndarray,
            sums: np.ndarray,
        ) -> int:
            tensors = (w0, w, change, rough)
            assert all(x.is_contiguous() for x in tensors)
            places = [x.data_ptr() for x in tensors]
            found: int = loop(*places, columns.ctypes.data, sums.ctypes.data, *change.shape)
            return found

        return run

    return make


@cache
def _squares(*dtypes: torch.dtype) -> Callable[[], Squares]:
    def make() -> Squares:
        code = _sums_of_squares(dtypes)
        loop = machine_code(code, "squares", [*[ADDRESS] * (len(dtypes) + 1), SIZE, SIZE])

        def run(given: Sequence[Tensor], sums: np.ndarray) -> None:
            assert all(x.is_contiguous() for x in given)
            loop(*(x.data_ptr() for x in given), sums.ctypes.data, *given[0].shape)

        return run

    return make


class _Writer:
    """Instructions on scalars and on vectors of LANES alike. b: the builder."""

    def __init__(self, name: str, elements: Sequence[torch.dtype]):
        """A function of one pointer for each of ``elements``, and of rows and columns."""
        from llvmlite import ir

        self.ir = ir
        self.i32, self.i64 = ir.IntType(32), ir.IntType(64)
        self.f32, self.f64 = ir.FloatType(), ir.DoubleType()
        self.module = ir.Module(name)
        pointers = [self.stored(dtype).as_pointer() for dtype in elements]
        kind = ir.FunctionType(self.i64, [*pointers, self.i64, self.i64])
        function = ir.Function(self.module, kind, name)
        *self.arrays, self.rows, self.columns = function.args
        for array in self.arrays:
            array.add_attribute("noalias")
        self.b = ir.IRBuilder(function.append_basic_block())

    def stored(self, dtype: torch.dtype) -> Any:
        """LLVM's kind for values of this dtype; 16 bits are integers to it."""
        known = {torch.float32: self.f32, torch.float64: self.f64}
        return known.get(dtype) or self.ir.IntType(16)

    def kind(self, scalar: Any, lanes: int) -> Any:
        return self.ir.VectorType(scalar, lanes) if lanes > 1 else scalar

    def constant(self, value: float, scalar: Any, lanes: int) -> Any:
        return self.ir.Constant(self.kind(scalar, lanes), [value] * lanes if lanes > 1 else value)

    def load(self, array: Any, index: Any, lanes: int) -> Any:
        return self.b.load(self._place(array, index, lanes), align=self._bytes(array))

    def store(self, value: Any, array: Any, index: Any, lanes: int) -> None:
        self.b.store(value, self._place(array, index, lanes), align=self._bytes(array))

    def _place(self, array: Any, index: Any, lanes: int) -> Any:
        place = self.b.gep(array, [index])
        if lanes == 1:
            return place
        return self.b.bitcast(place, self.kind(array.type.pointee, lanes).as_pointer())

    def _bytes(self, array: Any) -> int:
        element = array.type.pointee
        return {self.f32: 4, self.f64: 8}.get(element, 2)

    def widened(self, value: Any, dtype: torch.dtype, lanes: int) -> Any:
        """A stored value in float32, exactly."""
        if dtype == torch.float32:
            return value
        b, i32, f32 = self.b, self.kind(self.i32, lanes), self.kind(self.f32, lanes)

        def bits(number: int) -> Any:
            return self.constant(number, self.i32, lanes)

        wide = b.zext(value, i32)
        if dtype == torch.bfloat16:
            return b.bitcast(b.shl(wide, bits(16)), f32)
        # float16 without instructions for it: its bits, as float32's, are 2^-112 of the value
        size = b.shl(b.and_(wide, bits(0x7FFF)), bits(13))
        scaled = b.fmul(b.bitcast(size, f32), self.constant(2.0**112, self.f32, lanes))
        top = b.icmp_unsigned("==", b.and_(wide, bits(_HALF_EXPONENT)), bits(_HALF_EXPONENT))
        beyond = b.or_(size, bits(_EXPONENT))  # infinity and NaN
        size = b.select(top, beyond, b.bitcast(scaled, i32))
        return b.bitcast(b.or_(size, b.shl(b.and_(wide, bits(0x8000)), bits(16))), f32)

    def to_bf16(self, value: Any, lanes: int) -> Any:
        """A finite float32 to nearest, ties to even."""
        bits = self.b.bitcast(value, self.kind(self.i32, lanes))
        rounded = bf16_bits(self.b, bits, lambda n: self.constant(n, self.i32, lanes))
        return self.b.trunc(rounded, self.kind(self.stored(torch.bfloat16), lanes))

    def double(self, value: Any, lanes: int) -> Any:
        """A float32 or float64 in float64."""
        wide = self.kind(self.f64, lanes)
        return value if value.type == wide else self.b.fpext(value, wide)

    def squared(self, value: Any, lanes: int) -> Any:
        """The square in float64."""
        value = self.double(value, lanes)
        return self.b.fmul(value, value)

    def each_row(
        self, addends: Callable[[Any, Any, int], Sequence[Any]], outs: Sequence[Any]
    ) -> None:
        """Sum ``addends(first, column, lanes)`` over each row and store the sums in ``outs``.

        first: index of the row's first element. A row's last columns, fewer than LANES, go to the
        first running sums one by one.
        """
        b, i64 = self.b, self.i64
        lanes = [b.alloca(self.kind(self.f64, LANES)) for _ in outs]
        rest = b.urem(self.columns, i64(LANES))
        whole = b.sub(self.columns, rest)
        with counting(b, self.rows) as row:
            first = b.mul(row, self.columns)
            for place in lanes:
                b.store(self.constant(0.0, self.f64, LANES), place)
            with b.if_then(b.icmp_signed(">", whole, i64(0))), counting(b, whole, LANES) as column:
                for place, addend in zip(lanes, addends(first, column, LANES), strict=True):
                    b.store(b.fadd(b.load(place), addend), place)
            with b.if_then(b.icmp_signed(">", rest, i64(0))), counting(b, rest) as lane:
                column = b.add(whole, lane)
                for place, addend in zip(lanes, addends(first, column, 1), strict=True):
                    one = b.gep(b.bitcast(place, self.f64.as_pointer()), [lane])
                    b.store(b.fadd(b.load(one), addend), one)
            for out, place in zip(outs, lanes, strict=True):
                self.store(self._halved(b.load(place)), out, row, 1)

    def _halved(self, sums: Any) -> Any:
        """The second half added to the first, until one is left."""
        b, ir = self.b, self.ir
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            nothing = ir.Constant(sums.type, ir.Undefined)
            halves = [
                b.shuffle_vector(sums, nothing, ir.Constant(ir.VectorType(self.i32, lanes), part))
                for part in (list(range(lanes)), list(range(lanes, 2 * lanes)))
            ]
            sums = b.fadd(*halves)
        return b.extract_element(sums, self.i32(0))


def _comparison(before: torch.dtype, after: torch.dtype) -> Any:
    filled = [torch.float32, torch.bfloat16, torch.float64, torch.float64]
    w = _Writer("compare", [before, after, *filled])
    b, (old, new, change, rough, columns, sums) = w.b, w.arrays
    differing = b.alloca(w.i64)
    b.store(w.i64(0), differing)
    integer = w.ir.IntType(LANES)
    kind = w.ir.FunctionType(integer, [integer])
    ones = w.ir.Function(w.module, kind, f"llvm.ctpop.i{LANES}")

    def addends(first: Any, column: Any, lanes: int) -> tuple[Any, Any, Any]:
        place = b.add(first, column)
        w0 = w.widened(w.load(old, place, lanes), before, lanes)
        w1 = w.widened(w.load(new, place, lanes), after, lanes)
        d = b.fsub(w1, w0)
        w.store(d, change, place, lanes)
        w.store(w.to_bf16(d, lanes), rough, place, lanes)
        bits = w.constant(_EXPONENT, w.i32, lanes)
        power = b.and_(b.bitcast(w1, w.kind(w.i32, lanes)), bits)
        power = b.bitcast(power, w.kind(w.f32, lanes))
        if after == torch.float16:
            least = w.constant(_SMALLEST_HALF, w.f32, lanes)
            power = b.select(b.fcmp_ordered("<", power, least), least, power)
        noise = w.squared(power, lanes)
        w.store(b.fadd(w.load(columns, column, lanes), noise), columns, column, lanes)
        differ = b.fcmp_unordered("!=", d, w.constant(0.0, w.f32, lanes))
        count = b.call(ones, [b.bitcast(differ, integer)]) if lanes > 1 else b.zext(differ, w.i64)
        b.store(b.add(b.load(differing), count), differing)
        return w.squared(d, lanes), w.squared(w0, lanes), noise

    w.each_row(addends, [b.gep(sums, [b.mul(w.rows, w.i64(index))]) for index in range(3)])
    b.ret(b.load(differing))
    return w.module


def _sums_of_squares(dtypes: Sequence[torch.dtype]) -> Any:
    w = _Writer("squares", [*dtypes, torch.float64])
    *given, sums = w.arrays

    def addends(first: Any, column: Any, lanes: int) -> tuple[Any]:
        place = w.b.add(first, column)
        values = [w.double(w.load(array, place, lanes), lanes) for array in given]
        value = values[0] if len(values) == 1 else w.b.fsub(*values)
        return (w.squared(value, lanes),)

    w.each_row(addends, [sums])
    w.b.ret(w.i64(0))
    return w.module
