"""Recipes: a combination written down in YAML, so that it can be made again to the byte.

Paths are relative to the recipe's own folder. A recipe may take other recipes in place of
adapters, in a file or written out; each is made first, in float32 unless it says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from loratool.algebra.ranks import RankLimits
from loratool.combining.registry import DEFAULT, find_method
from loratool.errors import InputMissing, MalformedFile, OutputError, OutputExists, UsageError
from loratool.formats.written import DEFAULT as DEFAULT_FORMAT
from loratool.formats.written import find_format
from loratool.ops.combine_plan import Combination
from loratool.ops.combine_saved import parse_saved
from loratool.ops.combine_weights import Source, parse_rule, rule_text
from loratool.ops.sources import adapter_sha256

SUFFIXES = (".yaml", ".yml")
_MAX_BYTES = 200_000
_MAX_LEVELS = 60
_MAX_DEPTH = 8
_MAX_ADAPTERS = 1000
_KEYS = {
    "method", "parameters", "rank", "min_rank", "max_rank", "multiple_of", "saved", "dtype",
    "seed", "alpha", "include", "exclude", "weights", "adapters", "format",
}  # fmt: skip
_ADAPTER_KEYS = {"path", "recipe", "weight", "sha256"}


def is_recipe(text: str) -> bool:
    """Whether an argument names a recipe file."""
    return Path(text).suffix in SUFFIXES and Path(text).is_file()


def load_recipe(path: Path) -> Combination:
    """Read a recipe with all that it includes. Raises InputMissing, MalformedFile, UsageError."""
    return _Reader().file(path)


class _Reader:
    """Follows recipes into recipes, within bounds."""

    def __init__(self) -> None:
        self._open: list[Path] = []
        self._adapters = 0

    def file(self, path: Path) -> Combination:
        if not path.is_file():
            raise InputMissing(f"{path}: no such recipe")
        here = path.resolve()
        if here in self._open:
            raise MalformedFile(f"{path}: the recipe includes itself")
        self._open.append(here)
        try:
            return self._combination(str(path), path.parent, _yaml(path), len(self._open))
        finally:
            self._open.pop()

    def _combination(self, label: str, folder: Path, body: object, depth: int) -> Combination:
        if depth > _MAX_DEPTH:
            raise MalformedFile(f"{label}: recipes are nested more than {_MAX_DEPTH} deep")
        body = _mapping(label, body, _KEYS)
        rows = body.get("adapters")
        if not isinstance(rows, list) or not rows:
            raise MalformedFile(f"{label}: lists no adapters")
        sources = tuple(self._source(label, folder, row, depth) for row in rows)
        try:
            return _asked(body, sources)
        except UsageError as error:
            raise MalformedFile(f"{label}: {error.message}", hint=error.hint) from None

    def _source(self, label: str, folder: Path, row: object, depth: int) -> Source:
        self._adapters += 1
        if self._adapters > _MAX_ADAPTERS:
            raise MalformedFile(f"{label}: names more than {_MAX_ADAPTERS} adapters")
        if isinstance(row, str):
            row = {"path": row}
        row = _mapping(label, row, _ADAPTER_KEYS)
        weight = _number(label, "weight", row.get("weight", 1.0))
        path, recipe, sha256 = (row.get(key) for key in ("path", "recipe", "sha256"))
        if (path is None) == (recipe is None):
            raise MalformedFile(f"{label}: each adapter needs a path or a recipe, not both")
        if sha256 is not None and (not isinstance(sha256, str) or recipe is not None):
            raise MalformedFile(f"{label}: sha256 is a text, and goes with a path")
        if recipe is None:
            return Source(_path(label, folder, path), weight, sha256=sha256)
        if isinstance(recipe, str):
            file = _path(label, folder, recipe)
            nested = self.file(file)
            return Source(file, weight, recipe=nested)
        name = f"{label}, adapter {self._adapters}"
        return Source(Path(name), weight, recipe=self._combination(name, folder, recipe, depth + 1))


def _yaml(path: Path) -> object:
    if path.stat().st_size > _MAX_BYTES:
        raise MalformedFile(f"{path}: is over {_MAX_BYTES:,} bytes long")
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_tricks(path, text)
        return yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MalformedFile(f"{path}: is not valid YAML ({first})") from None


def _refuse_tricks(path: Path, text: str) -> None:
    """Aliases make a small file large; levels upon levels make the parser slow."""
    level = 0
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            raise MalformedFile(f"{path}: uses YAML aliases, which recipes do not take")
        level += isinstance(event, yaml.CollectionStartEvent)
        level -= isinstance(event, yaml.CollectionEndEvent)
        if level > _MAX_LEVELS:
            raise MalformedFile(f"{path}: is nested more than {_MAX_LEVELS} levels deep")


def _mapping(label: str, value: object, known: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise MalformedFile(f"{label}: a mapping is needed, not {type(value).__name__}")
    unknown = [str(key) for key in value if key not in known]
    if unknown:
        raise MalformedFile(
            f"{label}: unknown key {unknown[0]!r}", hint=f"known are {', '.join(sorted(known))}"
        )
    return value


def _path(label: str, folder: Path, value: object) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise MalformedFile(f"{label}: {value!r} is not a path")
    return folder / value


def _number(label: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise MalformedFile(f"{label}: {key} {value!r} is not a number")
    return float(value)


def _asked(body: Mapping[str, Any], sources: tuple[Source, ...]) -> Combination:
    def typed(key: str, kind: type, default: Any) -> Any:
        value = body.get(key, default)
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits and value is not default:
            raise UsageError(f"{key} {value!r} is not of the kind {kind.__name__}")
        return value

    def texts(key: str) -> tuple[str, ...]:
        values = typed(key, list, [])
        if not all(isinstance(value, str) for value in values):
            raise UsageError(f"{key}: is not a list of texts")
        return tuple(values)

    rank = body.get("rank")
    if isinstance(rank, bool) or not isinstance(rank, str | int | None):
        raise UsageError(f"rank {rank!r} is neither a number nor a rule")
    alpha = body.get("alpha")
    find_method(typed("method", str, DEFAULT)).check(typed("parameters", dict, {}), len(sources))
    limits = RankLimits(
        typed("min_rank", int, 1), typed("max_rank", int, None), typed("multiple_of", int, 1)
    )
    return Combination(
        sources,
        typed("method", str, DEFAULT),
        typed("parameters", dict, {}),
        tuple(parse_rule(text, sources) for text in texts("weights")),
        None if rank is None else str(rank),
        limits,
        parse_saved(typed("saved", str, "refuse")),
        typed("dtype", str, None),
        typed("seed", int, 0),
        texts("include"),
        texts("exclude"),
        None if alpha is None else _number("recipe", "alpha", alpha),
        find_format(typed("format", str, DEFAULT_FORMAT)).name,
    )


# Writing ----------------------------------------------------------------------------------------


def recipe_text(asked: Combination, folder: Path) -> str:
    """The combination as YAML for a file in ``folder``, with a hash of every adapter's files."""
    head = "# loratool combine THIS.yaml -o OUT makes the same adapter again\n"
    return f"{head}{yaml.safe_dump(_body(asked, folder), sort_keys=False, allow_unicode=True)}"


