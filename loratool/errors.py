"""The exceptions loratool raises on purpose. Anything else that escapes is a bug.

One branch per way of failing, because each branch has its own exit code (see ``cli/errors.py``)
and its own advice. A message says what is wrong in its first line and names the file or tensor;
``details`` lists particulars; ``hint`` says what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence


class LoratoolError(Exception):
    """Base of all errors that loratool raises for its user.

    Args:
        message: One line: what is wrong, naming the file or tensor.
        details: Further lines, for example the names concerned.
        hint: What the user can do about it.
    """

    def __init__(self, message: str, *, details: Sequence[str] = (), hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.details = tuple(details)
        self.hint = hint


class UsageError(LoratoolError):
    """The request itself makes no sense (rank 0, an unknown rule, two options that clash)."""


class MissingExtra(UsageError):
    """An optional dependency is needed and not installed."""


class InputError(LoratoolError):
    """An input cannot be read or is malformed."""


class InputMissing(InputError):
    """A path does not exist, or holds nothing of the kind asked for."""


class MalformedFile(InputError):
    """A file's bytes contradict its format: truncated, overlapping, lying about sizes."""


class TruncatedFile(MalformedFile):
    """A file ends before what its header promises."""


class UnsupportedInput(InputError):
    """A well-formed input that loratool does not handle."""


class Unfinished(InputError):
    """A change in place was interrupted here, or is going on: see ``loratool recover``."""


class NonFiniteValues(InputError):
    """NaN or infinity where numbers are needed."""


class DisagreementError(LoratoolError):
    """Inputs are readable, but do not fit each other."""


class ShapeMismatch(DisagreementError):
    """Two tensors that must agree in shape do not."""


class NothingMatches(DisagreementError):
    """An adapter's module, or a pattern, matches no tensor."""


class Unplaced(DisagreementError):
    """Something in an input would be lost: there is no place for it in the output."""


class RangeOverflow(DisagreementError):
    """A result exceeds the largest finite value of its dtype."""


class OutputError(LoratoolError):
    """The output cannot be written."""


class OutputExists(OutputError):
    """The output is there already."""


class NoSpace(OutputError):
    """Not enough room on the disk."""


class HubError(LoratoolError):
    """The Hub refused, or could not be reached."""
