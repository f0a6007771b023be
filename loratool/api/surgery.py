"""Functions that change checkpoints, or make adapters of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from loratool.api.arguments import Adapters, PathArg, engine_of, several, weighted
from loratool.engine import Progress
from loratool.errors import UsageError
from loratool.layouts.placing import TieChoice
from loratool.ops import extract as _extract
from loratool.ops import extract_plan as _extract_plan
from loratool.ops import intruders as _intruders
from loratool.ops import merge as _merge
from loratool.ops import merge_in_place as _merge_in_place
from loratool.ops import mitigate as _mitigate
from loratool.ops import recover as _recover
from loratool.ops import swap as _swap
from loratool.ops import unmerge as _unmerge
from loratool.ops.extract_report import ExtractReport
from loratool.ops.intruders import IntruderReport
from loratool.ops.merge_jobs import Asked
from loratool.ops.merge_report import MergeReport
from loratool.ops.recover import RecoverReport
from loratool.ops.swap import SwapReport
from loratool.ops.unmerge_report import UnmergeReport


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

    ``rank`` is a number, a rule such as ``"energy:0.95"`` or ``"full"``, or a budget for all
    matrices such as ``"budget:20MB"``; ``rank_for`` maps patterns to others or to ``"whole"``, and
    ``min_rank``, ``max_rank`` and ``multiple_of`` bound what a rule says. ``conv_rank`` is for
    convolutions, which are stored whole without it. ``targets`` are the modules to factorise: roles
    (``"attention"``, ``"mlp"``, ``"all-linear"``, ``"all-conv"``), short names (``"q,v"``) or a
    regular expression. ``drop_rest`` leaves out what changed and is not low-rank, which is stored
    whole otherwise. ``profile`` is the consumer: ``"peft"``, ``"vllm"``, ``"sglang"`` or
    ``"llama.cpp"``. ``into`` is an adapter to continue from: its factors are kept, and what it
    leaves unexplained is extracted (``alpha``: for one that stores none). ``split_fused`` names the
    parts of fused q|k|v and gate|up layers apart, as servers do. ``bias="lora_bias"`` stores biases
    as differences beside the factors, ``dora`` fits directions and takes row norms as they are.
    ``exact`` forbids the randomised method, whose products ``sketch_dtype`` is for (``"auto"``,
    ``"float32"``, ``"bfloat16"``). ``dtype`` is that of the factors (default: the tuned
    checkpoint's), ``base_model`` the base's Hub name.

    The report's errors are relative, ‖D − s·B·A‖/‖D‖ of the factors as stored. Raises a
    LoratoolError subclass; nothing is written then.
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
        include=several(include),
        exclude=several(exclude),
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
    return _extract.run_extract(plan, engine_of(jobs), progress)


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
    a tied embedding and head of which an adapter changes one: an error, both change, or both are
    stored apart. ``add_bias`` adds biases that the base's modules lack. ``lost`` measures what
    share of the update rounding swallows. ``allow_overflow`` lets values beyond the dtype's range
    become infinite, ``allow_lossy`` merges into 8-bit weights without scales. ``base_check``: an
    error where the base is not the one that an adapter records. ``max_shard_size`` is a text such
    as ``"5GB"``; ``link`` makes hard links of files that stay as they are. ``receipt`` leaves what
    unmerge needs to restore the base bit for bit, in the output or at a path of its own. Raises a
    LoratoolError subclass; nothing is written then.
    """
    plan = _merge.plan_merge(
        Path(base),
        weighted(adapters),
        Path(output),
        scale=scale,
        alpha=alpha,
        device=device,
        include=several(include),
        exclude=several(exclude),
        dtype=dtype,
        max_shard_size=max_shard_size,
        base_check=base_check,
        asked=Asked(lost, allow_overflow),
        allow_lossy=allow_lossy,
        ties=_tie_choice(ties),
        add_bias=add_bias,
        link=link,
        receipt=receipt if isinstance(receipt, bool) else Path(receipt),
        overwrite=overwrite,
    )
    return _merge.run_merge(plan, engine_of(jobs), progress)


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
    after a kill, ``recover`` finishes or undoes it. Arguments are those of ``merge``; what would
    make the files longer is refused. Raises a LoratoolError subclass.
    """
    plan = _merge_in_place.plan_in_place(
        Path(base),
        weighted(adapters),
        scale=scale,
        alpha=alpha,
        device=device,
        include=several(include),
        exclude=several(exclude),
        base_check=base_check,
        ties=_tie_choice(ties),
        asked=Asked(lost, allow_overflow),
        allow_lossy=allow_lossy,
    )
    return _merge_in_place.run_in_place(plan, engine_of(jobs), progress)


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
    if direction not in (None, "forward", "back"):
        raise UsageError(f"unknown direction {direction!r}", hint="choose forward or back")
    engine = engine_of(jobs)
    if direction is None:
        return _recover.look(Path(path))
    if direction == "back":
        return _recover.recover_back(Path(path), progress)
    return _recover.recover_forward(Path(path), engine, progress)


def unmerge(
    merged: PathArg,
    adapters: Adapters,
    output: PathArg,
    *,
    receipt: PathArg | None = None,
    alpha: float | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Write the base that ``adapters`` were merged into, each with its weight.

    With the receipt in the merged folder, or ``receipt``, the base comes back bit for bit;
    without one the nearest to it, and the report counts the weights that are not certain.
    ``include`` and ``exclude`` are those of the merge, where no receipt tells. Raises a
    LoratoolError subclass; nothing is written then.
    """
    plan = _unmerge.plan_unmerge(
        Path(merged),
        weighted(adapters),
        Path(output),
        receipt=Path(receipt) if receipt is not None else None,
        alpha=alpha,
        device=device,
        include=several(include),
        exclude=several(exclude),
        overwrite=overwrite,
    )
    return _unmerge.run_unmerge(plan, engine_of(jobs), progress)


