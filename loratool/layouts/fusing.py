"""Projections that a checkpoint stores fused and an adapter names apart, and the other way round.

The query, key and value projections, the gate and up projections, and the experts of a mixture
are one tensor in some checkpoints and several in others. What is offered here are the names that
an adapter may use for parts (or for the whole) of what is stored, and which rows they mean. Which
rows follow from the head counts in the config and the architecture's own code; nothing is offered
where they do not decide. Layouts were read in transformers 5.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loratool.adapter import module_of
from loratool.layouts.config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
_QKV_NAMES = (QKV, ("query", "key", "value"))
_GATE_UP_NAMES = (GATE_UP, ("w1", "w3"))
_DOWN_NAMES = ("down_proj", "w2")
_FUSED_QKV = ("qkv_proj", "query_key_value", "c_attn", "W_pack", "Wqkv")
_CONTIGUOUS_QKV = ("qkv_proj", "W_pack", "Wqkv", "c_attn")
_INTERLEAVED_BY_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom")
_UNKNOWN_ORDER = ("codegen", "chatglm", "dbrx")
_STORED_IN_OUT = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
"""Models whose fused experts are (experts, in, out)."""
_GATE_UP_ALTERNATE = ("gpt_oss",)
"""Models whose fused gate and up projections alternate output by output."""
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.([^.]+)\.weight")


@dataclass(frozen=True)
class Piece:
    """Where one offered name lies, or a part of it.

    target: the stored tensor. rows: how many outputs the offered name has. places: for each
    output of the target the output of the offered name that it is, or −1; None: all in order.
    member: which matrix of a stack. transposed: the stack's matrices are (in, out).
    """

    target: str
    rows: int
    places: tuple[int, ...] | None = None
    member: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Offer:
    """What an offered name stands for. note: the guess that this is."""

    pieces: tuple[Piece, ...]
    note: str


def offered_names(shapes: Shapes, config: ModelConfig, *, conv1d: bool) -> dict[str, Offer]:
    """Names beyond the stored ones that an adapter may use. conv1d: matrices are (in, out)."""
    offers: dict[str, Offer] = {}
    for name, shape in shapes.items():
        offers |= _parts_of(name, shape, config, conv1d)
        if len(shape) == 3 and not name.endswith((".weight", ".bias")):
            offers |= _members_of(name, shape, config)
    offers |= _wholes(shapes)
    offers |= _fused_experts(shapes)
    return {name: offer for name, offer in offers.items() if name not in shapes}


# Fused in the checkpoint ------------------------------------------------------------------------


@dataclass(frozen=True)
class Undecided:
    """The rows of a fused projection's parts are not known. reason: why, for an error."""

    reason: str


Rows = list[list[int]]
"""The outputs of a fused projection that each of its parts has, in order."""


