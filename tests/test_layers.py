"""Imports only point downwards; this table is the architecture."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "loratool"

ALLOWED = {
    "errors": set(),
    "storage": {"errors", "plural"},
    "engine": {"errors"},
    "stopwatch": set(),
    "plural": set(),
    "algebra": {"errors", "stopwatch"},
    "adapter": {"errors", "plural", "storage", "algebra"},
    "provenance": {"errors", "storage", "algebra", "adapter"},
    "receipt": {"errors", "storage", "algebra", "adapter", "provenance"},
    "layouts": {"errors", "plural", "storage", "algebra", "adapter", "provenance"},
    "formats": {"errors", "plural", "storage", "algebra", "adapter", "provenance"},
    "combining": {"errors", "algebra"},
    "profiles": {"errors", "storage", "algebra", "adapter", "provenance"},
    "inits": {"errors", "algebra"},
    "report": {"errors", "plural", "provenance"},
    "hub": {"errors", "plural", "storage", "algebra", "adapter", "provenance", "engine"},
}
BELOW_OPS = {*ALLOWED}
ALLOWED["ops"] = BELOW_OPS
ALLOWED["api"] = BELOW_OPS | {"ops"}
ALLOWED["cli"] = BELOW_OPS | {"ops", "api"}
ALLOWED["__init__"] = BELOW_OPS | {"ops", "api"}
ALLOWED["__main__"] = {"cli"}

ONLY_IN = {
    "click": {"cli"},
    "rich": {"cli"},
    "huggingface_hub": {"hub"},
    "transformers": set(),
    "vl_convert": {"report"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            if node.module == "loratool":
                found |= {f"loratool.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    layer = layer_of(path)
    for name in imports_of(path):
        head, *rest = name.split(".")
        if head == "loratool" and rest:
            assert rest[0] == layer or rest[0] in ALLOWED[layer], f"{path.name} imports {name}"
        if head in ONLY_IN:
            assert layer in ONLY_IN[head], f"{path.name} imports {name}"


def test_every_layer_is_in_the_table() -> None:
    layers = {layer_of(path) for path in modules()}
    assert layers <= set(ALLOWED)
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    for layer in layers - {"__init__", "__main__"}:
        assert re.search(rf"^  {layer}(/|\.py) ", page, re.MULTILINE), layer


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_tensor_has_the_default_dtype(path: Path) -> None:
    """It is whatever a program has set, and compiled loops write what they were told."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and re.fullmatch(
            r"torch\.(empty|zeros|ones|eye|linspace|rand|randn)", ast.unparse(node.func)
        ):
            assert "dtype" in {keyword.arg for keyword in node.keywords}, ast.unparse(node)


def test_only_the_command_line_prints() -> None:
    for path in modules():
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("print", "exit")
        ]
        assert not calls or layer_of(path) == "cli", f"{path} prints"
