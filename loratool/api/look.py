"""Functions that look at checkpoints and adapters, and write nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loratool.api.arguments import Adapters, PathArg, engine_of, paths_of, several, weighted
from loratool.engine import Progress
from loratool.errors import UsageError
from loratool.ops import amplification as _amplification
from loratool.ops import catalogue as _catalogue
from loratool.ops import compare as _compare
from loratool.ops import estimate as _estimate
from loratool.ops import inspect as _inspect
from loratool.ops import inspect_forecast as _forecast
from loratool.ops import intruders as _intruders
from loratool.ops import pair_amplification as _pair_amplification
from loratool.ops import verify as _verify
from loratool.ops import verify_claim as _claim
from loratool.ops.catalogue import CatalogueReport
from loratool.ops.compare_report import CompareReport
from loratool.ops.estimate import EstimateReport
from loratool.ops.inspect import AdaptersReport
from loratool.ops.inspect_level import Level, parse_level
from loratool.ops.intruders import IntruderReport
from loratool.ops.sources import is_adapter
from loratool.ops.verify_claim import ClaimReport
from loratool.ops.verify_report import VerifyReport

InspectReport = (
    _inspect.CheckpointReport
    | _inspect.AdapterReport
    | _inspect.PairReport
    | _amplification.AmplificationReport
    | _forecast.ForecastReport
)


def inspect(
    path: PathArg,
    tuned: PathArg | None = None,
    *,
    base: PathArg | None = None,
    level: str | None = None,
    only: Sequence[str] = (),
    exact: bool = False,
    amplification: bool = False,
    cost: Sequence[int] = (),
    alpha: float | None = None,
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> InspectReport:
    """Describe a checkpoint or an adapter; with ``tuned``, the change between two checkpoints.

    With ``base``, the checkpoint that an adapter is for: what the adapter amplifies in it, and at
    level values what a merge would lose to rounding. The base of a checkpoint makes the two a
    pair, as ``inspect(base, path)`` does.

    level: "headers" reads no tensor, "values" takes one pass, "spectra" also decomposes.
    By default "headers" of one checkpoint, else "spectra". only: globs over names. exact: every
    singular value of a pair or a checkpoint. cost: of one checkpoint, ranks of adapters to tell
    the cost of. amplification: of a pair, what the change amplifies in the base, instead. Raises a
    LoratoolError subclass.
    """
    engine, only = engine_of(jobs), several(only)
    if cost and (base is not None or tuned is not None or is_adapter(Path(path))):
        raise UsageError("costs are told of one checkpoint, the base")
    if base is not None:
        if tuned is not None:
            raise UsageError("--base is for one more path; of two checkpoints the first is it")
        if is_adapter(Path(path)):
            depth = parse_level(level, Level.SPECTRA)
            if depth is Level.VALUES and not exact:
                return _forecast.forecast(
                    Path(path),
                    Path(base),
                    only=only,
                    alpha=alpha,
                    device=device,
                    engine=engine,
                    progress=progress,
                )
            if exact or depth is Level.HEADERS:
                raise UsageError(
                    "with its base, an adapter is inspected at level values or spectra, which are "
                    "exact",
                    hint="leave --base out for the level headers",
                )
            return _amplification.amplification(
                Path(path),
                Path(base),
                only=only,
                alpha=alpha,
                device=device,
                engine=engine,
                progress=progress,
            )
        path, tuned = base, path
    elif tuned is not None and is_adapter(Path(path)) != is_adapter(Path(tuned)):
        first, second = (path, tuned) if is_adapter(Path(path)) else (tuned, path)
        raise UsageError(
            f"{first} is an adapter, {second} is none",
            hint=f"loratool inspect {first} --base {second} tells what it does there",
        )
    if amplification and (tuned is None or exact or level not in (None, "spectra")):
        raise UsageError("amplification is of a pair at level spectra, or of an adapter's base")
    if tuned is not None and amplification:
        return _pair_amplification.amplification_of_pair(
            Path(path), Path(tuned), only=only, device=device, engine=engine, progress=progress
        )
    if tuned is not None:
        depth = parse_level(level, Level.SPECTRA)
        if exact and depth is not Level.SPECTRA:
            raise UsageError("--exact: goes with --level spectra of a pair")
        return _inspect.inspect_pair(
            Path(path),
            Path(tuned),
            depth,
            only=only,
            exact=exact,
            device=device,
            engine=engine,
            progress=progress,
        )
    if is_adapter(Path(path)):
        if exact:
            raise UsageError("the spectra of adapters are always exact")
        return _inspect.inspect_adapter(
            Path(path),
            parse_level(level, Level.SPECTRA),
            only=only,
            alpha=alpha,
            engine=engine,
            progress=progress,
        )
    return _inspect.inspect_checkpoint(
        Path(path),
        parse_level(level, Level.HEADERS),
        only=only,
        exact=exact,
        cost=cost,
        device=device,
        engine=engine,
        progress=progress,
    )


def inspect_adapters(
    *paths: PathArg,
    level: str | None = None,
    only: Sequence[str] = (),
    alpha: float | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> AdaptersReport:
    """Two or more adapters side by side, each as ``inspect`` describes it.

    level: "headers", "values" or "spectra", the default. Raises a LoratoolError subclass.
    """
    return _inspect.inspect_adapters(
        [Path(path) for path in paths],
        parse_level(level, Level.SPECTRA),
        only=several(only),
        alpha=alpha,
        engine=engine_of(jobs),
        progress=progress,
    )


def intruders(
    base: PathArg,
    tuned: PathArg,
    *,
    top: int = _intruders.TOP,
    epsilon: float = _intruders.EPSILON,
    exact: bool = False,
    only: Sequence[str] = (),
    alpha: float | None = None,
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> IntruderReport:
    """Strong directions of a tuned checkpoint, or of an adapter's merge, that ``base`` lacks.

    top: leading left singular vectors of each linear layer to examine. epsilon: the cosine that
    an intruder has with none of the base's. exact: full decompositions. Raises a LoratoolError
    subclass.
    """
    looking = _intruders.plan_looking(
        Path(base),
        Path(tuned),
        top=top,
        epsilon=epsilon,
        exact=exact,
        only=several(only),
        alpha=alpha,
        device=device,
    )
    return _intruders.find_intruders(looking, engine=engine_of(jobs), progress=progress)


def list_models(
    *paths: PathArg,
    only: Sequence[str] = (),
    kind: str | None = None,
    sort: str = "name",
    checksum: bool = False,
    progress: Progress | None = None,
) -> CatalogueReport:
    """Every adapter and checkpoint below folders, from headers and configs alone.

    only: globs over names. kind: "adapter" or "checkpoint". sort: by a column, such as "size".
    checksum: read those that may be duplicates, to be sure. What is wrong with an entry is in its
    ``health``. Raises a LoratoolError subclass.
    """
    return _catalogue.list_models(
        [Path(path) for path in paths or (".",)],
        only=several(only),
        kind=kind,
        sort=sort,
        checksum=checksum,
        progress=progress,
    )


def verify(
    merged: PathArg,
    base: PathArg | None,
    adapters: Adapters,
    *,
    fast: bool = False,
    receipt: PathArg | None = None,
    alpha: float | None = None,
    device: str = "auto",
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    jobs: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare a merged checkpoint with what ``base`` and ``adapters`` make, and say what differs.

    ``fast`` goes by a receipt's hashes (``base`` may be None then) or by a sample of rows, which
    ``seed`` chooses; ``receipt`` is where that is, if not in the merged folder.
    ``include`` and ``exclude`` are those of the merge. Raises
    a LoratoolError subclass where they cannot be compared.
    """
    plan = _verify.plan_verify(
        Path(merged),
        Path(base) if base is not None else None,
        weighted(adapters),
        fast=fast,
        receipt=Path(receipt) if receipt is not None else None,
        alpha=alpha,
        device=device,
        seed=seed,
        include=several(include),
        exclude=several(exclude),
    )
    return _verify.run_verify(plan, engine_of(jobs), progress)


