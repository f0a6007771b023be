"""Functions that make adapters of adapters, and publish them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.algebra.ranks import RankLimits
from loratool.api.arguments import PathArg, engine_of, paths_of, several
from loratool.engine import Progress
from loratool.ops import combine as _combine
from loratool.ops import combine_plan as _combine_plan
from loratool.ops import combine_weights as _combine_weights
from loratool.ops import convert as _convert
from loratool.ops import init as _init
from loratool.ops import recipe as _recipe
from loratool.ops import resize as _resize
from loratool.ops import weight_search as _weight_search
from loratool.ops.combine_report import UpdatesReport
from loratool.ops.combine_saved import parse_saved
from loratool.ops.convert import ConvertReport
from loratool.ops.init import InitReport

if TYPE_CHECKING:
    from loratool.ops.push import PushReport


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
    ``rank`` is a number, a rule, or ``"largest"``, the default: the largest that an adapter has at
    that weight; ``min_rank``, ``max_rank`` and ``multiple_of`` bound a rule. ``saved`` is for
    parameters that several adapters store whole: ``"refuse"``, ``"mean"``, ``"first"``, ``"drop"``.
    ``dtype`` is that of the factors (default: the adapters', float32 where they differ).
    ``format`` is that of the result, ``"peft"`` or ``"loralib"``.
    ``write_recipe`` is a file for ``combine_recipe``. ``weights_from`` is a command that prints a
    number for the adapter whose path is put behind it: the weights are searched, from those given,
    in at most ``trials`` trials, to lower it; ``penalty`` times the mean |weight| is added.
    Raises a LoratoolError subclass; nothing is written then.
    """
    asked = _combine_plan.Combination(
        _combine_weights.sources_of(paths_of(adapters), weights),
        method,
        {name.removesuffix("_"): value for name, value in parameters.items()},
        rank=None if rank is None else str(rank),
        limits=RankLimits(min_rank, max_rank, multiple_of),
        saved=parse_saved(saved),
        dtype=dtype,
        seed=seed,
        include=several(include),
        exclude=several(exclude),
        alpha=alpha,
        format=format,
    )
    asked = asked.with_rules(several(weight_rules))
    if write_recipe is not None:
        _recipe.check_recipe_path(Path(write_recipe))
    plan = _combine_plan.plan_combine(asked, Path(output), device=device, overwrite=overwrite)
    found = None
    if weights_from is not None:
        search = _weight_search.Search.of(weights_from, trials, penalty)
        asked, found = _weight_search.search_weights(
            asked, Path(output), search, device=device, engine=engine_of(jobs)
        )
        plan = _combine_plan.plan_combine(asked, Path(output), device=device, overwrite=overwrite)
    report = _combine.run_combine(plan, engine_of(jobs), progress, found)
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
    return _combine.run_combine(plan, engine_of(jobs), progress)


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

    ``rank`` is a number, a rule such as ``"energy:0.95"``, or ``"budget:20MB"`` for all updates;
    ``min_rank``, ``max_rank`` and ``multiple_of`` bound a rule. ``uniform`` gives all updates one
    rank and one scale, ``profile`` what that consumer takes (``"peft"``, ``"vllm"``, ``"sglang"``,
    ``"llama.cpp"``). ``balance`` makes factors of equal size also where the rank stays. ``dtype``
    is that of the factors (default: the adapter's), ``seed`` that of added rows of A. ``format`` is
    that of the result, ``"peft"`` or ``"loralib"``.
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
    return _resize.run_resize(plan, engine_of(jobs), progress)


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

    ``method`` is ``"kaiming"``, ``"gaussian"``, ``"pissa"``, ``"olora"`` or ``"milora"``. The last
    three start from the base's weights and also write ``residual``, the base without the adapter's
    start. ``targets`` are as in ``extract``, and ``alpha`` is ``rank`` unless given. ``dtype`` is
    that of the factors (default: float32), ``base_model`` the base's Hub name. Raises a
    LoratoolError subclass; nothing is written then.
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
        include=several(include),
        exclude=several(exclude),
        seed=seed,
        base_model=base_model,
        format=format,
        overwrite=overwrite,
    )
    return _init.run_init(plan, engine_of(jobs), progress)


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

    ``start``: what training began with, to be taken off again. ``fused_parts``: which of q, k and v
    a loralib file's fused modules hold, such as ``"q,v"``. ``base_model``: the base's Hub name.
    Raises a LoratoolError subclass; nothing is written then.
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


def push(
    adapter: PathArg,
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool = False,
    license: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    picture: bool = False,
    progress: Progress | None = None,
) -> PushReport:
    """Publish an adapter folder on the Hugging Face Hub with a model card.

    ``base_model`` is the base's Hub name, where the adapter does not hold it; ``private`` makes a
    new repository private; ``license`` is an identifier for the card; ``revision`` an existing
    branch; ``message`` the commit's. ``picture`` draws where the updates are strong, and shows it
    in the card; takes the extra ``report``. The token is the one huggingface_hub finds. Raises a
    LoratoolError subclass.
    """
    from loratool.ops import push as _push  # loads the Hub client, which nothing else needs

    plan = _push.plan_push(
        Path(adapter),
        repo_id,
        base_model=base_model,
        private=private,
        licence=license,
        revision=revision,
        message=message,
        picture=picture,
        progress=progress,
    )
    return _push.run_push(plan, progress)
