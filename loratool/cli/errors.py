"""Which exit code each kind of error has."""

from __future__ import annotations

from loratool import errors

EXIT_CODES: tuple[tuple[type[errors.LoratoolError], int, str], ...] = (
    (errors.UsageError, 2, "the request makes no sense"),
    (errors.InputError, 3, "an input is unreadable or malformed"),
    (errors.DisagreementError, 4, "inputs disagree, or nothing matches"),
    (errors.OutputError, 5, "output, disk or lock"),
    (errors.HubError, 6, "the Hub or the network"),
)
"""Class, exit code, meaning."""

BUG = 70
INTERRUPTED = 130

ALL_CODES: tuple[tuple[int, str], ...] = (
    (0, "done"),
    (1, "verify says no; recover found something to do"),
    *((code, meaning) for _, code, meaning in EXIT_CODES),
    (BUG, "a bug in loratool"),
    (INTERRUPTED, "interrupted"),
)
"""Exit code, meaning."""


def exit_code(error: LoratoolErrorType) -> int:
    """The exit code of an error that loratool raised on purpose."""
    return next((code for kind, code, _ in EXIT_CODES if isinstance(error, kind)), BUG)


LoratoolErrorType = errors.LoratoolError
