"""Writing tensors: slots at known offsets of files with final headers, and copies of ranges."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loratool.errors import InputMissing
from loratool.storage.direct import reserve, write_direct
from loratool.storage.disk import NO_SPACE, disk_errors
from loratool.storage.dtypes import BY_TORCH, DType
from loratool.storage.safetensors_file import encode_header, tensor_bytes
from loratool.storage.sharing import share_blocks
from loratool.storage.tensors import LazyTensor, TensorInfo, is_range

_COPY_BYTES = 16 * 2**20

Shape = tuple[DType, tuple[int, ...]]
"""All that a header says of a tensor but where it lies."""


@dataclass(frozen=True)
class OutputSlot:
    """Where one tensor goes: any worker can open the file itself and write there."""

    path: Path
    offset: int
    dtype: DType
    shape: tuple[int, ...]

    def write(self, tensor: Tensor) -> None:
        """Write all values."""
        self.write_rows(0, tensor)

    def write_rows(self, start: int, rows: Tensor) -> None:
        """Write ``rows`` at row ``start`` of the first dimension."""
        if BY_TORCH.get(rows.dtype) != self.dtype:
            raise AssertionError(f"{rows.dtype} into a slot of {self.dtype.name}")
        row_bytes = tensor_bytes(self.dtype, self.shape[1:])
        if rows.numel():
            write_at(self.path, self.offset + start * row_bytes, _bytes_of(rows))


def write_at(path: Path, offset: int, data: memoryview) -> None:
    """Write all of ``data`` at ``offset`` of an existing file, past the page cache if it can."""

    def fill(buffer: memoryview, position: int) -> int:
        buffer[:] = data[position : position + len(buffer)]
        return len(buffer)

    with disk_errors(path):
        direct = write_direct(path, offset, len(data), fill)
        with open(path, "r+b", buffering=0) as file:
            for part in _around(direct, len(data)):
                done = part.start
                while done < part.stop:
                    done += os.pwrite(file.fileno(), data[done : part.stop], offset + done)


def copy_range(source: Path, start: int, target: Path, offset: int, nbytes: int) -> None:
    """Copy bytes between files: sharing blocks, past the page cache or inside the kernel."""
    with open(source, "rb", buffering=0) as reader, disk_errors(target):
        shared = share_blocks(reader.fileno(), start, target, offset, nbytes)
        for part in _around(shared, nbytes):
            if part:
                _copy(
                    source,
                    reader.fileno(),
                    start + part.start,
                    target,
                    offset + part.start,
                    len(part),
                )


def _copy(source: Path, reader: int, start: int, target: Path, offset: int, nbytes: int) -> None:
    def fill(buffer: memoryview, position: int) -> int:
        return os.preadv(reader, [buffer], start + position)

    direct = write_direct(target, offset, nbytes, fill)
    with open(target, "r+b", buffering=0) as writer:
        for part in _around(direct, nbytes):
            done = part.start
            while done < part.stop:
                count = _copy_some(
                    reader, writer.fileno(), start + done, offset + done, part.stop - done
                )
                if count == 0:
                    raise InputMissing(f"{source}: shrank while it was copied")
                done += count


def _around(middle: range, length: int) -> tuple[range, range]:
    """What of ``range(length)`` lies before and after ``middle``."""
    return range(middle.start), range(middle.stop, length)


def _copy_some(reader: int, writer: int, start: int, offset: int, nbytes: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(reader, writer, nbytes, start, offset)
        except OSError as error:
            if error.errno in NO_SPACE:  # not a matter of the method
                raise
    data = os.pread(reader, min(nbytes, _COPY_BYTES), start)
    return os.pwrite(writer, data, offset) if data else 0


def create_safetensors(
    path: Path, tensors: Mapping[str, Shape], metadata: Mapping[str, str]
) -> dict[str, OutputSlot]:
    """Create a file with a finished header and room for the tensors; give each one's slot."""
    header, offsets = encode_header(tensors, metadata)
    size = len(header) + sum(tensor_bytes(dtype, shape) for dtype, shape in tensors.values())
    create_with_header(path, header, size)
    return _slots(path, tensors, offsets)


def slots_of(
    path: Path, tensors: Mapping[str, Shape], metadata: Mapping[str, str]
) -> dict[str, OutputSlot]:
    """Where each tensor lies in a file of these."""
    _, offsets = encode_header(tensors, metadata)
    return _slots(path, tensors, offsets)


def _slots(
    path: Path, tensors: Mapping[str, Shape], offsets: Mapping[str, int]
) -> dict[str, OutputSlot]:
    return {
        name: OutputSlot(path, offsets[name], dtype, shape)
        for name, (dtype, shape) in tensors.items()
    }


def shapes_of(tensors: Mapping[str, LazyTensor]) -> dict[str, Shape]:
    """What a header says of them."""
    return {name: (lazy.dtype, lazy.shape) for name, lazy in tensors.items()}


def create_with_header(path: Path, header: bytes, size: int) -> None:
    """Create ``path`` with ``header`` at its start, extended to ``size`` bytes."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:
            file.truncate(size)
            reserve(file.fileno(), size)
            file.write(header)


def put_header(path: Path, header: bytes, size: int) -> None:
    """Like ``create_with_header``, but what an interrupted run wrote behind the header stays."""
    if has_size(path, size):
        write_at(path, 0, memoryview(header))
        return
    with disk_errors(path):
        path.unlink(missing_ok=True)
    create_with_header(path, header, size)


def has_size(path: Path, size: int) -> bool:
    """Whether there is a file of exactly this size."""
    return path.exists() and path.stat().st_size == size


def park(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Put computed tensors into one raw file until all sizes are known and a header can be made.

    The returned infos read them back, and can be copied by range.
    """
    parked: dict[str, TensorInfo] = {}
    with disk_errors(path), open(path, "wb") as file:
        for name, tensor in tensors.items():
            data = _bytes_of(tensor.cpu())
            parked[name] = TensorInfo(
                name, BY_TORCH[tensor.dtype], tuple(tensor.shape), path, file.tell(), len(data)
            )
            file.write(data)
    return parked


def _bytes_of(tensor: Tensor) -> memoryview:
    """The values, row-major. A single value may keep any stride through ``contiguous``."""
    flat = tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def write_tensors(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    placed: Collection[str] = (),
) -> None:
    """Write a safetensors file from lazy tensors, copying ranges where possible.

    placed: tensors that are in the file already, which then exists with this header. Two at a
    time, so that one is read while the disk takes the other.
    """
    make = slots_of if placed else create_safetensors
    slots = make(path, shapes_of(tensors), metadata)

    def write(name: str) -> None:
        lazy = tensors[name]
        if is_range(lazy):
            copy_range(lazy.path, lazy.offset, path, slots[name].offset, lazy.nbytes)
        else:
            slots[name].write(lazy.read())

    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(write, (name for name in tensors if name not in placed)):
            pass
