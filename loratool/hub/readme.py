"""A README.md as metadata and body, changed without touching what nobody asked to change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]
from huggingface_hub.repocard import REGEX_YAML_BLOCK, TEMPLATE_MODELCARD_PATH
from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]

from loratool.errors import MalformedFile

README = "README.md"
MAX_README_BYTES = 1_000_000
_BYTE_ORDER_MARK = "\ufeff"
_MAX_METADATA = 200_000
_MAX_ALIASES = 20
_MAX_DEPTH = 50
_TEMPLATE_FIELD = re.compile(r'\{\{\s*\w+\s*\|\s*default\("([^"]*)",\s*true\)\s*\}\}')
_TEMPLATE_TITLE = "# Model Card for Model ID"
_PEFT_LINES = re.compile(r"### Framework versions|- PEFT \S+")


@dataclass(frozen=True)
class Readme:
    """The pieces of a README.md. ``start + metadata + stop + body`` is the file.

    start and stop hold the fences around the YAML block; all three are empty without one.
    """

    start: str
    metadata: str
    stop: str
    body: str

    @staticmethod
    def parse(text: str) -> Readme:
        mark = _BYTE_ORDER_MARK if text.startswith(_BYTE_ORDER_MARK) else ""
        found = REGEX_YAML_BLOCK.search(text.removeprefix(mark))
        if found is None:
            return Readme(mark, "", "", text.removeprefix(mark))
        opening, metadata, closing = found.group(1, 2, 3)
        return Readme(mark + opening, metadata, closing, text.removeprefix(mark)[found.end() :])

    @property
    def text(self) -> str:
        return self.start + self.metadata + self.stop + self.body

    @property
    def values(self) -> dict[str, Any]:
        """The metadata. Raises MalformedFile."""
        return _load(self.metadata)

    def with_body(self, body: str) -> Readme:
        return Readme(self.start, self.metadata, self.stop, body)

    def with_metadata(self, changes: Mapping[str, Any]) -> Readme:
        """Set top-level metadata keys; every other byte stays. Raises MalformedFile."""
        if not changes:
            return self
        newline = "\r\n" if "\r\n" in (self.stop or self.body) else "\n"
        if not self.stop:
            block = _dump(changes, newline)
            return Readme(f"{self.start}---{newline}", block, f"{newline}---{newline}", self.body)
        return Readme(self.start, _set_keys(self.metadata, changes, newline), self.stop, self.body)


def decode_readme(data: bytes, label: str) -> str:
    """README bytes as text, line endings as they are. Raises MalformedFile, naming ``label``."""
    if len(data) > MAX_README_BYTES:
        raise MalformedFile(f"{label}: is over {MAX_README_BYTES:,} bytes long")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedFile(f"{label}: is not UTF-8 text") from None
    try:
        _ = Readme.parse(text).values
    except MalformedFile as error:
        raise MalformedFile(f"{label}: {error.message}") from None
    return text


def is_untouched_template(body: str) -> bool:
    """Whether a body is the empty form that PEFT writes beside an adapter, nothing filled in."""
    template = _TEMPLATE_FIELD.sub(r"\1", TEMPLATE_MODELCARD_PATH.read_text(encoding="utf-8"))
    known = {line.strip() for line in template.splitlines()}
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    return _TEMPLATE_TITLE in lines and all(
        line in known or _PEFT_LINES.fullmatch(line) for line in lines
    )


def _load(metadata: str) -> dict[str, Any]:
    try:
        _check_effort(metadata)
        values = yaml.safe_load(metadata)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MalformedFile(f"its metadata is not valid YAML ({first})") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise MalformedFile("its metadata is not a mapping of names to values")
    return values


def _check_effort(metadata: str) -> None:
    """Refuse YAML that is small to write and dear to read."""
    depth = aliases = 0
    if len(metadata) > _MAX_METADATA:
        raise MalformedFile(f"its metadata is over {_MAX_METADATA:,} characters long")
    for event in yaml.parse(metadata):
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if aliases > _MAX_ALIASES or depth > _MAX_DEPTH:
            raise MalformedFile("its metadata is nested too deeply or refers to itself too often")


def _dump(values: Mapping[str, Any], newline: str) -> str:
    return str(yaml_dump(dict(values), sort_keys=False)).strip("\n").replace("\n", newline)


def _set_keys(metadata: str, changes: Mapping[str, Any], newline: str) -> str:
    before = _load(metadata)
    text = _edited(metadata, changes, newline)
    try:
        after = _load(text)
    except MalformedFile:
        after = {}
    is_right = set(after) == set(before) | set(changes) and all(
        after[key] == value for key, value in changes.items()
    )
    # Flow style or duplicate keys: written anew, since no local edit does what is meant.
    return text if is_right else _dump({**before, **changes}, newline)


def _edited(metadata: str, changes: Mapping[str, Any], newline: str) -> str:
    root = yaml.compose(metadata, Loader=yaml.SafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    text, missing = metadata, dict(changes)
    for key, value in reversed(pairs):
        if key.value in changes:
            start, stop = key.start_mark.index, _end(value)
            old = text[start:stop]
            ending = old[len(old.rstrip()) :]
            text = (
                text[:start]
                + _dump({key.value: changes[key.value]}, newline)
                + ending
                + text[stop:]
            )
            missing.pop(key.value, None)
    if missing:
        text = text.rstrip("\r\n")
        text += (newline if text else "") + _dump(missing, newline)
    return text


def _end(node: Any) -> int:
    """Where a node's own text stops: a block collection's end mark lies after later comments."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)
