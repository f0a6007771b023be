"""The Python API: the commands as functions. Paths in, reports out; writing is always explicit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loratool.adapter import Adapter
from loratool.algebra.ranks import RankLimits
from loratool.engine import Engine, Progress
from loratool.errors import UsageError
from loratool.layouts.placing import TieChoice
from loratool.ops import amplification as _amplification
from loratool.ops import catalogue as _catalogue
from loratool.ops import combine as _combine
from loratool.ops import combine_plan as _combine_plan
from loratool.ops import combine_weights as _combine_weights
from loratool.ops import compare as _compare
from loratool.ops import convert as _convert
from loratool.ops import estimate as _estimate
from loratool.ops import extract as _extract
from loratool.ops import extract_plan as _extract_plan
from loratool.ops import init as _init
from loratool.ops import inspect as _inspect
from loratool.ops import inspect_forecast as _forecast
from loratool.ops import intruders as _intruders
from loratool.ops import merge as _merge
from loratool.ops import merge_in_place as _merge_in_place
from loratool.ops import mitigate as _mitigate
from loratool.ops import pair_amplification as _pair_amplification
from loratool.ops import pictures as _pictures
from loratool.ops import recipe as _recipe
from loratool.ops import recover as _recover
from loratool.ops import resize as _resize
from loratool.ops import swap as _swap
from loratool.ops import unmerge as _unmerge
from loratool.ops import verify as _verify
from loratool.ops import verify_claim as _claim
from loratool.ops import weight_search as _weight_search
from loratool.ops.catalogue import CatalogueReport
from loratool.ops.combine_report import UpdatesReport
from loratool.ops.combine_saved import parse_saved
from loratool.ops.compare_report import CompareReport
from loratool.ops.convert import ConvertReport
from loratool.ops.estimate import EstimateReport
from loratool.ops.extract_report import ExtractReport
from loratool.ops.init import InitReport
from loratool.ops.inspect import AdaptersReport
from loratool.ops.inspect_level import Level, parse_level
from loratool.ops.intruders import IntruderReport
from loratool.ops.merge_jobs import Asked
from loratool.ops.merge_report import MergeReport
from loratool.ops.recover import RecoverReport
from loratool.ops.sources import is_adapter
from loratool.ops.sources import open_adapter as _open_adapter
from loratool.ops.swap import SwapReport
from loratool.ops.unmerge_report import UnmergeReport
from loratool.ops.verify_claim import ClaimReport
from loratool.ops.verify_report import VerifyReport
from loratool.ops.views.registry import Viewable
from loratool.storage.checkpoint import Checkpoint
from loratool.storage.checkpoint import open_checkpoint as _open_checkpoint

if TYPE_CHECKING:
    from loratool.ops.push import PushReport

PathArg = str | PathLike[str]
Adapters = PathArg | Sequence[PathArg | tuple[PathArg, float]]
"""One path, or several, each alone or with a weight."""

InspectReport = (
    _inspect.CheckpointReport
    | _inspect.AdapterReport
    | _inspect.PairReport
    | _amplification.AmplificationReport
    | _forecast.ForecastReport
)


def extract(
    base: PathArg,
    tuned: PathArg,
    output: PathArg,
    *,
    rank: str | int = 16,
    rank_for: Mapping[str, str | int] | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    multiple_of: int = 1,
    conv_rank: str | int | None = None,
    targets: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    drop_rest: bool = False,
    split_fused: bool = False,
    exact: bool = False,
    sketch_dtype: str = "auto",
    seed: int = 0,
    base_model: str | None = None,
    profile: str = "peft",
    into: PathArg | None = None,
    alpha: float | None = None,
    bias: str = "whole",
    dora: bool = False,
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write the low-rank adapter that turns ``base`` into ``tuned`` and report its error.

    ``rank`` is a number or a rule such as ``"energy:0.95"`` or ``"full"``; ``conv_rank`` one for
    convolutions, which are stored whole without it. ``into`` is an adapter to continue from: its
    factors are kept, and what it leaves unexplained is extracted (``alpha``: for one that stores
    none). ``split_fused`` names the parts of fused q|k|v and gate|up layers apart, as servers do.
    ``bias="lora_bias"`` stores biases as differences beside the factors, ``dora`` fits directions
    and takes row norms as they are. ``dtype`` is that of the factors (default: the tuned
    checkpoint's). Raises a LoratoolError subclass; nothing is
    written then.
    """
    plan = _extract_plan.plan_extract(
        Path(base),
        Path(tuned),
        Path(output),
        rank=rank,
        rank_for=rank_for,
        min_rank=min_rank,
        max_rank=max_rank,
        multiple_of=multiple_of,
        conv_rank=conv_rank,
        targets=targets,
        dtype=dtype,
        device=device,
        include=include,
        exclude=exclude,
        drop_rest=drop_rest,
        split_fused=split_fused,
        exact=exact,
        sketch_dtype=sketch_dtype,
        seed=seed,
        base_model=base_model,
        profile=profile,
        into=None if into is None else Path(into),
        alpha=alpha,
        bias=bias,
        dora=dora,
        overwrite=overwrite,
    )
    return _extract.run_extract(plan, _engine(jobs), progress)


