"""An adapter folder onto the Hub, with a card that says what it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter
from loratool.engine import NoProgress, Progress
from loratool.errors import DisagreementError, UnsupportedInput, UsageError
from loratool.formats import peft
from loratool.hub.card import CardFacts, CardPicture
from loratool.hub.extraction import report_ranks
from loratool.hub.push import (
    Pushed,
    Upload,
    compose_card,
    push_folder,
    shows_picture,
    unseen_picture,
)
from loratool.hub.readme import README, decode_readme
from loratool.layouts.config import is_hub_id
from loratool.ops.inspect_adapter import describe_adapter
from loratool.ops.inspect_level import Level
from loratool.ops.push_facts import facts_of
from loratool.ops.sources import open_adapter
from loratool.ops.views.registry import page_of
from loratool.provenance import REPORT_FILE, document, loratool_version
from loratool.report.drawing import png, require_drawing
from loratool.report.figure import alt_text, figure
from loratool.storage.checkpoint import open_weight_file, read_json_file

SCHEMA_VERSION = 1
PICTURE_FILE = "loratool_picture.png"
_MAX_REPORT_BYTES = 50_000_000
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")
_LOCAL_PATH = re.compile(r"""(?:^|[\s"'=])(?:~?/[^\s/]|[A-Za-z]:[\\/]|\\\\\w|file:/)""")


@dataclass(frozen=True)
class PushPlan:
    """Everything decided before the network is touched.

    card: the README.md that goes up if the repository has none of its own. uploads: the other
    files. not_uploaded: what else lies in the folder.
    """

    facts: CardFacts
    uploads: tuple[Upload, ...]
    card: str
    card_origin: str
    local_readme: str | None
    private: bool
    revision: str | None
    message: str
    not_uploaded: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def files(self) -> dict[str, int]:
        """Name in the repository → size in bytes."""
        sizes = {upload.name: upload.size_bytes for upload in self.uploads}
        return {**sizes, README: len(self.card.encode("utf-8"))}

    def to_json(self) -> dict[str, Any]:
        return {
            "repo_id": self.facts.repo_id,
            "base_model": self.facts.base_model,
            "private": self.private,
            "revision": self.revision,
            "message": self.message,
            "files": [{"name": name, "bytes": size} for name, size in self.files.items()],
            "not_uploaded": list(self.not_uploaded),
            "card": self.card,
            "card_origin": self.card_origin,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class PushReport:
    """What went where."""

    repo_id: str
    base_model: str
    files: dict[str, int]
    pushed: Pushed
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return document(
            "push",
            SCHEMA_VERSION,
            {
                "repo_id": self.repo_id,
                "base_model": self.base_model,
                "url": self.pushed.url,
                "commit_url": self.pushed.commit_url,
                "commit": self.pushed.commit,
                "private": self.pushed.private,
                "changed": self.pushed.changed,
                "card_origin": self.pushed.card,
                "files": [{"name": name, "bytes": size} for name, size in self.files.items()],
                "notes": list(self.notes),
            },
        )


def plan_push(
    adapter: Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool = False,
    licence: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    picture: bool = False,
    progress: Progress | None = None,
) -> PushPlan:
    """Read an adapter folder and decide what to upload. No network, nothing written.

    picture: draw the updates, for the card; takes one pass over the adapter, and the extra
    ``report`` (MissingExtra without it).
    Raises UsageError (names, an unknown base), UnsupportedInput (not a PEFT folder, a file that
    names local paths), DisagreementError (a report about another adapter), InputError.
    """
    _check_names(repo_id, base_model, licence)
    value = _open_folder(adapter)
    config = read_json_file(adapter / peft.CONFIG_FILE)
    _refuse_local_paths(config, peft.CONFIG_FILE, skip="base_model_name_or_path")
    base = base_model or _stated_base(value.base_model)
    report = _report(adapter, value)
    facts = facts_of(value, repo_id, base, licence, report)
    drawn = _picture(adapter, value, repo_id, progress) if picture else None
    if drawn is not None:
        facts = replace(facts, picture=drawn[0])
    readme = adapter / README
    local = decode_readme(readme.read_bytes(), str(readme)) if readme.is_file() else None
    card, origin = compose_card(facts, local, None)
    uploads = [_config_upload(adapter, config, base)]
    uploads += [
        Upload(name, adapter / name)
        for name in (peft.WEIGHTS_FILE, REPORT_FILE)
        if (adapter / name).is_file()
    ]
    uploads += [Upload(PICTURE_FILE, drawn[1])] if drawn is not None else []
    names = {upload.name for upload in uploads} | {README}
    return PushPlan(
        facts,
        tuple(uploads),
        card,
        origin,
        local,
        private,
        revision,
        message or f"Upload LoRA adapter with loratool {loratool_version()}",
        tuple(sorted(item.name for item in adapter.iterdir() if item.name not in names)),
        (
            *_notes(adapter, value, base),
            *(() if shows_picture(facts, card) else (unseen_picture(facts),)),
        ),
    )


def run_push(plan: PushPlan, progress: Progress | None = None) -> PushReport:
    """Create the repository if need be and commit all files at once. Raises HubError."""
    progress = progress or NoProgress()
    total = sum(plan.files.values())
    progress.start("uploading", total)
    try:
        pushed = push_folder(
            plan.uploads,
            plan.facts,
            local_readme=plan.local_readme,
            private=plan.private,
            revision=plan.revision,
            message=plan.message,
        )
        progress.advance(total)
    finally:
        progress.finish()
    files = {**plan.files, README: pushed.card_bytes}
    return PushReport(
        plan.facts.repo_id,
        plan.facts.base_model,
        files,
        pushed,
        tuple(dict.fromkeys((*plan.notes, *pushed.notes))),
    )


# What may be pushed ---------------------------------------------------------------------------


def _check_names(repo_id: str, base_model: str | None, licence: str | None) -> None:
    if not is_hub_id(repo_id):
        raise UsageError(
            f"{repo_id!r} is not a Hub repository", hint="name it owner/name, without a URL"
        )
    if base_model is not None and not is_hub_id(base_model):
        raise UsageError(
            f"--base-model {base_model!r} is not a Hub repository", hint="name it owner/name"
        )
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise UsageError(
            f"--license {licence!r} is not a licence identifier", hint="for example apache-2.0"
        )


def _open_folder(path: Path) -> Adapter:
    if path.is_file():
        raise UsageError(
            f"{path}: is a file; a push takes a PEFT adapter folder",
            hint=f"name the folder that holds {peft.CONFIG_FILE} and {peft.WEIGHTS_FILE}",
        )
    if path.is_dir() and not (path / peft.WEIGHTS_FILE).is_file():
        pickles = sorted(item.name for item in path.glob("*.bin"))
        if pickles:
            raise UnsupportedInput(
                f"{path}: holds {pickles[0]}, a pickle; only {peft.WEIGHTS_FILE} is published",
                hint="load it with PEFT and save it again: save_pretrained writes safetensors",
            )
    value = open_adapter(path)
    if value.format != peft.NAME:
        raise UnsupportedInput(
            f"{path}: is in the {value.format} format; only PEFT adapters are published",
            hint="load it in training code with PEFT and save it with save_pretrained",
        )
    return value


def _stated_base(stated: str | None) -> str:
    """The base that the adapter's config names, if it is certain to be a Hub id."""
    if stated is None:
        raise UsageError(
            f"{peft.CONFIG_FILE} does not say which model the adapter belongs to",
            hint="pass --base-model owner/name",
        )
    if not is_hub_id(stated) or Path(stated).exists():
        raise UsageError(
            f"{peft.CONFIG_FILE} names the base {stated!r}, which is a local path or no full "
            "Hub name",
            hint="pass --base-model owner/name",
        )
    return stated


def _refuse_local_paths(value: Any, file: str, skip: str | None = None) -> None:
    for field, text in _strings(value):
        if field != skip and _LOCAL_PATH.search(text):
            raise UnsupportedInput(
                f"{file}: {field} holds a path of this machine ({text[:80]!r})",
                hint="a push would publish it; remove it from the file first",
            )


def _strings(root: Any) -> Iterator[tuple[str, str]]:
    """Every string in a JSON value, keys too, with the name of its field."""
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        field, value = stack.pop()
        if isinstance(value, str):
            yield field, value
        elif isinstance(value, dict):
            for key, item in value.items():
                yield (f"{field}.{key}" if field else key), key
                stack.append((f"{field}.{key}" if field else key, item))
        elif isinstance(value, list):
            stack += [(f"{field}[{index}]", item) for index, item in enumerate(value)]


def _picture(
    folder: Path, adapter: Adapter, repo_id: str, progress: Progress | None
) -> tuple[CardPicture, bytes]:
    """Under the repository's name, since the folder's is nobody's business."""
    require_drawing()
    if not adapter.low_rank:
        raise UsageError(
            f"{folder}: holds no low-rank update to draw", hint="push without --picture"
        )
    looked = describe_adapter(folder, adapter, Level.SPECTRA, progress=progress)
    page = page_of(replace(looked, name=repo_id.partition("/")[2]))
    return CardPicture(PICTURE_FILE, alt_text(page)), png(figure(page))


def _report(folder: Path, adapter: Adapter) -> dict[str, Any] | None:
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_REPORT_BYTES:
        raise UnsupportedInput(f"{path}: is over {_MAX_REPORT_BYTES:,} bytes long")
    report = read_json_file(path)
    _refuse_local_paths(report, REPORT_FILE)
    stated = report_ranks(report)
    actual = {name: update.rank for name, update in adapter.low_rank.items()}
    if stated and not _agree(stated, actual):
        odd = sorted(set(stated.items()) ^ set(actual.items()))
        raise DisagreementError(
            f"{path}: describes another adapter: ranks differ",
            details=[f"{name}: rank {rank}" for name, rank in odd[:6]],
            hint="the adapter was changed after its report was written; remove the report",
        )
    return report


def _agree(stated: Mapping[str, int], actual: Mapping[str, int]) -> bool:
    """Whether two rank tables are one, up to a prefix (``transformer.``) of the adapter's names."""
    shortest = min(stated, key=len)
    prefixes = {name.removesuffix(shortest) for name in actual if name.endswith(shortest)}
    return any(
        {(prefix + name if prefix + name in actual else name): r for name, r in stated.items()}
        == actual
        for prefix in prefixes
    )


def _config_upload(folder: Path, config: dict[str, Any], base: str) -> Upload:
    path = folder / peft.CONFIG_FILE
    if config.get("base_model_name_or_path") == base:
        return Upload(peft.CONFIG_FILE, path)
    changed = {**config, "base_model_name_or_path": base}
    text = json.dumps(changed, indent=2, sort_keys=True) + "\n"
    return Upload(peft.CONFIG_FILE, text.encode("utf-8"))


def _notes(folder: Path, adapter: Adapter, base: str) -> Iterator[str]:
    if adapter.base_model not in (None, base):
        yield f"the uploaded {peft.CONFIG_FILE} names {base} as its base; the local file does not"
    for key, text in open_weight_file(folder / peft.WEIGHTS_FILE).metadata.items():
        if _LOCAL_PATH.search(text):
            yield f"{peft.WEIGHTS_FILE} carries a path of this machine in its header ({key})"
