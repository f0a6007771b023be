"""What goes wrong between here and the Hub, said in one line with something to do about it."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from loratool.errors import HubError, InputMissing, LoratoolError

LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token with write access"
_NO_XET = "if this server has no Xet storage, set HF_HUB_DISABLE_XET=1 and push again"
_LATER = "try again; what was uploaded already is not sent twice"
_MAX_MESSAGE = 300
_TRANSPORTS = ("httpx2", "httpx", "httpcore", "requests", "urllib3")


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the client raises into HubError. What it cannot explain passes through."""
    try:
        yield
    except LoratoolError:
        raise
    except Exception as error:
        translated = _translated(error, repo_id)
        if translated is None:
            raise
        raise translated from error


def visible(text: object) -> str:
    """Text from elsewhere on one line, control and formatting characters escaped."""
    flat = " ".join(str(text).split())[:_MAX_MESSAGE]
    return "".join(
        char if unicodedata.category(char)[0] not in "CZ" or char == " " else f"\\u{ord(char):04x}"
        for char in flat
    )


def endpoint() -> str:
    """The Hub's address, without credentials that it may carry."""
    split = urlsplit(constants.ENDPOINT)
    return visible(f"{split.scheme}://{split.netloc.rpartition('@')[2]}{split.path}")


def is_transient(error: Exception) -> bool:
    """Whether the same request may well succeed a moment later."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, HfHubHTTPError):
            return link.response.status_code >= 500
        link = link.__cause__
    # The client parses some answers before it looks at their status.
    return type(error).__name__ == "JSONDecodeError"


def _translated(error: Exception, repo_id: str) -> LoratoolError | None:
    link: BaseException | None = error
    while link is not None:
        for kinds, explain in _EXPLANATIONS:
            if isinstance(link, kinds):
                return explain(link, repo_id)
        if type(link).__module__.split(".")[0] in _TRANSPORTS:
            return HubError(
                f"{endpoint()} cannot be reached", details=[_redacted(link)], hint=_LATER
            )
        # Large-file errors arrive as bare RuntimeError, download errors as FileNotFoundError.
        link = link.__cause__
    if isinstance(error, OSError) and error.filename:
        return InputMissing(f"{error.filename}: {error.strerror}")
    return _connection(error, repo_id) if isinstance(error, RuntimeError) else None


def _redacted(text: object) -> str:
    shown = str(text)
    try:
        token = get_token()
    except Exception:  # whatever keeps a token from us cannot be in the text either
        token = None
    return visible(shown.replace(token, "***") if token else shown)


def _http(error: BaseException, repo_id: str) -> HubError:
    assert isinstance(error, HfHubHTTPError)
    status = error.response.status_code
    details = [f"the Hub says: {_redacted(error.server_message)}"] if error.server_message else []
    message, hint = _explained(status, repo_id, error)
    return HubError(message, details=details, hint=hint)


def _explained(status: int, repo_id: str, error: HfHubHTTPError) -> tuple[str, str]:
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id}: has no such branch", "create the branch on the Hub first"
    if status in (401, 403):
        return _refused(status, repo_id)
    if status == 404:
        return f"{repo_id}: not found on {endpoint()}", "check the name and who may see it"
    if status == 412:
        return f"{repo_id}: somebody else pushed at the same time", "push again"
    if status == 429:
        return f"{endpoint()} asks for fewer requests (429)", "wait a few minutes and push again"
    if status >= 500:
        return f"{endpoint()} has trouble (HTTP {status})", _LATER
    return f"{endpoint()} refused (HTTP {status})", "see what the Hub says above"


def _refused(status: int, repo_id: str) -> tuple[str, str]:
    """401 and 403 say little: ask who this token belongs to, and what it may do."""
    owner = repo_id.partition("/")[0]
    try:
        me = HfApi().whoami()
        name, orgs = str(me["name"]), [str(org["name"]) for org in me.get("orgs") or []]
        role = me.get("auth", {}).get("accessToken", {}).get("role")
    except Exception:  # a better message is all that is at stake
        if status == 401:
            return f"{endpoint()} does not accept this token (401)", LOG_IN
        return f"no right to write to {repo_id} (403)", LOG_IN
    if role == "read":
        return (
            f"this token of {visible(name)} can only read (HTTP {status})",
            "make a token with write access in your Hub settings",
        )
    if owner not in (name, *orgs):
        return (
            f"{repo_id} belongs to {owner}, you are logged in as {visible(name)} (HTTP {status})",
            f"push to {visible(name)}/{repo_id.partition('/')[2]}, or ask to join {owner}",
        )
    return (
        f"this token of {visible(name)} may not write to {repo_id} (HTTP {status})",
        "give the token write access to this repository in your Hub settings",
    )


def _not_logged_in(error: BaseException, repo_id: str) -> HubError:
    return HubError(f"not logged in to {endpoint()}", details=[_redacted(error)], hint=LOG_IN)


def _offline(error: BaseException, repo_id: str) -> HubError:
    return HubError("HF_HUB_OFFLINE is set: nothing can be pushed", hint="unset it and push again")


def _connection(error: BaseException, repo_id: str) -> HubError:
    # The Xet client raises the builtin ConnectionError, also where the server has no Xet at all.
    return HubError(f"the upload to {endpoint()} failed", details=[_redacted(error)], hint=_NO_XET)


def _bad_name(error: BaseException, repo_id: str) -> HubError:
    return HubError(f"{visible(repo_id)}: not a repository name", details=[_redacted(error)])


def _strange(error: BaseException, repo_id: str) -> HubError:
    if isinstance(error.__cause__, HfHubHTTPError):
        return HubError(f"{endpoint()} does not accept the card", details=[_redacted(error)])
    return HubError(
        f"{endpoint()} gave an answer that its client does not understand",
        details=[f"{type(error).__name__}: {_redacted(error)}"],
        hint="is HF_ENDPOINT the address of a Hub? " + _LATER,
    )


_EXPLANATIONS: tuple[
    tuple[tuple[type[BaseException], ...], Callable[[BaseException, str], HubError]], ...
] = (
    ((HfHubHTTPError,), _http),
    ((OfflineModeIsEnabled,), _offline),
    ((LocalTokenNotFoundError,), _not_logged_in),
    ((HFValidationError,), _bad_name),
    ((ConnectionError, TimeoutError), _connection),
    ((ValueError, KeyError, TypeError, AttributeError), _strange),
)