def _body(asked: Combination, folder: Path) -> dict[str, Any]:
    limits = asked.limits
    optional = {
        "parameters": dict(asked.parameters),
        "rank": asked.rank,
        "min_rank": None if limits.least == 1 else limits.least,
        "max_rank": limits.most,
        "multiple_of": None if limits.multiple == 1 else limits.multiple,
        "dtype": asked.dtype,
        "alpha": asked.alpha,
        "format": None if asked.format == DEFAULT_FORMAT else asked.format,
        "include": list(asked.include),
        "exclude": list(asked.exclude),
        "weights": [rule_text(rule) for rule in asked.rules],
    }
    return {
        "method": asked.method,
        **{key: value for key, value in optional.items() if value not in (None, [], {})},
        "saved": str(asked.saved),
        "seed": asked.seed,
        "adapters": [_row(source, folder) for source in asked.sources],
    }


def _row(source: Source, folder: Path) -> dict[str, Any]:
    if source.recipe is not None:
        return {"recipe": _body(source.recipe, folder), "weight": source.weight}
    return {
        "path": os.path.relpath(source.path, folder),
        "weight": source.weight,
        "sha256": adapter_sha256(source.path),
    }


def check_recipe_path(path: Path) -> None:
    """Refuse early what ``write_recipe`` could not write. Raises UsageError, OutputError."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: a recipe's name ends in {' or '.join(SUFFIXES)}")
    if path.exists():
        raise OutputExists(f"{path}: exists already", hint="choose another --write-recipe")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path}: its folder does not exist")


def write_recipe(path: Path, asked: Combination) -> None:
    """Write the combination as YAML. Raises OutputError."""
    text = recipe_text(asked, path.absolute().parent)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