def swap(
    merged: PathArg,
    remove: Adapters,
    add: Adapters,
    output: PathArg,
    *,
    receipt: PathArg | None = None,
    alpha: float | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tied: bool = False,
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> SwapReport:
    """Write the merged checkpoint with ``add`` merged in place of ``remove``, and a new receipt.

    One pass; byte for byte what unmerge and then merge with a receipt give. Needs the receipt of
    ``merged``. ``include`` and ``exclude`` choose among the updates of ``add``; ``tied`` lets those
    of one side of a tied embedding and head change both. Raises a LoratoolError subclass; nothing
    is written then.
    """
    plan = _swap.plan_swap(
        Path(merged),
        weighted(remove),
        weighted(add),
        Path(output),
        receipt=Path(receipt) if receipt is not None else None,
        alpha=alpha,
        device=device,
        include=several(include),
        exclude=several(exclude),
        tied=tied,
        overwrite=overwrite,
    )
    return _swap.run_swap(plan, engine_of(jobs), progress)


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

    ``factor`` 0 removes them. The rest is as in ``intruders``. Raises a LoratoolError subclass;
    nothing is written then.
    """
    plan = _mitigate.plan_mitigate(
        Path(base),
        Path(tuned),
        Path(output),
        factor=factor,
        top=top,
        epsilon=epsilon,
        exact=exact,
        only=several(only),
        alpha=alpha,
        device=device,
        overwrite=overwrite,
    )
    return _mitigate.run_mitigate(plan, engine_of(jobs), progress)


def _tie_choice(text: str) -> TieChoice:
    """Raises UsageError."""
    try:
        return TieChoice(text)
    except ValueError:
        choices = [choice.value for choice in TieChoice]
        raise UsageError(
            f"unknown choice of ties {text!r}", hint=f"choose {' or '.join(choices)}"
        ) from None