def part_rows(
    name: str, shape: tuple[int, ...], config: ModelConfig, *, conv1d: bool
) -> Rows | Undecided | None:
    """The outputs of q, k and v, or of gate and up, in a fused projection's weight or bias.

    conv1d: matrices are (in, out). None for what is not fused.
    """
    last, part = _last(name), name.rpartition(".")[2]
    if part not in ("weight", "bias") or not 1 <= len(shape) <= 2:
        return None
    rows = shape[-1 if conv1d and last == "c_attn" else 0]
    if last in _FUSED_QKV:
        return _qkv_rows(last, rows, config)
    if last != "gate_up_proj":
        return None
    if rows % 2:
        return Undecided(f"{rows} outputs are not two halves")
    return _contiguous([rows // 2] * 2)


def part_names(name: str) -> tuple[tuple[str, ...], ...]:
    """What the parts of a fused projection are called in other models, the usual names first."""
    return _GATE_UP_NAMES if _last(name) == "gate_up_proj" else _QKV_NAMES


def _parts_of(
    name: str, shape: tuple[int, ...], config: ModelConfig, conv1d: bool
) -> dict[str, Offer]:
    """q, k and v, or gate and up, of a fused projection's weight or bias."""
    found = part_rows(name, shape, config, conv1d=conv1d)
    if found is None or isinstance(found, Undecided):
        return {}
    rows = sum(map(len, found))
    parent, part, last = module_of(module_of(name)), name.rpartition(".")[2], _last(name)
    offers = {}
    for names in part_names(name):
        for offered, taken in zip(names, found, strict=True):
            piece = Piece(name, len(taken), _places(taken, rows))
            full = ".".join(filter(None, (parent, offered, part)))
            offers[full] = Offer((piece,), f"{offered} was read as a part of {last}")
    return offers


def _qkv_rows(last: str, rows: int, config: ModelConfig) -> Rows | Undecided:
    """The rows of q, k and v in a fused tensor with this many."""
    kind = config.model_type
    heads, stated = _number(config, *_HEADS), _number(config, *_GROUPS)
    for value in (heads, stated, width := _number(config, "head_dim")):
        if isinstance(value, Undecided):
            return value
    assert not isinstance(heads, Undecided)
    assert not isinstance(stated, Undecided)
    if kind in _UNKNOWN_ORDER:
        return Undecided(f"models of type {kind} have an order of their own")
    if heads is None:
        return Undecided(f"config.json has none of {', '.join(_HEADS)}")
    groups = stated or heads
    found: Rows | None
    if kind == "falcon" and config.values.get("new_decoder_architecture"):
        found = _grouped(rows, groups, heads // groups)
    elif kind in ("falcon", "gpt_bigcode"):
        multi_query = config.values.get("multi_query", True)
        found = _grouped(rows, 1, heads) if multi_query else _grouped(rows, heads, 1)
    elif last == "query_key_value":
        if kind not in _INTERLEAVED_BY_HEAD:
            return Undecided(f"the order of a query_key_value is not known for type {kind}")
        found = _grouped(rows, heads, 1)
    else:
        size, rest = divmod(rows, heads + 2 * groups)
        found = None if rest else _contiguous([heads * size, groups * size, groups * size])
        hidden = None if stated or width else _number(config, *_HIDDEN)
        expected = heads * size if hidden is None or isinstance(hidden, Undecided) else hidden
        if (width and width != size) or expected != heads * size:
            found = None
    if found is None:
        return Undecided(f"{rows} outputs do not fit {heads} heads, {groups} of keys and values")
    return found


def _grouped(rows: int, groups: int, queries: int) -> list[list[int]] | None:
    """Groups, each of so many query heads, one key head and one value head."""
    heads = groups * (queries + 2)
    if not heads or rows % heads:
        return None
    size = rows // heads
    parts: list[list[int]] = [[], [], []]
    for head in range(heads):
        place = head % (queries + 2)
        which = 0 if place < queries else place - queries + 1
        parts[which] += range(head * size, (head + 1) * size)
    return parts


def _contiguous(sizes: Sequence[int]) -> list[list[int]]:
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def _places(taken: Sequence[int], rows: int) -> tuple[int, ...]:
    places = [-1] * rows
    for index, row in enumerate(taken):
        places[row] = index
    return tuple(places)


# Split in the checkpoint ------------------------------------------------------------------------


def _wholes(shapes: Shapes) -> dict[str, Offer]:
    """A fused projection over the split ones that are stored."""
    offers = {}
    families: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
        *((names, _CONTIGUOUS_QKV) for names in _QKV_NAMES),
        *((names, ("gate_up_proj",)) for names in _GATE_UP_NAMES),
    ]
    for name in shapes:
        for names, fused in families:
            part = name.rpartition(".")[2]
            if _last(name) != names[0] or part not in ("weight", "bias"):
                continue
            parent = module_of(module_of(name))
            siblings = [".".join(filter(None, (parent, last, part))) for last in names]
            if not all(sibling in shapes for sibling in siblings):
                continue
            pieces = tuple(_consecutive({name: shapes[name][0] for name in siblings}))
            for last in fused:
                full = ".".join(filter(None, (parent, last, part)))
                note = f"{last} was read as {', '.join(names)}, one after the other"
                offers[full] = Offer(pieces, note)
    return offers


def _consecutive(rows: Mapping[str, int]) -> Iterator[Piece]:
    total, start = sum(rows.values()), 0
    for name, count in rows.items():
        yield Piece(name, total, tuple(range(start, start + count)))
        start += count


# Experts ----------------------------------------------------------------------------------------


def _members_of(name: str, shape: tuple[int, ...], config: ModelConfig) -> dict[str, Offer]:
    """The matrices of a stack by index, and by the names that split experts have."""
    count, first, second = shape
    owner, _, last = name.rpartition(".")
    transposed = config.model_type in _STORED_IN_OUT
    outputs = second if transposed else first
    offers = {}
    for member in range(count):
        whole = Piece(name, outputs, None, member, transposed)
        offers[f"{name}.{member}"] = Offer((whole,), f"matrix i of {last} is expert i")
        if last in _DOWN_NAMES:
            for down in _DOWN_NAMES:
                offers[f"{owner}.{member}.{down}.weight"] = Offer(
                    (whole,), f"{down} of expert i was read as matrix i of {last}"
                )
        if last == "gate_up_proj" and outputs % 2 == 0:
            halves = _contiguous([outputs // 2] * 2)
            if config.model_type in _GATE_UP_ALTERNATE:
                halves = [list(range(start, outputs, 2)) for start in (0, 1)]
            for names in _GATE_UP_NAMES:
                for part, taken in zip(names, halves, strict=True):
                    places = _places(taken, outputs)
                    piece = Piece(name, len(taken), places, member, transposed)
                    offers[f"{owner}.{member}.{part}.weight"] = Offer(
                        (piece,), f"{part} of expert i was read as a part of matrix i of {last}"
                    )
    return offers


def _fused_experts(shapes: Shapes) -> dict[str, Offer]:
    """The fused parameters that transformers 5 makes of experts stored one by one."""
    experts: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name in shapes:
        if (found := _EXPERT.fullmatch(name)) and len(shapes[name]) == 2:
            experts[found[1], found[2]][found[3]] = name
    offers = {}
    for (owner, member), parts in experts.items():
        for gate, up in _GATE_UP_NAMES:
            if gate in parts and up in parts:
                rows = {parts[last]: shapes[parts[last]][0] for last in (gate, up)}
                offers[f"{owner}.gate_up_proj.{member}"] = Offer(
                    tuple(_consecutive(rows)),
                    f"experts are stored one by one: gate_up_proj was read as {gate}, then {up}",
                )
        for down in _DOWN_NAMES:
            if down in parts:
                name = parts[down]
                offers[f"{owner}.down_proj.{member}"] = Offer(
                    (Piece(name, shapes[name][0]),),
                    f"experts are stored one by one: down_proj was read as {down}",
                )
    return offers


def _last(name: str) -> str:
    return module_of(name).rpartition(".")[2]


def _number(config: ModelConfig, *keys: str) -> int | Undecided | None:
    """What the config, or its text part, has under these keys as a positive number.

    Undecided where two of them differ.
    """
    inner = config.values.get("text_config")
    found = {
        f"{prefix}{key}": value
        for prefix, values in (
            ("", config.values),
            ("text_config.", inner if isinstance(inner, Mapping) else {}),
        )
        for key in keys
        if isinstance(value := values.get(key), int) and not isinstance(value, bool) and value > 0
    }
    if len(set(found.values())) > 1:
        said = " and ".join(f"{key} {value}" for key, value in found.items())
        return Undecided(f"config.json says {said}")
    return next(iter(found.values()), None)
