"""An interrupted change in place: what it did, and how it is finished or undone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.engine import Engine, NoProgress, Progress
from loratool.errors import DisagreementError, InputMissing, MalformedFile
from loratool.ops.merge_in_place import COMMAND, change_blocks, plan_again
from loratool.provenance import document
from loratool.storage.checkpoint import open_weight_file
from loratool.storage.in_place import Journal, State
from loratool.storage.journal_holder import remove_remains

SCHEMA_VERSION = 2
_NOT_OURS = "its journal is not one that this loratool wrote"


@dataclass(frozen=True)
class RecoverReport:
    """What was found, and what was done about it.

    action: "forward", "back", or None where nothing was done. blocks, blocks_changed,
    blocks_between: of all, how many had been changed and how many were in between. adapters: the
    merge's, with their weights.
    """

    path: str
    found: bool
    action: str | None = None
    command: str | None = None
    adapters: tuple[tuple[str, float], ...] = ()
    blocks: int = 0
    blocks_changed: int = 0
    blocks_between: int = 0
    bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        body = {name: value for name, value in vars(self).items() if name != "command"}
        return document("recover", SCHEMA_VERSION, body | {"interrupted": self.command})


def look(path: Path) -> RecoverReport:
    """What an interrupted run left at ``path``, a checkpoint. Changes nothing.

    Raises OutputError while the run goes on.
    """
    journal = Journal.take(_folder(path))
    if journal is None:
        return RecoverReport(path.name, found=False)
    try:
        return _report(path, journal.state, None)
    finally:
        journal.release()


def recover_back(path: Path, progress: Progress | None = None) -> RecoverReport:
    """Give every block its original bytes again.

    Raises MalformedFile when the files were changed by something else since.
    """
    progress = progress or NoProgress()
    journal = Journal.take(_folder(path))
    if journal is None:
        remove_remains(_folder(path))
        return RecoverReport(path.name, found=False)
    try:
        report = _report(path, journal.state, "back")
        for name in journal.facts["files"]:
            open_weight_file(journal.folder / name)  # whole, or something else has changed it
        progress.start("undoing", sum(block.nbytes for block in journal.state.done))
        try:
            journal.undo(progress.advance)
        finally:
            progress.finish()
    except BaseException:
        journal.release()
        raise
    return report


def recover_forward(
    path: Path, engine: Engine | None = None, progress: Progress | None = None
) -> RecoverReport:
    """Change the blocks that are left, with the adapters and options of the interrupted run.

    Raises DisagreementError when those are not what they were.
    """
    journal = Journal.take(_folder(path))
    if journal is None:
        remove_remains(_folder(path))
        return RecoverReport(path.name, found=False)
    try:
        report = _report(path, journal.state, "forward")
        journal.settle()
        try:
            plan = plan_again(journal.folder, journal.facts["asked"])
        except (KeyError, TypeError, ValueError):
            raise MalformedFile(f"{path}: {_NOT_OURS}") from None
        if plan.identity() != journal.facts["identity"]:
            raise DisagreementError(
                f"{path}: adapters, base or loratool are not what they were when this was begun",
                hint=f"loratool recover {path} --back undoes what was done",
            )
        for name in plan.files:
            journal.own(name)
        change_blocks(plan, journal, engine or Engine(), progress or NoProgress())
    except BaseException:
        journal.release()
        raise
    journal.end()
    return report


def _folder(path: Path) -> Path:
    if not path.exists():
        raise InputMissing(f"{path}: no such file or folder")
    return path if path.is_dir() else path.parent


def _report(path: Path, state: State, action: str | None) -> RecoverReport:
    facts = state.facts
    try:
        counts = (facts["blocks"], facts["bytes"])
        if facts["command"] != COMMAND or not all(isinstance(n, int) and n >= 0 for n in counts):
            raise KeyError
        return RecoverReport(
            path.name,
            True,
            action,
            facts["command"],
            tuple((name, float.fromhex(weight)) for name, weight in facts["asked"]["adapters"]),
            facts["blocks"],
            len(state.done),
            len(state.between),
            facts["bytes"],
        )
    except (KeyError, TypeError, ValueError):
        raise MalformedFile(f"{path}: {_NOT_OURS}") from None