def verify_adapter(
    adapter: PathArg,
    base: PathArg,
    tuned: PathArg,
    *,
    alpha: float | None = None,
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> ClaimReport:
    """Measure what an adapter misses of the change from ``base`` to ``tuned``, against its report.

    Raises a LoratoolError subclass where they cannot be compared.
    """
    return _claim.verify_claim(
        Path(adapter),
        Path(base),
        Path(tuned),
        alpha=alpha,
        device=device,
        engine=engine_of(jobs),
        progress=progress,
    )


def compare(
    adapters: Sequence[PathArg],
    *,
    alpha: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    sample: int = _compare.SAMPLE,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> CompareReport:
    """Measure two or more adapters of one model against each other, module by module.

    ``sample`` is how many entries of each module the figures on signs come from. Raises a
    LoratoolError subclass.
    """
    return _compare.compare(
        paths_of(adapters),
        alpha=alpha,
        include=several(include),
        exclude=several(exclude),
        sample=sample,
        engine=engine_of(jobs),
        progress=progress,
    )


def estimate(model: PathArg, *, rank: int = 8, targets: str = "all-linear") -> EstimateReport:
    """What a LoRA of this ``rank`` costs to train, store, merge and extract.

    ``model`` is a checkpoint, a config.json or its folder, or a model of the LoRA paper by name,
    such as ``"gpt3-175b"``; ``targets`` are as in ``extract``. Raises a LoratoolError subclass.
    """
    return _estimate.estimate(str(model), rank=rank, targets=targets)
