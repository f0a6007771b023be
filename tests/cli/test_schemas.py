"""Real documents against the JSON Schemas in docs/schemas.

A field that was added is a line in docs/documents.py, after which docs/generate.py renews the
schemas; one that went or has another meaning is a new version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from tests.cli.documents import documents
from tests.cli.invoke import invoke
from tests.conftest import REPOSITORY
from tests.ops.builders import LLAMA, llama_like, save_folder, save_peft

SCHEMAS = REPOSITORY / "docs" / "schemas"
BY_HUB = {"loratool/push/1"}
"""Documents that only a push to a Hub makes: tests/hub."""


def validator(schema: str) -> Draft202012Validator:
    path = SCHEMAS / f"{schema.removeprefix('loratool/').replace('/', '-')}.json"
    return Draft202012Validator(json.loads(path.read_text()))


def faults(document: dict[str, Any]) -> list[str]:
    """Where a document is not what its schema says; of ``what`` it is, where there are several."""
    checker = validator(document["schema"])
    schema = checker.schema
    if "oneOf" in schema:
        schema = next(
            one for one in schema["oneOf"] if document["what"] in one["properties"]["what"]["enum"]
        )
        checker = Draft202012Validator(schema)
    return [f"{list(e.absolute_path)}: {e.message}" for e in checker.iter_errors(document)]


def test_every_command_keeps_to_its_schema(tmp_path: Path) -> None:
    seen: set[tuple[str, str | None]] = set()
    for command, document in documents(tmp_path / "files"):
        assert not faults(document), (command, faults(document))
        assert document["command"] in (command[0], document["schema"].split("/")[1])
        seen.add((document["schema"], document.get("what")))
    known = set()
    for path in SCHEMAS.glob("*.json"):
        schema = json.loads(path.read_text())
        Draft202012Validator.check_schema(schema)
        for one in schema.get("oneOf", [schema]):
            what = one["properties"].get("what", {"enum": [None]})["enum"][0]
            known.add((schema["title"], what))
    assert {one for one in known if one[0] not in BY_HUB} == seen, "every schema has its document"


def test_reports_beside_adapters_keep_to_it_too(tmp_path: Path) -> None:
    for _ in documents(tmp_path / "files"):
        pass
    reports = list((tmp_path / "files").rglob("loratool_report.json"))
    assert len(reports) > 5
    for report in reports:
        assert not faults(json.loads(report.read_text())), report


def names(schema: dict[str, Any]) -> Iterator[str]:
    """Of all fields, at any depth."""
    yield from schema.get("properties", {})
    parts = [schema.get(key) for key in ("items", "additionalProperties")]
    parts += [
        *schema.get("properties", {}).values(),
        *schema.get("anyOf", ()),
        *schema.get("oneOf", ()),
    ]
    for part in parts:
        if isinstance(part, dict):
            yield from names(part)


def test_every_field_is_described() -> None:
    """In docs/json.md; what --dry-run prints is a matter of the schemas alone."""
    text = (SCHEMAS.parent / "json.md").read_text(encoding="utf-8")
    for path in SCHEMAS.glob("*.json"):
        if not path.stem.endswith("-plan-1") and path.stem != "extract-ranks-1":
            fields = set(names(json.loads(path.read_text())))
            assert fields == {name for name in fields if re.search(rf"\b{name}\b", text)}, path


@pytest.mark.parametrize("change", ["gone", "more", "another type"])
def test_a_change_is_seen(change: str, tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    document = json.loads(invoke("inspect", base, "--json").out)
    assert not faults(document)
    row = document["tensors"][0]
    if change == "gone":
        del row["dtype"]
    elif change == "more":
        row["colour"] = "red"
    else:
        row["shape"] = "3×4"
    assert faults(document)


def test_a_difference_that_is_no_number(tmp_path: Path) -> None:
    """NaN in a merged file: JSON has no infinity."""
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA)
    name = "model.layers.0.self_attn.q_proj"
    adapter = save_peft(tmp_path / "a", {name: (torch.ones(2, 24), torch.ones(24, 2))})
    state[f"{name}.weight"][0, 0] = float("nan")
    merged = save_folder(state, tmp_path / "merged", LLAMA)
    text = invoke("verify", merged, "--base", base, "--adapter", adapter, "--json").out
    document = json.loads(text, parse_constant=pytest.fail)
    assert not faults(document)
    assert [row["worst"] for row in document["tensors"] if row["status"] == "off"] == [None]