def merge(
    base: PathArg,
    adapters: Adapters,
    output: PathArg,
    *,
    scale: float = 1.0,
    alpha: float | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    max_shard_size: str | None = None,
    base_check: bool = False,
    lost: bool = False,
    allow_overflow: bool = False,
    allow_lossy: bool = False,
    ties: Literal["refuse", "both", "apart"] = "refuse",
    add_bias: bool = False,
    link: bool = False,
    receipt: bool | PathArg = False,
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Write ``base`` with the adapters' updates added, each weight correctly rounded.

    ``adapters`` is one path, or several, each alone or with a weight. ``scale`` multiplies all
    weights and with them the adapters' own alpha/r. ``alpha`` is for formats that do not store
    it. ``dtype`` is that of the output's floats (default: the base's). ``ties`` is what becomes of
    a tied embedding and head of which an adapter changes one. ``lost`` measures what share of the
    update rounding swallows. ``receipt`` leaves what unmerge needs to restore the base bit for
    bit, in the output or at a path of its own. Raises a LoratoolError subclass; nothing is written
    then.
    """
    plan = _merge.plan_merge(
        Path(base),
        _weighted(adapters),
        Path(output),
        scale=scale,
        alpha=alpha,
        device=device,
        include=include,
        exclude=exclude,
        dtype=dtype,
        max_shard_size=max_shard_size,
        base_check=base_check,
        asked=Asked(lost, allow_overflow),
        allow_lossy=allow_lossy,
        ties=TieChoice(ties),
        add_bias=add_bias,
        link=link,
        receipt=receipt if isinstance(receipt, bool) else Path(receipt),
        overwrite=overwrite,
    )
    return _merge.run_merge(plan, _engine(jobs), progress)


def merge_in_place(
    base: PathArg,
    adapters: Adapters,
    *,
    scale: float = 1.0,
    alpha: float | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    base_check: bool = False,
    ties: Literal["refuse", "both"] = "refuse",
    lost: bool = False,
    allow_overflow: bool = False,
    allow_lossy: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Like ``merge``, into the base's own files, under a journal.

    Files that are links become the folder's own first. If anything fails, everything is put back;
    after a kill, ``recover`` finishes or undoes it. ``ties`` as in ``merge``; what would make the
    files longer is refused. Raises a LoratoolError subclass.
    """
    plan = _merge_in_place.plan_in_place(
        Path(base),
        _weighted(adapters),
        scale=scale,
        alpha=alpha,
        device=device,
        include=include,
        exclude=exclude,
        base_check=base_check,
        ties=TieChoice(ties),
        asked=Asked(lost, allow_overflow),
        allow_lossy=allow_lossy,
    )
    return _merge_in_place.run_in_place(plan, _engine(jobs), progress)


