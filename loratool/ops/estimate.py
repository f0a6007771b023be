"""What a LoRA of a model costs: parameters, bytes, training memory, merging and extracting it.

From headers or a config alone; no weight is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loratool.adapter import ModuleKind
from loratool.algebra.cost import (
    TrainingMemory,
    lora_parameters,
    merge_flops,
    svd_flops,
    training_memory,
)
from loratool.errors import InputMissing, NothingMatches, UsageError
from loratool.layouts.architectures import parameters_of
from loratool.layouts.architectures.paper import NAMED, PUBLISHED
from loratool.layouts.config import ModelConfig
from loratool.layouts.families import family_of, natural
from loratool.layouts.fused import split_fused
from loratool.layouts.fusing import Undecided
from loratool.layouts.kinds import classify
from loratool.layouts.targets import targeted
from loratool.ops.sources import open_model
from loratool.plural import counted
from loratool.provenance import document
from loratool.storage.checkpoint import read_json_file
from loratool.storage.dtypes import BY_NAME
from loratool.storage.tensors import TensorInfo

SCHEMA_VERSION = 1
ASSUMPTIONS = (
    "weights are 16-bit while training; activations, buffers and fragmentation are not counted",
    "Adam in mixed precision: 2 bytes of weight, 2 of gradient, 12 of optimizer for each trained "
    "parameter; 2 for each frozen one",
    "flops count multiplications and additions",
)
_PAPER_GPT3 = (
    "the LoRA paper reports 1.2 TB of training memory for full fine-tuning of GPT-3 and 350 GB "
    "with LoRA; it does not say how much of the optimizer's state its first figure holds, and the "
    "formula here gives more",
    "the paper's 35 MB adapter is rank 4 on query and value in float16: 36 MiB by count",
)
_QUERY_AND_VALUE = ({"query", "value"}, {"query_proj", "value_proj"}, {"q_proj", "v_proj"})
_HALF, _SINGLE = 2, 4

Shape = tuple[int, ...]


@dataclass(frozen=True)
class AdaptedRow:
    """Adapted matrices of one name and shape. shape: (in, out) or (out, in), as stored."""

    name: str
    matrices: int
    shape: tuple[int, int]
    rank: int
    parameters: int


@dataclass(frozen=True)
class EstimateReport:
    """Costs in parameters, bytes and flops."""

    model: str
    model_type: str | None
    parameters: int
    model_bytes: int
    rank: int
    targets: str
    rows: tuple[AdaptedRow, ...]
    full_training: TrainingMemory
    lora_training: TrainingMemory
    merge_flops: int
    svd_flops: int
    largest_matrix_bytes: int
    notes: tuple[str, ...]

    @property
    def trained(self) -> int:
        """Parameters of the adapter."""
        return sum(row.parameters for row in self.rows)

    @property
    def adapter_bytes(self) -> dict[str, int]:
        """Size of the adapter's tensors by dtype."""
        return {
            "float32": _SINGLE * self.trained,
            "float16": _HALF * self.trained,
            "bfloat16": _HALF * self.trained,
        }

    def to_json(self) -> dict[str, Any]:
        training = {"full": self.full_training, "lora": self.lora_training}
        return document(
            "estimate",
            SCHEMA_VERSION,
            {
                "model": self.model,
                "model_type": self.model_type,
                "parameters": self.parameters,
                "model_bytes": self.model_bytes,
                "rank": self.rank,
                "targets": self.targets,
                "trained_parameters": self.trained,
                "adapter_bytes": self.adapter_bytes,
                "model_over_adapter": self.model_bytes / (_HALF * self.trained),
                "training_memory": {
                    name: {**asdict(memory), "total": memory.total}
                    for name, memory in training.items()
                },
                "merge": {
                    "read_bytes": self.model_bytes + _HALF * self.trained,
                    "written_bytes": self.model_bytes,
                    "flops": self.merge_flops,
                },
                "extract": {
                    "read_bytes": 2 * self.model_bytes,
                    "written_bytes": _HALF * self.trained,
                    "full_svd_flops": self.svd_flops,
                    "largest_matrix_bytes": self.largest_matrix_bytes,
                },
                "modules": [{**vars(row), "shape": list(row.shape)} for row in self.rows],
                "assumptions": list(ASSUMPTIONS),
                "notes": list(self.notes),
            },
        )


def estimate(model: str, *, rank: int = 8, targets: str = "all-linear") -> EstimateReport:
    """Costs of a LoRA of ``rank`` on the matrices that ``targets`` means.

    model: a checkpoint, a config.json or a folder with one, or the name of a system of the LoRA
    paper (``layouts.architectures.paper.NAMED``). Where q, k and v are stored as one matrix,
    asking for one of them means its part, an adapter of its own, as the paper's library has it.
    Raises InputError, NothingMatches, UsageError.
    """
    if rank < 1:
        raise UsageError(f"rank {rank} is not positive")
    source = _source(model)
    kinds = classify(source.shapes, source.config)
    chosen, wholes = _adapted(targets, source, kinds)
    matrices = {name: _matrix(shape) for name, shape in chosen.items()}
    smallest = max(min(shape) for shape in matrices.values())
    if rank > smallest:
        raise UsageError(
            f"rank {rank} is above the smaller side of every adapted matrix (at most {smallest})"
        )
    rows = _rows(matrices, rank)
    trained = sum(row.parameters for row in rows)
    notes = [_fused_note(wholes, rank)] if wholes else []
    clamped = sum(1 for shape in matrices.values() if rank > min(shape))
    if clamped:
        notes.append(
            f"limited by its smaller side: the rank of {counted(clamped, 'matrix', 'matrices')}"
        )
    parameters = sum(math.prod(shape) for shape in source.shapes.values())
    notes += _beside_the_paper(model, rank, rows)
    return EstimateReport(
        model=source.name,
        model_type=source.config.model_type,
        parameters=parameters,
        model_bytes=source.nbytes,
        rank=rank,
        targets=targets,
        rows=rows,
        full_training=training_memory(parameters, parameters),
        lora_training=training_memory(parameters + trained, trained),
        merge_flops=merge_flops(matrices.values(), rank),
        svd_flops=svd_flops(matrices.values()),
        largest_matrix_bytes=_SINGLE * max(math.prod(shape) for shape in matrices.values()),
        notes=(*source.notes, *notes),
    )


