"""Outputs that appear whole or not at all.

Everything is written into a staging folder beside the final place, flushed to disk, and renamed
into place by ``publish``. The staging folder is locked while its process lives; one left behind
by a killed process is removed by the next run for the same output.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loratool.errors import InputMissing, NoSpace, OutputError, OutputExists
from loratool.storage.checkpoint import WEIGHT_SUFFIXES
from loratool.storage.dtypes import BY_TORCH, DType
from loratool.storage.safetensors_file import encode_header, tensor_bytes
from loratool.storage.tensors import LazyTensor, TensorInfo

_STAGING_MARK = ".loratool-partial-"
_LOCK = ".lock"
_KEY = ".key"
_COPY_BYTES = 16 * 2**20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_DISK_ERRNOS = (*_NO_SPACE, errno.EFBIG, errno.EROFS)


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
    """Write all of ``data`` at ``offset`` of an existing file."""
    with disk_errors(path), open(path, "r+b", buffering=0) as file:
        done = 0
        while done < len(data):
            done += os.pwrite(file.fileno(), data[done:], offset + done)


def copy_range(source: Path, start: int, target: Path, offset: int, nbytes: int) -> None:
    """Copy bytes between files inside the kernel where it can."""
    with disk_errors(target), open(source, "rb") as reader, open(target, "r+b") as writer:
        done = 0
        while done < nbytes:
            count = _copy_some(
                reader.fileno(), writer.fileno(), start + done, offset + done, nbytes - done
            )
            if count == 0:
                raise InputMissing(f"{source}: shrank while it was copied")
            done += count


def _copy_some(reader: int, writer: int, start: int, offset: int, nbytes: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(reader, writer, nbytes, start, offset)
        except OSError as error:
            if error.errno in _NO_SPACE:  # not a matter of the method
                raise
    data = os.pread(reader, min(nbytes, _COPY_BYTES), start)
    return os.pwrite(writer, data, offset) if data else 0


def create_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[DType, tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> dict[str, OutputSlot]:
    """Create a file with a finished header and room for the tensors; give each one's slot."""
    header, offsets = encode_header(tensors, metadata)
    size = len(header) + sum(tensor_bytes(dtype, shape) for dtype, shape in tensors.values())
    create_with_header(path, header, size)
    return {
        name: OutputSlot(path, offsets[name], dtype, shape)
        for name, (dtype, shape) in tensors.items()
    }


def create_with_header(path: Path, header: bytes, size: int) -> None:
    """Create ``path`` with ``header`` at its start, extended to ``size`` bytes."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:
            file.write(header)
            file.truncate(size)


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
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file from lazy tensors, one at a time, copying ranges where possible."""
    slots = create_safetensors(
        path, {name: (lazy.dtype, lazy.shape) for name, lazy in tensors.items()}, metadata
    )
    for name, lazy in tensors.items():
        if isinstance(lazy, TensorInfo) and lazy.strides is None:
            copy_range(lazy.path, lazy.offset, path, slots[name].offset, lazy.nbytes)
        else:
            slots[name].write(lazy.read())


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors that name the path."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise NoSpace(
                f"{path}: no space left on the disk", hint="free some and try again"
            ) from error
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def check_free_space(output: Path, needed: int) -> None:
    """Refuse early when the disk that will hold ``output`` has less than ``needed`` bytes."""
    parent = _existing_parent(output)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise NoSpace(
            f"{output}: needs {needed:,} bytes, its disk has {free:,} free",
            hint="free some space, or choose an output on another disk",
        )


def check_output(output: Path, *, overwrite: bool, inputs: list[Path]) -> None:
    """Refuse an output that exists (unless overwrite), or that touches an input.

    Raises OutputExists or OutputError before anything is computed.
    """
    resolved = output.resolve()
    for source in inputs:
        origin = source.resolve()
        if resolved == origin:
            raise OutputError(f"{output}: is one of the inputs; choose another output")
        if resolved.is_relative_to(origin):
            raise OutputError(f"{output}: lies inside the input {source}; choose another output")
        if origin.is_relative_to(resolved):
            raise OutputError(f"{output}: holds the input {source}; choose another output")
    if output.is_symlink() or output.exists():
        if not overwrite:
            raise OutputExists(
                f"{output}: exists already", hint="pass --overwrite to replace it, or another -o"
            )
        _check_replaceable(output)