def recover(
    path: PathArg,
    direction: Literal["forward", "back"] | None = None,
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> RecoverReport:
    """What an interrupted ``merge_in_place`` left at ``path``; with a direction, end it that way.

    Raises a LoratoolError subclass.
    """
    if direction is None:
        return _recover.look(Path(path))
    if direction == "back":
        return _recover.recover_back(Path(path), progress)
    return _recover.recover_forward(Path(path), _engine(jobs), progress)


def unmerge(
    merged: PathArg,
    adapters: Adapters,
    output: PathArg,
    *,
    receipt: PathArg | None = None,
    alpha: float | None = None,
    device: str = "auto",
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Write the base that ``adapters`` were merged into, each with its weight.

    With the receipt in the merged folder, or ``receipt``, the base comes back bit for bit;
    without one the nearest to it, and the report counts the weights that are not certain. Raises a
    LoratoolError subclass; nothing is written then.
    """
    plan = _unmerge.plan_unmerge(
        Path(merged),
        _weighted(adapters),
        Path(output),
        receipt=Path(receipt) if receipt is not None else None,
        alpha=alpha,
        device=device,
        overwrite=overwrite,
    )
    return _unmerge.run_unmerge(plan, _engine(jobs), progress)


def swap(
    merged: PathArg,
    remove: Adapters,
    add: Adapters,
    output: PathArg,
    *,
    receipt: PathArg | None = None,
    alpha: float | None = None,
    device: str = "auto",
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> SwapReport:
    """Write the merged checkpoint with ``add`` merged in place of ``remove``, and a new receipt.

    One pass; byte for byte what unmerge and then merge with a receipt give. Needs the receipt of
    ``merged``. Raises a LoratoolError subclass; nothing is written then.
    """
    plan = _swap.plan_swap(
        Path(merged),
        _weighted(remove),
        _weighted(add),
        Path(output),
        receipt=Path(receipt) if receipt is not None else None,
        alpha=alpha,
        device=device,
        overwrite=overwrite,
    )
    return _swap.run_swap(plan, _engine(jobs), progress)


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
    jobs: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare a merged checkpoint with what ``base`` and ``adapters`` make, and say what differs.

    ``fast`` goes by a receipt's hashes (``base`` may be None then) or by a sample of rows. Raises
    a LoratoolError subclass where they cannot be compared.
    """
    plan = _verify.plan_verify(
        Path(merged),
        Path(base) if base is not None else None,
        _weighted(adapters),
        fast=fast,
        receipt=Path(receipt) if receipt is not None else None,
        alpha=alpha,
        device=device,
        seed=seed,
    )
    return _verify.run_verify(plan, _engine(jobs), progress)


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
        engine=_engine(jobs),
        progress=progress,
    )


def combine(
    adapters: Sequence[PathArg],
    output: PathArg,
    *,
    weights: Sequence[float] | None = None,
    method: str = "svd",
    weight_rules: Sequence[str] = (),
    rank: str | int | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    multiple_of: int = 1,
    saved: str = "refuse",
    dtype: str | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    alpha: float | None = None,
    format: str = "peft",
    write_recipe: PathArg | None = None,
    weights_from: str | Sequence[str] | None = None,
    trials: int = 40,
    penalty: float = 0.05,
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
    **parameters: object,
) -> UpdatesReport:
    """Write one adapter made of several, by the method of that name, and report its error.

    ``weights`` is one number per adapter (default: 1 each); ``weight_rules`` are strings as for
    ``--weight``. ``parameters`` are the method's own (``density=0.3``; lambda is ``lambda_``).
    ``format`` is that of the result, ``"peft"`` or ``"loralib"``.
    ``write_recipe`` is a file for ``combine_recipe``. ``weights_from`` is a command that prints a
    number for the adapter whose path is put behind it: the weights are searched, from those given,
    in at most ``trials`` trials, to lower it; ``penalty`` times the mean |weight| is added.
    Raises a LoratoolError subclass; nothing is written then.
    """
    asked = _combine_plan.Combination(
        _combine_weights.sources_of([Path(path) for path in adapters], weights),
        method,
        {name.removesuffix("_"): value for name, value in parameters.items()},
        rank=None if rank is None else str(rank),
        limits=RankLimits(min_rank, max_rank, multiple_of),
        saved=parse_saved(saved),
        dtype=dtype,
        seed=seed,
        include=tuple(include),
        exclude=tuple(exclude),
        alpha=alpha,
        format=format,
    )
    asked = asked.with_rules(weight_rules)
    if write_recipe is not None:
        _recipe.check_recipe_path(Path(write_recipe))
    plan = _combine_plan.plan_combine(asked, Path(output), device=device, overwrite=overwrite)
    found = None
    if weights_from is not None:
        search = _weight_search.Search.of(weights_from, trials, penalty)
        asked, found = _weight_search.search_weights(
            asked, Path(output), search, device=device, engine=_engine(jobs)
        )
        plan = _combine_plan.plan_combine(asked, Path(output), device=device, overwrite=overwrite)
    report = _combine.run_combine(plan, _engine(jobs), progress, found)
    if found is not None:
        _weight_search.forget(Path(output))
    if write_recipe is not None:
        _recipe.write_recipe(Path(write_recipe), asked)
    return report


def combine_recipe(
    recipe: PathArg,
    output: PathArg,
    *,
    device: str = "auto",
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> UpdatesReport:
    """Write the adapter that a YAML recipe describes, and report its error.

    Raises a LoratoolError subclass; nothing is written then.
    """
    asked = _recipe.load_recipe(Path(recipe))
    plan = _combine_plan.plan_combine(asked, Path(output), device=device, overwrite=overwrite)
    return _combine.run_combine(plan, _engine(jobs), progress)


def resize(
    adapter: PathArg,
    output: PathArg,
    *,
    rank: str | int,
    min_rank: int = 1,
    max_rank: int | None = None,
    multiple_of: int = 1,
    uniform: bool = False,
    balance: bool = False,
    profile: str = "peft",
    format: str = "peft",
    dtype: str | None = None,
    device: str = "auto",
    seed: int = 0,
    alpha: float | None = None,
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> UpdatesReport:
    """Write the adapter at another rank: cut optimally, or padded with zeros; report its error.

    ``rank`` is a number, a rule such as ``"energy:0.95"``, or ``"budget:20MB"`` for all updates.
    ``format`` is that of the result, ``"peft"`` or ``"loralib"``.
    Raises a LoratoolError subclass; nothing is written then.
    """
    plan = _resize.plan_resize(
        Path(adapter),
        Path(output),
        rank=rank,
        limits=RankLimits(min_rank, max_rank, multiple_of),
        uniform=uniform,
        balance=balance,
        profile=profile,
        format=format,
        dtype=dtype,
        device=device,
        seed=seed,
        alpha=alpha,
        overwrite=overwrite,
    )
    return _resize.run_resize(plan, _engine(jobs), progress)


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
    engine = _engine(jobs)
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
    if amplification and (tuned is None or exact or level not in (None, "spectra")):
        raise UsageError("amplification is of a pair at level spectra, or of an adapter's base")
    if tuned is not None and amplification:
        return _pair_amplification.amplification_of_pair(
            Path(path), Path(tuned), only=only, device=device, engine=engine, progress=progress
        )
    if tuned is not None:
        return _inspect.inspect_pair(
            Path(path),
            Path(tuned),
            parse_level(level, Level.SPECTRA),
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

    alpha: for those that do not store it. Raises a LoratoolError subclass.
    """
    return _inspect.inspect_adapters(
        [Path(path) for path in paths],
        parse_level(level, Level.SPECTRA),
        only=only,
        alpha=alpha,
        engine=_engine(jobs),
        progress=progress,
    )


def write_html(report: Viewable, path: PathArg, *, overwrite: bool = False) -> None:
    """Write a report of ``inspect``, ``intruders`` or ``compare`` as one HTML file.

    It needs no other file and no network. Takes the extra ``report``. Raises a LoratoolError
    subclass; nothing is written then.
    """
    _pictures.write_pictures([_pictures.Picture("html", Path(path), overwrite)], report)


def write_picture(report: Viewable, path: PathArg, *, overwrite: bool = False) -> None:
    """Write such a report's map and spectra as a PNG or SVG, by the suffix of ``path``.

    Takes the extra ``report``. Raises a LoratoolError subclass; nothing is written then.
    """
    _pictures.write_pictures([_pictures.picture_at(Path(path), overwrite=overwrite)], report)


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
        only=only,
        alpha=alpha,
        device=device,
    )
    return _intruders.find_intruders(looking, engine=_engine(jobs), progress=progress)


def mitigate(
    base: PathArg,
    tuned: PathArg,
    output: PathArg,
    *,
    factor: float,
    top: int = _intruders.TOP,
    epsilon: float = _intruders.EPSILON,
    exact: bool = False,
    only: Sequence[str] = (),
    alpha: float | None = None,
    device: str = "auto",
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> IntruderReport:
    """Write ``tuned``, a checkpoint or an adapter, with its intruders at ``factor`` of their size.

    The rest is as in ``intruders``. Raises a LoratoolError subclass; nothing is written then.
    """
    plan = _mitigate.plan_mitigate(
        Path(base),
        Path(tuned),
        Path(output),
        factor=factor,
        top=top,
        epsilon=epsilon,
        exact=exact,
        only=only,
        alpha=alpha,
        device=device,
        overwrite=overwrite,
    )
    return _mitigate.run_mitigate(plan, _engine(jobs), progress)


def list_models(
    *paths: PathArg,
    only: Sequence[str] = (),
    kind: str | None = None,
    sort: str = "name",
    checksum: bool = False,
    progress: Progress | None = None,
) -> CatalogueReport:
    """Every adapter and checkpoint below folders, from headers and configs alone.

    only: globs over names. kind: "adapter" or "checkpoint". checksum: read those that may be
    duplicates, to be sure. What is wrong with an entry is in its ``health``. Raises a
    LoratoolError subclass.
    """
    return _catalogue.list_models(
        [Path(path) for path in paths or (".",)],
        only=only,
        kind=kind,
        sort=sort,
        checksum=checksum,
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
        [Path(path) for path in adapters],
        alpha=alpha,
        include=include,
        exclude=exclude,
        sample=sample,
        engine=_engine(jobs),
        progress=progress,
    )


def init(
    base: PathArg,
    output: PathArg,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: str = "all-linear",
    method: str = "kaiming",
    residual: PathArg | None = None,
    dtype: str | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    base_model: str | None = None,
    format: str = "peft",
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> InitReport:
    """Write an adapter that PEFT can train from, or (format="loralib") the LoRA authors' library.

    Methods that start from the base's weights also write ``residual``, the base without the
    adapter's start. Raises a LoratoolError subclass; nothing is written then.
    """
    plan = _init.plan_init(
        Path(base),
        Path(output),
        rank=rank,
        alpha=alpha,
        targets=targets,
        method=method,
        residual=None if residual is None else Path(residual),
        dtype=dtype,
        device=device,
        include=include,
        exclude=exclude,
        seed=seed,
        base_model=base_model,
        format=format,
        overwrite=overwrite,
    )
    return _init.run_init(plan, _engine(jobs), progress)


def convert(
    adapter: PathArg,
    output: PathArg,
    *,
    alpha: float | None = None,
    fused_parts: str | None = None,
    start: PathArg | None = None,
    base_model: str | None = None,
    format: str = "peft",
    overwrite: bool = False,
) -> ConvertReport:
    """Write an adapter of any format that loratool reads in another: ``"peft"`` or ``"loralib"``.

    ``start``: what training began with, to be taken off again. Raises a LoratoolError subclass;
    nothing is written then.
    """
    plan = _convert.plan_convert(
        Path(adapter),
        Path(output),
        alpha=alpha,
        fused_parts=fused_parts,
        start=None if start is None else Path(start),
        base_model=base_model,
        format=format,
        overwrite=overwrite,
    )
    return _convert.run_convert(plan)


def estimate(model: PathArg, *, rank: int = 8, targets: str = "all-linear") -> EstimateReport:
    """What a LoRA of ``model`` costs to train, store, merge and extract.

    ``model`` is a checkpoint, a config.json or its folder, or a model of the LoRA paper by name,
    such as ``"gpt3-175b"``. Raises a LoratoolError subclass.
    """
    return _estimate.estimate(str(model), rank=rank, targets=targets)


def push(
    adapter: PathArg,
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool = False,
    picture: bool = False,
    progress: Progress | None = None,
) -> PushReport:
    """Publish an adapter folder on the Hugging Face Hub with a model card.

    ``picture`` draws where the updates are strong, and shows it in the card; takes the extra
    ``report``.
    The token is the one huggingface_hub finds. Raises a LoratoolError subclass.
    """
    from loratool.ops import push as _push  # loads the Hub client, which nothing else needs

    plan = _push.plan_push(
        Path(adapter),
        repo_id,
        base_model=base_model,
        private=private,
        picture=picture,
        progress=progress,
    )
    return _push.run_push(plan, progress)


def open_adapter(path: PathArg, *, alpha: float | None = None) -> Adapter:
    """An adapter's updates by parameter name; tensors are read when asked for."""
    return _open_adapter(Path(path), alpha)


def open_checkpoint(path: PathArg) -> Checkpoint:
    """A checkpoint's tensors by name; each is read when asked for."""
    return _open_checkpoint(Path(path))


def _weighted(adapters: Adapters) -> list[tuple[Path, float]]:
    if isinstance(adapters, str | PathLike):
        return [(Path(adapters), 1.0)]
    return [
        (Path(one[0]), one[1]) if isinstance(one, tuple) else (Path(one), 1.0) for one in adapters
    ]


def _engine(jobs: int | None) -> Engine:
    return Engine() if jobs is None else Engine(jobs)