@dataclass(frozen=True)
class _Source:
    name: str
    config: ModelConfig
    shapes: dict[str, Shape]
    nbytes: int
    notes: tuple[str, ...]


def _source(model: str) -> _Source:
    path = Path(model)
    if not path.exists():
        if model not in NAMED:
            raise InputMissing(
                f"{model}: no such file or folder, and no model known by this name",
                hint=f"known by name: {', '.join(NAMED)}",
            )
        return _from_config(model, ModelConfig(NAMED[model]))
    is_config = path.name.endswith(".json") and not path.name.endswith(".index.json")
    inside = path / "config.json"
    if is_config:
        return _from_config(model, ModelConfig(read_json_file(path)))
    if path.is_dir() and inside.is_file() and not _holds_weights(path):
        return _from_config(path.resolve().name, ModelConfig(read_json_file(inside)))
    opened = open_model(path)
    tensors = opened.checkpoint.tensors
    return _Source(
        path.resolve().name,
        opened.config,
        {name: info.shape for name, info in tensors.items()},
        opened.checkpoint.size_bytes,
        (),
    )


def _holds_weights(folder: Path) -> bool:
    endings = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
    return any(item.name.endswith(endings) for item in folder.iterdir())


def _from_config(name: str, config: ModelConfig) -> _Source:
    shapes = parameters_of(config)
    size = _HALF * sum(math.prod(shape) for shape in shapes.values())
    head = "from the config alone, in 16 bits; a task's own head is not counted"
    return _Source(name, config, shapes, size, (head,))


def _adapted(
    targets: str, source: _Source, kinds: Mapping[str, ModuleKind]
) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """The adapted tensors' shapes, with parts of fused ones as tensors of their own; and what
    would be adapted instead where whole tensors must be, {} where that is the same."""
    try:
        names = targeted(targets, kinds)
        return {name: source.shapes[name] for name in names if _is_matrix(source, name)}, {}
    except NothingMatches:
        parts = _parts(source)
        if not parts:
            raise
        names = targeted(targets, {**kinds, **dict.fromkeys(parts, ModuleKind.LINEAR)})
    stored = {n: source.shapes[n] for n in names if n not in parts and _is_matrix(source, n)}
    asked = {name: parts[name] for name in names if name in parts}
    shapes = {name: part.shape for name, part in asked.items()}
    fused = {part.whole: source.shapes[part.whole] for part in asked.values()}
    return {**stored, **shapes}, {**stored, **fused}


def _fused_note(wholes: Mapping[str, Shape], rank: int) -> str:
    count = lora_parameters([_matrix(shape) for shape in wholes.values()], rank)
    names = sorted({family_of(name).removesuffix(".weight") for name in wholes})
    return (
        "q, k and v are stored as one matrix; each part asked for counts as an adapter of its "
        "own, as the LoRA paper's library keeps them (init --format loralib). PEFT adapts whole "
        f"matrices: {', '.join(names)}, {count:,} parameters at this rank"
    )


def _beside_the_paper(model: str, rank: int, rows: Sequence[AdaptedRow]) -> list[str]:
    """What the paper says of this model; its count where the setting is its own."""
    trained = sum(row.parameters for row in rows)
    found = [
        f"the LoRA paper prints {row.printed} M trained parameters for this"
        + ("" if row.agrees(trained) else f"; {trained:,} is the count, which is not that")
        for row in PUBLISHED
        if (row.model, row.rank) == (model, rank)
        and {adapted.name.rpartition(".")[2] for adapted in rows} in _QUERY_AND_VALUE
    ]
    return [*found, *(_PAPER_GPT3 if model == "gpt3-175b" else ())]


@dataclass(frozen=True)
class _Part:
    whole: str
    shape: Shape


def _is_matrix(source: _Source, name: str) -> bool:
    return len(source.shapes[name]) > 1


def _parts(source: _Source) -> dict[str, _Part]:
    """The parts of fused layers as (out, in)."""
    parts: dict[str, _Part] = {}
    for name, shape in source.shapes.items():
        if name.endswith(".weight") and len(shape) == 2:
            info = TensorInfo(name, BY_NAME["BF16"], shape, Path(), 0, 0)
            split = split_fused(name, info, source.config)
            if not isinstance(split, Undecided):
                parts |= {part: _Part(name, value.shape) for part, value in split.items()}
    return parts


def _matrix(shape: Shape) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _rows(matrices: Mapping[str, tuple[int, int]], rank: int) -> tuple[AdaptedRow, ...]:
    counted = Counter((family_of(name), shape) for name, shape in matrices.items())
    return tuple(
        AdaptedRow(
            name.removesuffix(".weight"),
            count,
            shape,
            min(rank, *shape),
            count * lora_parameters([shape], rank),
        )
        for (name, shape), count in sorted(
            counted.items(), key=lambda item: (natural(item[0][0]), item[0][1])
        )
    )


def known_models() -> Sequence[str]:
    """Names that stand for a model without any file."""
    return tuple(NAMED)
