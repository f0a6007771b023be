"""Errors of the Python functions, in the words of their parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import Any

from loratool.errors import LoratoolError
from loratool.storage.disk import refusal

_OPTION = re.compile(
    r"(?P<shell>loratool [a-z][^,;)]*)"
    r"|(?:\b(?P<command>extract|merge|unmerge|swap|combine|convert|init|resize|inspect) )?"
    r"(?<![\w-])(?P<option>--[a-z][a-z-]*|-o\b)"
)
"""A command line, or an option, which "combine --exclude" says to be that command's."""

_OTHERWISE = {
    "-o": "output",
    "--tied": 'ties="both"',
    "--untie": 'ties="apart"',
    "--adapter": "adapters",
    "--weight": "weight_rules",
    "--lambda": "lambda_",
    "--mitigate": "factor",
}
"""Options that a function may have under another name."""


def in_python_words(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; its errors name a parameter (``drop_rest=True``) where ops name an option.

    Options of other commands stay as they are.
    """
    parameters = inspect.signature(function).parameters
    is_open = any(known.kind is known.VAR_KEYWORD for known in parameters.values())

    def word(match: re.Match[str]) -> str:
        command, option = match["command"], match["option"]
        if match["shell"] or (command and not function.__name__.startswith(command)):
            return match[0]
        name = option.strip("-").replace("-", "_")
        if name not in parameters:
            name = _OTHERWISE.get(option, name if is_open else "")
            if not is_open and name.partition("=")[0] not in parameters:
                return match[0]
        elif isinstance(parameters[name].default, bool):
            name += "=True"
        return f"{command} {name}" if command else name

    @wraps(function)
    def speaking(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            raise refusal(error) from error
        except LoratoolError as error:
            error.message = _OPTION.sub(word, error.message)
            error.details = tuple(_OPTION.sub(word, line) for line in error.details)
            error.hint = error.hint and _OPTION.sub(word, error.hint)
            error.args = (error.message,)
            raise

    speaking.__module__ = "loratool"  # where it is found, by pickle too
    return speaking
