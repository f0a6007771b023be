"""A compiled pass for merging, where llvmlite is installed (extra ``fast``).

One loop over a block in cache replaces a dozen tensor operations. It makes the same decisions
from the same float32 operations in the same order, so it leaves the same positions open and gives
the same bytes as the plain version; tests hold the two together.

The loop is written as LLVM's instructions, which llvmlite turns into vector code for this
processor within a tenth of a second. (numba would make the same code from Python, but importing
it takes several times as long, more than a merge of a gigabyte can gain.)
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

Decide = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, int, float]]

SWITCH = "LORATOOL_NO_COMPILED"
"""Set in the environment, it forbids the compiled pass."""

_NAME = "decide_bf16"
_LOCK = threading.Lock()


def decide_bf16() -> Decide | None:
    """The compiled pass for bf16 weights and results, or None where llvmlite is missing or old."""
    if os.environ.get(SWITCH):
        return None
    with _LOCK:
        return _compiled()


@cache
def _compiled() -> Decide | None:
    if importlib.util.find_spec("llvmlite") is None:
        return None
    import llvmlite.binding as llvm

    if not hasattr(llvm, "create_pass_builder"):  # before 0.44
        return None
    loop = _machine_code()

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


def _machine_code() -> Any:
    """The loop as a function of addresses; calling it lets other threads run."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(_instructions(llvm.get_default_triple()))
    module.verify()
    options = llvm.PipelineTuningOptions(speed_level=3)
    options.loop_vectorization = True
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    address, sizes = ctypes.c_void_p, ctypes.c_int64
    kind = ctypes.CFUNCTYPE(sizes, *[address] * 7, ctypes.c_float, sizes, sizes)
    function: Any = kind(engine.get_function_address(_NAME))
    function.engine = engine  # the code lives as long as what holds it
    return function


def _instructions(triple: str) -> str:
    """The loop in LLVM's language.

    For each value v of the estimate, with bound = |v|·per_value + margin of its row: v + bound
    rounded to bf16 is the result, and the position stays open where v − bound rounds elsewhere.
    """
    from llvmlite import ir

    i1, i8, i16, i32, i64, f32 = *(ir.IntType(n) for n in (1, 8, 16, 32, 64)), ir.FloatType()
    module = ir.Module(_NAME)
    module.triple = triple
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
        """To nearest, ties to even, as an i32 of 16 bits."""
        bits = b.bitcast(value, i32)
        odd = b.and_(b.lshr(bits, i32(16)), i32(1))
        return b.lshr(b.add(b.add(bits, i32(0x7FFF)), odd), i32(16))

    def element(array: Any, index: Any) -> Any:
        return b.gep(array, [index])

    def increase(place: Any, amount: Any) -> None:
        b.store(b.add(b.load(place), amount), place)

    @contextmanager
    def counting(stop: Any, step: int = 1) -> Iterator[Any]:
        """The body of a loop over 0, step, … below stop; stop must be above 0."""
        before = b.block
        body = b.append_basic_block()
        b.branch(body)
        b.position_at_end(body)
        index = b.phi(i64)
        index.add_incoming(i64(0), before)
        yield index
        following = b.add(index, i64(step))
        index.add_incoming(following, b.block)
        after = b.append_basic_block()
        b.cbranch(b.icmp_signed("<", following, stop), body, after)
        b.position_at_end(after)

    found, changed, largest = variable(i64), variable(i64), variable(i16)
    flagged, row_changed = b.alloca(i32), b.alloca(i32)
    with counting(rows) as row:
        first = b.mul(row, columns)
        row_margin = b.load(element(margin, row))
        b.store(i32(0), flagged)
        b.store(i32(0), row_changed)
        with counting(columns) as column:
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
            counting(columns, 8) as group,  # eight flags at a time: few are set
        ):
            eight = b.bitcast(element(flags, group), i64.as_pointer())
            with (
                b.if_then(b.icmp_unsigned("!=", b.load(eight, align=1), i64(0)), likely=False),
                counting(i64(8)) as lane,
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
    return str(module)
