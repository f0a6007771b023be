"""Weights by trial: the user's own command scores combined adapters, and a search lowers the score.

The idea is LoRAHub's (Huang et al. 2023, arXiv 2307.13269, eq. 1–2): a black-box search over one
weight per adapter, with the mean of |w| as a penalty. The search is a Nelder–Mead simplex, which
needs no gradients and is made again exactly from the scores, so that it can be interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.algebra.search import Point, nelder_mead
from loratool.engine import Engine
from loratool.errors import DisagreementError, InputError, OutputError, UsageError
from loratool.ops.combine import run_combine
from loratool.ops.combine_plan import Combination, plan_combine
from loratool.ops.recipe import recipe_text
from loratool.storage.outputs import staged

BOUND = 1.5
"""LoRAHub's bound on |w|; twice the largest starting weight where that is more."""

STEP = 0.5


@dataclass(frozen=True)
class Search:
    """What is asked for. command: scores the adapter whose path is put behind it. penalty: times
    the mean of |w|, added to the score."""

    command: tuple[str, ...]
    trials: int = 40
    penalty: float = 0.05

    @staticmethod
    def of(command: str | Sequence[str], trials: int, penalty: float) -> Search:
        """Raises UsageError."""
        try:
            words = tuple(shlex.split(command) if isinstance(command, str) else command)
        except ValueError as error:
            raise UsageError(f"the scoring command {command!r} cannot be read: {error}") from None
        if not words:
            raise UsageError("the scoring command is empty")
        if trials < 1:
            raise UsageError("at least one trial is needed")
        if not (math.isfinite(penalty) and penalty >= 0):
            raise UsageError("the penalty must be a number from 0")
        return Search(words, trials, penalty)


@dataclass(frozen=True)
class Trial:
    """One combination that was scored; inf where the command gave no finite number.

    recorded: the score is one that an interrupted search kept.
    """

    weights: Point
    score: float
    recorded: bool = False


Told = Callable[[int, Trial], None]


def search_weights(
    asked: Combination,
    output: Path,
    search: Search,
    *,
    device: str = "auto",
    engine: Engine | None = None,
    told: Told = lambda number, trial: None,
) -> tuple[Combination, dict[str, Any]]:
    """The combination with the best weights found, and the search's part of the report.

    Scores are kept in ``OUTPUT.trials.jsonl`` until the caller is done with them (see ``forget``);
    a search that is started again goes on from there. Raises InputError when the command fails,
    OutputError when the kept scores are those of another search.
    """
    log = _Log(trials_file(output), _key(asked, search))
    start = [source.weight for source in asked.sources]
    bound = max(BOUND, *(2 * abs(weight) for weight in start))
    trials: list[Trial] = []
    with staged(output.with_name(f"{output.name}-search")) as staging:

        def value(point: Point) -> float:
            score = log.scores.get(point)
            recorded = score is not None
            if score is None:
                folder = staging.scratch / f"trial-{len(trials) + 1}"
                score = _score(_weighted(asked, point), folder, search, device, engine)
                log.add(point, score)
            trials.append(Trial(point, score, recorded))
            told(len(trials), trials[-1])
            return score + search.penalty * sum(map(abs, point)) / len(point)

        best, _ = nelder_mead(value, start, step=STEP, bound=bound, trials=search.trials)
    chosen = next(trial for trial in trials if trial.weights == best)
    if not math.isfinite(chosen.score):
        raise InputError("the scoring command gave no finite number for any trial")
    return _weighted(asked, best), {
        "trials": len(trials),
        "penalty": search.penalty,
        "start": {"weights": start, "score": _finite(trials[0].score)},
        "best": {"weights": list(best), "score": chosen.score},
        "scores": [_finite(trial.score) for trial in trials],
    }


def trials_file(output: Path) -> Path:
    """Where the scores are kept while the search is not over."""
    return output.with_name(f"{output.name}.trials.jsonl")


def forget(output: Path) -> None:
    """Remove the kept scores: their adapter is made."""
    trials_file(output).unlink(missing_ok=True)


def _finite(score: float) -> float | None:
    return score if math.isfinite(score) else None


def _weighted(asked: Combination, weights: Point) -> Combination:
    sources = zip(asked.sources, weights, strict=True)
    return replace(asked, sources=tuple(replace(source, weight=w) for source, w in sources))


def _key(asked: Combination, search: Search) -> str:
    text = recipe_text(asked, Path.cwd()) + json.dumps([search.command, search.penalty])
    return hashlib.sha256(text.encode()).hexdigest()


def _score(
    asked: Combination, folder: Path, search: Search, device: str, engine: Engine | None
) -> float:
    try:
        run_combine(plan_combine(asked, folder, device=device), engine)
    except DisagreementError:
        return math.inf  # weights that cancel, or that the method cannot take
    try:
        done = subprocess.run([*search.command, str(folder)], capture_output=True, text=True)
    except OSError as error:
        raise InputError(
            f"the scoring command cannot be run: {search.command[0]}: {error.strerror}"
        ) from None
    finally:
        shutil.rmtree(folder)
    lines = done.stdout.split("\n") if done.returncode == 0 else []
    for line in reversed(lines):
        with suppress(ValueError):
            score = float(line)
            return score if math.isfinite(score) else math.inf
    what = f"ended with {done.returncode}" if done.returncode else "printed no number"
    raise InputError(
        f"the scoring command {what}: {shlex.join(search.command)}",
        details=(done.stderr or done.stdout).splitlines()[-5:],
        hint="it gets the path of a combined adapter as its last argument, and must print a number "
        "(the lower, the better) on a line of its own",
    )


class _Log:
    """Scores on disk: a line that names the search, then one per trial."""

    def __init__(self, path: Path, key: str):
        self._path = path
        self._key = key
        self.scores: dict[Point, float] = {}
        if not path.exists():
            return
        try:
            text = path.read_text()
            *lines, unfinished = text.split("\n")
            head, *rows = [json.loads(line) for line in lines]
            fits = head["search"] == key
            for row in rows if fits else []:
                score = row["score"]
                self.scores[tuple(row["weights"])] = math.inf if score is None else float(score)
        except (ValueError, KeyError, TypeError):
            raise self._foreign() from None
        if not fits:
            raise self._foreign()
        if unfinished:  # the line that was being written when the process died
            path.write_text(text.removesuffix(unfinished))

    def _foreign(self) -> OutputError:
        return OutputError(
            f"{self._path}: holds the scores of another search, or of none",
            hint="remove it, or choose another output",
        )

    def add(self, weights: Point, score: float) -> None:
        is_new = not self._path.exists()
        with open(self._path, "a") as file:
            if is_new:
                file.write(json.dumps({"search": self._key}) + "\n")
            file.write(json.dumps({"weights": weights, "score": _finite(score)}) + "\n")