def _check_replaceable(output: Path) -> None:
    """--overwrite replaces what looks like a model or an adapter, never somebody's other files."""
    if output.is_symlink() or (output.suffix in WEIGHT_SUFFIXES and output.is_file()):
        return
    if not output.is_dir():
        raise OutputError(
            f"{output}: is no weight file; it will not be replaced",
            hint="choose another -o, or remove it yourself",
        )
    if not any(output.iterdir()):
        return
    ours = ("adapter_config.json", "config.json", "model_index.json")
    looks_right = any((output / name).is_file() for name in ours) or any(
        item.suffix in (".safetensors", ".bin") for item in output.iterdir()
    )
    if not looks_right or Path.cwd().resolve().is_relative_to(output.resolve()):
        raise OutputError(
            f"{output}: is a folder that holds no model or adapter; it will not be replaced",
            hint="choose another -o, or remove the folder yourself",
        )


@contextmanager
def staged(output: Path, resume_key: str | None = None) -> Iterator[Staging]:
    """A staging folder for ``output``, removed again unless ``publish`` was called.

    With a ``resume_key``, a folder that an interrupted or killed run with the same key left is
    taken over with its scratch files; without, or with another key, it is removed.
    """
    output = Path(os.path.abspath(output))
    made = [parent for parent in output.parents if not parent.exists()]
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        folder, lock = _take_leftover(output, resume_key) or _new_folder(output, resume_key)
    keep = False
    try:
        yield Staging(folder, output)
    except KeyboardInterrupt:
        keep = resume_key is not None
        raise
    except OSError as error:
        if error.errno in _DISK_ERRNOS:  # only an output can meet these
            with disk_errors(output):
                raise
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        _remove_empty(made)


@dataclass(frozen=True)
class Staging:
    """Where an output takes shape. ``folder / "out"`` becomes the output; the rest is scratch."""

    folder: Path
    output: Path

    @property
    def out(self) -> Path:
        path = self.folder / "out"
        path.mkdir(exist_ok=True)
        return path

    @property
    def scratch(self) -> Path:
        path = self.folder / "scratch"
        path.mkdir(exist_ok=True)
        return path

    def publish(self, *, overwrite: bool, only_file: str | None = None) -> None:
        """Flush everything and rename it into place.

        With ``only_file`` the output is that one file of the staged folder, not the folder.
        Raises OutputExists when something appeared there meanwhile.
        """
        with disk_errors(self.output):
            _sync_tree(self.out)
            source = self.out / only_file if only_file else self.out
            aside = self.folder / "replaced"
            exists = self.output.is_symlink() or self.output.exists()
            if exists and not overwrite:
                raise OutputExists(f"{self.output}: appeared while it was being made")
            if exists:
                os.rename(self.output, aside)
            try:
                os.rename(source, self.output)
            except OSError:
                if exists:
                    os.rename(aside, self.output)
                raise
            _sync_folder(self.output.parent)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, until one is in use."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _new_folder(output: Path, resume_key: str | None) -> tuple[Path, int]:
    folder = output.parent / f".{output.name}{_STAGING_MARK}{os.getpid()}-{os.urandom(4).hex()}"
    folder.mkdir()
    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    if resume_key is not None:
        (folder / _KEY).write_text(resume_key)
    return folder, lock


def _take_leftover(output: Path, resume_key: str | None) -> tuple[Path, int] | None:
    """A dead run's folder with this key, locked; dead folders with other keys are removed."""
    taken = None
    for folder in output.parent.glob(f".{_glob_escape(output.name)}{_STAGING_MARK}*"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:
            continue  # being set up or removed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue  # alive
        key = folder / _KEY
        fits = resume_key is not None and key.is_file() and key.read_text() == resume_key
        if fits and taken is None:
            shutil.rmtree(folder / "out", ignore_errors=True)
            taken = folder, lock
        else:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    return taken


def _glob_escape(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with open(Path(root) / name, "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _existing_parent(path: Path) -> Path:
    path = Path(os.path.abspath(path))
    while not path.exists():
        path = path.parent
    return path
