"""Loops as machine code, where llvmlite is installed (extra ``fast``).

They are written as LLVM's instructions, which llvmlite turns into vector code for this processor
within a few hundredths of a second. (numba would make the same code from Python, but importing it
takes several times as long, more than a gigabyte of work can gain.) Every one stands beside a
plain version with the same result bit for bit, so nothing depends on the extra but time.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

SWITCH = "LORATOOL_NO_COMPILED"
"""Set in the environment, it forbids compiled loops."""

ADDRESS, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

_LOCK = threading.RLock()


def compiled(make: Callable[[], Any]) -> Any | None:
    """What ``make`` returns, made once; None where compiled loops are forbidden, or llvmlite is
    missing or old."""
    if os.environ.get(SWITCH):
        return None
    with _LOCK:
        return _made(make) if _has_llvmlite() else None


@cache
def _made(make: Callable[[], Any]) -> Any:
    return make()


@cache
def _has_llvmlite() -> bool:
    if importlib.util.find_spec("llvmlite") is None:
        return False
    import llvmlite.binding as llvm

    if not hasattr(llvm, "create_pass_builder"):  # before 0.44
        return False
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return True


def machine_code(
    module: Any, name: str, arguments: Sequence[Any], *, vectorise: bool = False
) -> Any:
    """The function ``name`` of an llvmlite.ir module, which returns an i64.

    vectorise: make vectors of its loops; those written with vectors are as fast without, and ready
    several times sooner. Called with addresses and numbers; while it runs, other threads do too.
    """
    import llvmlite.binding as llvm

    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module.triple = llvm.get_default_triple()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    if vectorise:
        options = llvm.PipelineTuningOptions(speed_level=3)
        options.loop_vectorization = True
        passes = llvm.create_pass_builder(machine, options)
        passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    function: Any = ctypes.CFUNCTYPE(SIZE, *arguments)(engine.get_function_address(name))
    function.engine = engine  # the code lives as long as what holds it
    return function


def bf16_bits(b: Any, bits: Any, number: Callable[[int], Any]) -> Any:
    """The 16 bits, in 32, of the bf16 nearest to finite float32 values of these bits; ties to even.

    number: an integer as a constant of their kind, which may be a vector.
    """
    odd = b.and_(b.lshr(bits, number(16)), number(1))
    return b.lshr(b.add(b.add(bits, number(0x7FFF)), odd), number(16))


@contextmanager
def counting(b: Any, stop: Any, step: int = 1, start: int = 0) -> Iterator[Any]:
    """The body of a loop over start, start + step, … below stop, which must be above start."""
    from llvmlite import ir

    i64 = ir.IntType(64)
    before = b.block
    body = b.append_basic_block()
    b.branch(body)
    b.position_at_end(body)
    index = b.phi(i64)
    index.add_incoming(i64(start) if isinstance(start, int) else start, before)
    yield index
    following = b.add(index, i64(step))
    index.add_incoming(following, b.block)
    after = b.append_basic_block()
    b.cbranch(b.icmp_signed("<", following, stop), body, after)
    b.position_at_end(after)
