"""Uploading a folder of named files and its card, as one commit."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    HfApi,
    ModelInfo,
    get_token,
    hf_hub_download,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
)

from loratool.errors import HubError, InputMissing
from loratool.hub.card import CardFacts, has_own_text, merge_card, render_card
from loratool.hub.failures import LOG_IN, endpoint, hub_errors, is_transient, visible
from loratool.hub.readme import MAX_README_BYTES, README, decode_readme
from loratool.provenance import loratool_version

_TRIES = 3
_ADAPTER_CONFIG = "adapter_config.json"
_MODEL_CONFIG = "config.json"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Upload:
    """One file to be: its name in the repository, and a local file or its bytes."""

    name: str
    content: Path | bytes

    @property
    def size_bytes(self) -> int:
        if isinstance(self.content, bytes):
            return len(self.content)
        return self.content.stat().st_size


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    changed: False when the repository held the very same files already. card: where the README.md
    that went up comes from.
    """

    url: str
    commit_url: str
    commit: str
    private: bool
    changed: bool
    card: str
    card_bytes: int
    notes: tuple[str, ...]


def compose_card(facts: CardFacts, local: str | None, remote: str | None) -> tuple[str, str]:
    """The README.md to upload, and in a few words where it comes from.

    Words that somebody wrote are kept: those in the repository before those in the folder. Raises
    MalformedFile.
    """
    if remote is not None and has_own_text(remote):
        return merge_card(remote, facts), "the repository's own README.md, text kept"
    if local is not None and has_own_text(local):
        return merge_card(local, facts), "the folder's own README.md, text kept"
    if remote is not None:
        return merge_card(remote, facts), "written by loratool"
    return render_card(facts), "written by loratool"


def shows_picture(facts: CardFacts, card: str) -> bool:
    """Whether a card shows the picture that is to go up with it, if one is."""
    return facts.picture is None or f"]({facts.picture.file})" in card


def unseen_picture(facts: CardFacts) -> str:
    """What to say where it does not."""
    assert facts.picture is not None
    link = f"![{facts.picture.alt}]({facts.picture.file})"
    return f"{README} is somebody's own text and does not show the picture; {link} would"


def push_folder(
    uploads: Sequence[Upload],
    facts: CardFacts,
    *,
    local_readme: str | None,
    private: bool,
    revision: str | None,
    message: str,
) -> Pushed:
    """Create the repository unless it exists, and commit files and card to it in one piece.

    Raises HubError, InputMissing, MalformedFile (a README.md up there that cannot be read).
    """
    repo_id = facts.repo_id
    with hub_errors(repo_id), _quiet_client() as remarks:
        if get_token() is None:
            raise HubError(f"not logged in to {endpoint()}", hint=LOG_IN)
        api = HfApi(library_name="loratool", library_version=loratool_version())
        url = _patiently(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
        info = _patiently(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
        notes = _check_repository(info, repo_id, private)
        remote = _remote_readme(info, repo_id)
        card, origin = compose_card(facts, local_readme, remote)
        if remote is not None and has_own_text(remote) and _differ(local_readme, remote):
            notes.append(
                f"{README} in the folder was not uploaded: the repository has its own, which stays"
            )
        if not shows_picture(facts, card):
            notes.append(unseen_picture(facts))
        files = [*uploads, Upload(README, card.encode("utf-8"))]

        def commit() -> CommitInfo:
            # Built anew for each try: a commit that landed although its answer was lost then
            # shows as "nothing to change".
            return api.create_commit(
                repo_id,
                operations=[_operation(file) for file in files],
                commit_message=message,
                revision=revision,
                parent_commit=info.sha,
            )

        done = _patiently(commit)
    return Pushed(
        url=visible(url),
        commit_url=visible(done.commit_url),
        commit=visible(done.oid),
        private=bool(info.private),
        changed=done.oid != info.sha,
        card=origin,
        card_bytes=files[-1].size_bytes,
        notes=(*notes, *(visible(remark) for remark in remarks)),
    )


def _check_repository(info: ModelInfo, repo_id: str, private: bool) -> list[str]:
    """Refuse a repository that is not what the user thinks it is; note what is odd."""
    if private and not info.private:
        raise HubError(
            f"{repo_id}: exists already and is public; --private is for new repositories",
            hint="make it private in its settings on the Hub, or leave --private out",
        )
    names = {sibling.rfilename for sibling in info.siblings or ()}
    if _MODEL_CONFIG in names and _ADAPTER_CONFIG not in names:
        raise HubError(
            f"{repo_id}: holds a model ({_MODEL_CONFIG}); an adapter beside it confuses loaders",
            hint="choose another name for the adapter's repository",
        )
    if _MODEL_CONFIG in names:
        return [
            f"{repo_id} also holds {_MODEL_CONFIG}, which makes some loaders take it for a model"
        ]
    return []


def _remote_readme(info: ModelInfo, repo_id: str) -> str | None:
    found = [item for item in info.siblings or () if item.rfilename == README]
    if not found:
        return None
    label = f"{repo_id}/{README}"
    if (found[0].size or 0) > MAX_README_BYTES:
        raise HubError(f"{label}: is over {MAX_README_BYTES:,} bytes long")
    with tempfile.TemporaryDirectory() as folder:
        path = _patiently(
            lambda: hf_hub_download(repo_id, README, revision=info.sha, cache_dir=folder)
        )
        return decode_readme(Path(path).read_bytes(), label)


def _differ(local: str | None, remote: str) -> bool:
    return local is not None and has_own_text(local) and local != remote


def _operation(file: Upload) -> CommitOperationAdd:
    if isinstance(file.content, Path) and not file.content.is_file():
        raise InputMissing(f"{file.content}: is gone")
    return CommitOperationAdd(file.name, file.content)


def _patiently(call: Callable[[], Result]) -> Result:
    """Repeat a call that is safe to repeat while the server has trouble.

    The client itself does so for uploads, not for the small requests around them.
    """
    for attempt in range(1, _TRIES):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
        time.sleep(attempt)
    return call()


@contextmanager
def _quiet_client() -> Iterator[list[str]]:
    """Keep the client's bars, log lines and warnings off the terminal; the warnings are yielded."""
    remarks: list[str] = []
    verbosity, had_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logging.set_verbosity(ERROR)
        disable_progress_bars()
        try:
            yield remarks
        finally:
            logging.set_verbosity(verbosity)
            if had_bars:
                enable_progress_bars()
            remarks += [str(item.message) for item in caught if item.category is UserWarning]
