"""A compiled pass for merging.

One loop over a block in cache replaces a dozen tensor operations. It makes the same decisions
from the same float32 operations in the same order, so it leaves the same positions open and gives
the same bytes as the plain version; tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loratool.algebra.native import (
    ADDRESS,
    FLOAT,
    SIZE,
    bf16_bits,
    compiled,
    counting,
    machine_code,
)

Decide = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, int, float]]

_NAME = "decide_bf16"


def decide_bf16() -> Decide | None:
    """The compiled pass for bf16 weights and results, or None where there is none."""
    return compiled(_decide_bf16)


def _decide_bf16() -> Decide:
    arguments = [*[ADDRESS] * 7, FLOAT, SIZE, SIZE]
    loop = machine_code(_instructions(), _NAME, arguments, vectorise=True)

    def decide(
        w0: Tensor, estimate: Tensor, margin: Tensor, per_value: float
    ) -> tuple[Tensor, Tensor, int, float]:
        """w0: (rows, columns) bf16. estimate: float32. margin: (rows,) float32."""
        rows, columns = w0.shape
        w0, values = w0.contiguous(), torch.empty_like(w0)
        open_ = torch.empty(w0.numel(), dtype=torch.int64)
        flags = torch.zeros(columns + 8, dtype=torch.uint8)
        counts = torch.zeros(2, dtype=torch.int64)
        found = loop(
            *(t.data_ptr() for t in (w0, estimate, margin, values, open_, flags, counts)),
            per_value,
            rows,
            columns,
        )
        changed, largest = counts.tolist()
        top = torch.tensor([largest], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        return values, open_[:found].clone(), changed, float(top)

    return decide


def _instructions() -> Any:
    """The loop in LLVM's language.

    For each value v of the estimate, with bound = |v|·per_value + margin of its row: v + bound
    rounded to bf16 is the result, and the position stays open where v − bound rounds elsewhere.
    """
    from llvmlite import ir

    i1, i8, i16, i32, i64, f32 = *(ir.IntType(n) for n in (1, 8, 16, 32, 64)), ir.FloatType()
    module = ir.Module(_NAME)
    pointers = [kind.as_pointer() for kind in (i16, f32, f32, i16, i64, i8, i64)]
    function = ir.Function(module, ir.FunctionType(i64, [*pointers, f32, i64, i64]), _NAME)
    for argument in function.args[:7]:
        argument.add_attribute("noalias")
    w0, estimate, margin, values, open_, flags, counts, per_value, rows, columns = function.args
    absolute = ir.Function(module, ir.FunctionType(f32, [f32]), "llvm.fabs.f32")
    b = ir.IRBuilder(function.append_basic_block())

    def variable(kind: Any) -> Any:
        place = b.alloca(kind)
        b.store(kind(0), place)
        return place

    def to_bf16(value: Any) -> Any:
        return bf16_bits(b, b.bitcast(value, i32), i32)

    def element(array: Any, index: Any) -> Any:
        return b.gep(array, [index])

    def increase(place: Any, amount: Any) -> None:
        b.store(b.add(b.load(place), amount), place)

    found, changed, largest = variable(i64), variable(i64), variable(i16)
    flagged, row_changed = b.alloca(i32), b.alloca(i32)
    with counting(b, rows) as row:
        first = b.mul(row, columns)
        row_margin = b.load(element(margin, row))
        b.store(i32(0), flagged)
        b.store(i32(0), row_changed)
        with counting(b, columns) as column:
            place = b.add(first, column)
            start = b.load(element(w0, place))
            size = b.and_(start, i16(0x7FFF))
            top = b.load(largest)
            b.store(b.select(b.icmp_unsigned(">", size, top), size, top), largest)
            value = b.load(element(estimate, place))
            bound = b.fadd(b.fmul(b.call(absolute, [value]), per_value), row_margin)
            high = to_bf16(b.fadd(value, bound))
            low = to_bf16(b.fsub(value, bound))
            result = b.trunc(high, i16)
            b.store(result, element(values, place))
            flag = b.icmp_unsigned("!=", high, low)
            b.store(b.zext(flag, i8), element(flags, column))
            increase(flagged, b.zext(flag, i32))
            increase(row_changed, b.zext(b.icmp_unsigned("!=", result, start), i32))
        increase(changed, b.zext(b.load(row_changed), i64))
        with (
            b.if_then(b.icmp_unsigned("!=", b.load(flagged), i32(0)), likely=True),
            counting(b, columns, 8) as group,  # eight flags at a time: few are set
        ):
            eight = b.bitcast(element(flags, group), i64.as_pointer())
            with (
                b.if_then(b.icmp_unsigned("!=", b.load(eight, align=1), i64(0)), likely=False),
                counting(b, i64(8)) as lane,
            ):
                column = b.add(group, lane)
                inside = b.icmp_signed("<", column, columns)
                flag = b.trunc(b.load(element(flags, column)), i1)
                with b.if_then(b.and_(inside, flag), likely=False):
                    b.store(b.add(first, column), element(open_, b.load(found)))
                    increase(found, i64(1))
    b.store(b.load(changed), element(counts, i64(0)))
    b.store(b.zext(b.load(largest), i64), element(counts, i64(1)))
    b.ret(b.load(found))
    return module
