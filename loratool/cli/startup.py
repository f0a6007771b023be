"""What the installed command settles before torch is imported, so that it starts sooner.

Importing torch is most of a small command's time. Nothing here changes a result, and nothing of
it happens in a program that imports loratool.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

DEFERRED = "torch._meta_registrations"
"""Shapes of operators' results, in Python, for torch.compile and tensors without values: a quarter
of torch's import. What loratool does with such tensors needs none of them."""


def start_sooner() -> None:
    """Once, before torch is imported."""
    # what torch's import makes stays: looking through it for cycles, over and over, finds none
    gc.set_threshold(300_000, 20, 20)
    # other makers' devices have no use here, and looking for them takes time
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    # numpy multiplies no large matrices here; its threads would spin beside the import
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.meta_path.insert(0, _DeferringFinder())


class _Deferred(ModuleType):
    """A module that is run when somebody asks for something in it.

    importlib's LazyLoader would run it as soon as ``inspect`` walks the modules for a file's
    name, which torch's import does.
    """

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        assert self.__spec__ is not None
        assert isinstance(self.__spec__.loader, _DeferringLoader)
        self.__class__ = ModuleType
        self.__spec__.loader.behind.exec_module(self)
        return getattr(self, name)


class _DeferringLoader:
    def __init__(self, behind: Any):
        self.behind = behind

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Deferred(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Later."""


class _DeferringFinder:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != DEFERRED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            # importlib.abc has a class for it, and takes ten milliseconds to import
            spec.loader = _DeferringLoader(spec.loader)  # type: ignore[assignment]
        return spec
