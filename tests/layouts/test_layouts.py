"""Names, kinds, ties, patterns and placing: where guesses are allowed, and where they are not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.adapter import Adapter, LowRankUpdate, ModuleKind, Replacement, Update
from loratool.errors import (
    DisagreementError,
    LoratoolError,
    NothingMatches,
    ShapeMismatch,
    Unplaced,
    UsageError,
)
from loratool.layouts.config import ModelConfig, is_hub_id
from loratool.layouts.kinds import classify, uses_conv1d
from loratool.layouts.names import head_model_prefix, match_names, near_misses
from loratool.layouts.pairs import align, check_floats
from loratool.layouts.patterns import matches, select
from loratool.layouts.placing import describe, place
from loratool.storage.dtypes import BY_NAME
from loratool.storage.tensors import MemoryTensor, TensorInfo
from tests.builders import GPT2_CONFIG, LLAMA_CONFIG, gpt2_weights, llama_weights, random_tensor

NONE = ModelConfig({})
GPT2 = ModelConfig(GPT2_CONFIG)
LLAMA = ModelConfig(LLAMA_CONFIG)
TIED_LLAMA = ModelConfig(LLAMA_CONFIG | {"tie_word_embeddings": True})


def infos(shapes: Mapping[str, Any], dtype: str = "F32") -> dict[str, TensorInfo]:
    """Descriptions without files: layouts look at names and shapes only."""
    return {
        name: TensorInfo(name, BY_NAME[dtype], tuple(getattr(shape, "shape", shape)), Path(), 0, 0)
        for name, shape in shapes.items()
    }


def low_rank(out: int, into: int, rank: int = 2, **options: Any) -> LowRankUpdate:
    b, a = random_tensor(out, rank), random_tensor(rank, into, seed=1)
    return LowRankUpdate(MemoryTensor(b), MemoryTensor(a), 1.0, float(rank), **options)


def replacement(*shape: int, seed: int = 0) -> Replacement:
    return Replacement(MemoryTensor(random_tensor(*shape, seed=seed)))


def adapter(**updates: Update) -> Adapter:
    return Adapter({name.replace("__", "."): u for name, u in updates.items()}, "PEFT")


# Names ----------------------------------------------------------------------------------------

PART = st.sampled_from(["h", "layers", "0", "1", "attn", "mlp", "q_proj", "c_fc", "wte"])
NAME = st.lists(PART, min_size=1, max_size=4).map(lambda parts: ".".join([*parts, "weight"]))
NAMES = st.sets(NAME, min_size=1, max_size=8)
PREFIX = st.lists(st.sampled_from(["model", "transformer", "base"]), min_size=1, max_size=2).map(
    lambda parts: ".".join(parts) + "."
)


@settings(max_examples=100, deadline=None)
@given(NAMES, PREFIX)
def test_a_prefix_on_every_name_is_found_and_told(names: set[str], prefix: str) -> None:
    longer = {prefix + name for name in names}
    added = match_names(sorted(names), longer)
    assert added.found == {name: prefix + name for name in names}
    assert added.missing == ()
    assert added.note is not None
    assert repr(prefix) in added.note
    assert "added" in added.note
    removed = match_names(sorted(longer), names)
    assert removed.found == {prefix + name: name for name in names}
    assert removed.note is not None
    assert "removed" in removed.note


@settings(max_examples=100, deadline=None)
@given(NAMES, NAMES)
def test_equal_names_are_never_guessed_about(names: set[str], others: set[str]) -> None:
    matched = match_names(sorted(names), names | others)
    assert matched.found == {name: name for name in names}
    assert matched.note is None


@settings(max_examples=200, deadline=None)
@given(NAMES, NAMES)
def test_whatever_the_names_each_is_found_once_or_missing(
    names: set[str], targets: set[str]
) -> None:
    matched = match_names(sorted(names), targets)
    assert set(matched.found) | set(matched.missing) == names
    assert not set(matched.found) & set(matched.missing)
    assert set(matched.found.values()) <= targets
    assert len(set(matched.found.values())) == len(matched.found)
    changes = {_prefix_change(a, b) for a, b in matched.found.items() if a != b}
    assert len(changes) <= 1, "one prefix for all names"
    assert bool(changes) == bool(matched.note)


def _prefix_change(name: str, found: str) -> tuple[str, str]:
    if found.endswith(f".{name}"):
        return "", found.removesuffix(name)
    assert name.endswith(f".{found}")
    return name.removesuffix(found), ""


def test_two_prefixes_with_equal_claims_are_no_answer() -> None:
    targets = ["encoder.h.0.q.weight", "decoder.h.0.q.weight"]
    matched = match_names(["h.0.q.weight"], targets)
    assert matched.missing == ("h.0.q.weight",)
    assert matched.found == {}
    assert matched.note is None


def test_the_prefix_that_fits_most_names_wins_and_the_rest_is_missing() -> None:
    names = ["h.0.q.weight", "h.1.q.weight", "h.2.q.weight"]
    targets = ["m.h.0.q.weight", "m.h.1.q.weight", "n.h.2.q.weight"]
    matched = match_names(names, targets)
    assert matched.missing == ("h.2.q.weight",)
    assert matched.found["h.0.q.weight"] == "m.h.0.q.weight"


def test_a_name_that_merely_ends_alike_is_not_the_same() -> None:
    assert match_names(["q.weight"], ["seq.weight"]).missing == ("q.weight",)


def test_thousands_of_experts_are_matched_quickly() -> None:
    names = [f"layers.{i}.experts.{e}.w1.weight" for i in range(40) for e in range(128)]
    matched = match_names(names, [f"model.{name}" for name in names])
    assert len(matched.found) == len(names)


def test_near_misses_are_near() -> None:
    targets = ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"]
    assert near_misses("language_model.layers.0.self_attn.q_proj.weight", targets)[0] == targets[0]
    assert near_misses("zzz", targets) == []


@pytest.mark.parametrize(
    ("config", "names", "prefix"),
    [
        (GPT2_CONFIG, ["h.0.attn.c_attn.weight"], "transformer."),
        (GPT2_CONFIG, ["transformer.h.0.attn.c_attn.weight"], ""),
        (GPT2_CONFIG | {"architectures": ["GPT2Model"]}, ["h.0.attn.c_attn.weight"], ""),
        ({}, ["h.0.attn.c_attn.weight"], ""),
        ({"model_type": "gpt2"}, ["h.0.attn.c_attn.weight"], ""),
        (LLAMA_CONFIG, ["layers.0.mlp.up_proj.weight"], "model."),
    ],
)
def test_what_a_head_model_puts_before_names(
    config: dict[str, Any], names: list[str], prefix: str
) -> None:
    assert head_model_prefix(names, ModelConfig(config)) == prefix


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("openai-community/gpt2", True),
        ("a/b", True),
        ("gpt2", False),
        ("/home/me/model", False),
        ("./model", False),
        ("../x/y", False),
        ("a/b/c", False),
        ("a/", False),
        ("a/b c", False),
        ("a/" + "b" * 100, False),
    ],
)
def test_hub_ids(text: str, good: bool) -> None:
    assert is_hub_id(text) is good


# Kinds ----------------------------------------------------------------------------------------


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("config", [GPT2, NONE], ids=["config", "no config"])
def test_gpt2(config: ModelConfig) -> None:
    """Its biases tell that weights are (in, out), also those of the square c_proj."""
    kinds = classify(shapes_of(gpt2_weights()), config)
    assert kinds["transformer.h.0.attn.c_attn.weight"] is ModuleKind.CONV1D
    assert kinds["transformer.h.0.attn.c_proj.weight"] is ModuleKind.CONV1D
    assert kinds["transformer.h.0.mlp.c_proj.weight"] is ModuleKind.CONV1D
    assert kinds["transformer.h.0.attn.c_attn.bias"] is ModuleKind.BIAS
    assert kinds["transformer.wte.weight"] is ModuleKind.EMBEDDING
    assert kinds["transformer.wpe.weight"] is ModuleKind.POSITION
    assert kinds["transformer.ln_f.weight"] is ModuleKind.NORM


def test_llama() -> None:
    kinds = classify(shapes_of(llama_weights()), LLAMA)
    assert kinds["model.layers.0.self_attn.q_proj.weight"] is ModuleKind.LINEAR
    assert kinds["lm_head.weight"] is ModuleKind.LINEAR
    assert kinds["model.embed_tokens.weight"] is ModuleKind.EMBEDDING
    assert ModuleKind.CONV1D not in kinds.values()


def test_kernels_and_what_is_no_weight() -> None:
    kinds = classify({"c.weight": (8, 3, 3, 3), "s": (2,), "m.scale": (2,), "n.weight": ()}, NONE)
    assert kinds["c.weight"] is ModuleKind.CONV
    assert kinds["s"] is kinds["m.scale"] is kinds["n.weight"] is ModuleKind.OTHER


SQUARE = {"h.0.attn.c_proj.weight": (8, 8), "h.0.attn.c_proj.bias": (8,)}
IN_OUT = {"h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_attn.bias": (24,)}
OUT_IN = {"h.0.attn.c_attn.weight": (24, 8), "h.0.attn.c_attn.bias": (24,)}
OTHER_OUT_IN = {"h.1.mlp.c_fc.weight": (32, 8), "h.1.mlp.c_fc.bias": (32,)}
BERT = ModelConfig({"model_type": "bert"})


def test_a_square_matrix_alone_decides_nothing() -> None:
    """The config decides then; without one, what the adapter says; without that, (out, in)."""
    name = "h.0.attn.c_proj.weight"
    assert not uses_conv1d(SQUARE, NONE)
    assert uses_conv1d(SQUARE, GPT2)
    assert classify(SQUARE, NONE)[name] is ModuleKind.LINEAR
    assert classify(SQUARE, NONE, adapter_says_conv1d=True)[name] is ModuleKind.CONV1D
    assert classify(SQUARE, BERT, adapter_says_conv1d=True)[name] is ModuleKind.LINEAR


def test_shapes_testify() -> None:
    assert uses_conv1d(SQUARE | IN_OUT, NONE)
    assert not uses_conv1d(SQUARE | OUT_IN, NONE)


@pytest.mark.parametrize(
    ("shapes", "config", "message"),
    [
        (IN_OUT | OTHER_OUT_IN, NONE, r"c_attn.weight is stored as \(in, out\)"),
        (IN_OUT, BERT, r"c_attn.weight is stored as \(in, out\)"),
        (OUT_IN, GPT2, r"stored as \(out, in\), but model_type 'gpt2'"),
    ],
)
def test_contradictions_are_refused(
    shapes: dict[str, tuple[int, ...]], config: ModelConfig, message: str
) -> None:
    with pytest.raises(DisagreementError, match=message):
        uses_conv1d(shapes, config)


# Ties -----------------------------------------------------------------------------------------


# Patterns -------------------------------------------------------------------------------------

NAMES_OF_GPT2 = list(gpt2_weights(layers=12))


@pytest.mark.parametrize(
    ("pattern", "name", "covers"),
    [
        ("c_attn", "transformer.h.0.attn.c_attn.weight", True),
        ("c_att", "transformer.h.0.attn.c_attn.weight", False),
        ("h.1", "transformer.h.1.attn.c_attn.weight", True),
        ("h.1", "transformer.h.11.attn.c_attn.weight", False),
        ("mlp.c_fc", "transformer.h.1.mlp.c_fc.bias", True),
        ("*.mlp.*", "transformer.h.1.mlp.c_fc.bias", True),
        ("*.bias", "transformer.h.1.mlp.c_fc.bias", True),
        ("h.[01]", "transformer.h.0.mlp.c_fc.bias", True),
        ("C_FC", "transformer.h.0.mlp.c_fc.bias", False),
        ("transformer.wte.weight", "transformer.wte.weight", True),
        ("", "transformer.wte.weight", False),
    ],
)
def test_patterns(pattern: str, name: str, covers: bool) -> None:
    assert matches(pattern, name) is covers


def test_select() -> None:
    assert select(NAMES_OF_GPT2, (), ()) == set(NAMES_OF_GPT2)
    chosen = select(NAMES_OF_GPT2, ("c_attn", "c_fc"), ("*.bias", "h.1"))
    assert chosen == {
        f"transformer.h.{layer}.{module}.weight"
        for layer in range(12)
        for module in ("attn.c_attn", "mlp.c_fc")
        if layer != 1
    }


@pytest.mark.parametrize("side", ["include", "exclude"])
def test_a_pattern_that_covers_nothing_is_a_slip(side: str) -> None:
    patterns: dict[str, tuple[str, ...]] = {"include": (), "exclude": ()}
    patterns[side] = ("mlp", "transformer.wte.wieght")
    with pytest.raises(NothingMatches, match=r"'transformer.wte.wieght' matches nothing") as caught:
        select(NAMES_OF_GPT2, patterns["include"], patterns["exclude"])
    assert "closest: transformer.wte.weight" in caught.value.details


# Placing --------------------------------------------------------------------------------------


def test_an_update_lands_in_the_stored_orientation() -> None:
    base = infos(gpt2_weights())
    name = "transformer.h.0.attn.c_attn.weight"
    placed = place([(adapter(**{name: low_rank(24, 8)}), 1.0)], base, GPT2)
    assert placed.updates[name][0].transposed
    assert placed.notes == ()
    square = "transformer.h.0.attn.c_proj.weight"
    assert (
        place([(adapter(**{square: low_rank(8, 8)}), 1.0)], base, GPT2)
        .updates[square][0]
        .transposed
    )
    linear = infos(llama_weights())
    name = "model.layers.0.mlp.up_proj.weight"
    assert (
        not place([(adapter(**{name: low_rank(16, 8)}), 1.0)], linear, LLAMA)
        .updates[name][0]
        .transposed
    )


def test_an_embeddings_update_is_not_transposed() -> None:
    """PEFT's embedding factors make (dim, vocabulary); the table is (vocabulary, dim)."""
    update = low_rank(8, 16, is_embedding=True)
    assert update.shape == (16, 8)
    name = "model.embed_tokens.weight"
    placed = place([(adapter(**{name: update}), 1.0)], infos(llama_weights()), LLAMA)
    assert not placed.updates[name][0].transposed
    assert update.load().dense().shape == (16, 8)


def test_a_prefix_is_bridged_and_told() -> None:
    bare = {n.removeprefix("transformer."): t for n, t in gpt2_weights().items()}
    name = "transformer.h.0.attn.c_attn.weight"
    placed = place([(adapter(**{name: low_rank(24, 8)}), 1.0)], infos(bare), GPT2)
    assert set(placed.updates) == {"h.0.attn.c_attn.weight"}
    assert placed.updates["h.0.attn.c_attn.weight"][0].source == name
    assert "'transformer.' was removed" in placed.notes[0]


def test_a_prefix_is_bridged_for_an_embedding_alone() -> None:
    """Two components are all the name there is."""
    bare = {n.removeprefix("transformer."): t for n, t in gpt2_weights().items()}
    update = replacement(12, 8)
    placed = place([(adapter(**{"transformer.wpe.weight": update}), 1.0)], infos(bare), GPT2)
    assert set(placed.updates) == {"wpe.weight"}


def test_updates_without_a_tensor_are_all_named_with_what_looks_like_them() -> None:
    updates = {
        f"language_model.layers.{i}.self_attn.q_proj.weight": low_rank(8, 8) for i in range(9)
    }
    updates["model.layers.0.self_attn.q_proj.weight"] = low_rank(8, 8)
    with pytest.raises(NothingMatches, match="9 of the adapter's 10 updates match no") as caught:
        place([(adapter(**updates), 1.0)], infos(llama_weights()), LLAMA)
    first, *_, last = caught.value.details
    assert first == (
        "language_model.layers.0.self_attn.q_proj.weight   "
        "closest: model.layers.0.self_attn.q_proj.weight"
    )
    assert last == "… 1 more"


def test_an_empty_adapter() -> None:
    with pytest.raises(NothingMatches, match="holds no update"):
        place([(adapter(), 1.0)], infos(llama_weights()), LLAMA)


@pytest.mark.parametrize(
    ("name", "update", "message"),
    [
        ("model.layers.0.self_attn.q_proj.weight", low_rank(9, 8), r"\[9, 8\], .* \[8, 8\]"),
        ("model.layers.0.mlp.up_proj.weight", low_rank(8, 16), r"\[8, 16\], .* \[16, 8\]"),
        ("model.norm.weight", replacement(9), r"\[9\], .* \[8\]"),
        ("model.embed_tokens.weight", low_rank(8, 17, is_embedding=True), r"\[17, 8\]"),
    ],
)
def test_shapes_that_differ_are_both_named(name: str, update: Update, message: str) -> None:
    with pytest.raises(ShapeMismatch, match=message) as caught:
        place([(adapter(**{name: update}), 1.0)], infos(llama_weights()), LLAMA)
    assert caught.value.message.startswith(f"{name}: ")


def test_a_conv1d_is_not_taken_the_wrong_way_round() -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    with pytest.raises(ShapeMismatch, match=r"\[8, 24\].*\[8, 24\] as \(in, out\)"):
        place([(adapter(**{name: low_rank(8, 24)}), 1.0)], infos(gpt2_weights()), GPT2)


EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"


@pytest.mark.parametrize("side", [EMBEDDING, HEAD])
def test_one_side_of_a_tie_cannot_change_alone(side: str) -> None:
    with pytest.raises(DisagreementError, match=f"changes {side} alone"):
        place([(adapter(**{side: replacement(16, 8)}), 1.0)], infos(gpt2_weights()), GPT2)


def test_both_sides_of_a_tie_change_once() -> None:
    same = replacement(16, 8)
    placed = place([(adapter(**{EMBEDDING: same, HEAD: same}), 1.0)], infos(gpt2_weights()), GPT2)
    assert set(placed.updates) == {EMBEDDING}
    assert "updated once" in placed.notes[-1]
    other = replacement(16, 8, seed=1)
    with pytest.raises(DisagreementError, match="differently"):
        place([(adapter(**{EMBEDDING: same, HEAD: other}), 1.0)], infos(gpt2_weights()), GPT2)


def test_both_sides_of_a_tie_that_are_stored_both_change() -> None:
    names = {"model.embed_tokens.weight": replacement(16, 8), HEAD: replacement(16, 8)}
    placed = place([(adapter(**names), 1.0)], infos(llama_weights()), TIED_LLAMA)
    assert set(placed.updates) == set(names)


def test_two_updates_of_one_tensor() -> None:
    bare = {n.removeprefix("model."): t for n, t in llama_weights().items()}
    names = ["layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(LoratoolError):
        place([(adapter(**{name: low_rank(8, 8) for name in names}), 1.0)], infos(bare), NONE)


# Pairs ----------------------------------------------------------------------------------------


def test_equal_checkpoints_align() -> None:
    weights = infos(gpt2_weights())
    aligned = align(weights, weights, GPT2, GPT2)
    assert {pair.name for pair in aligned.pairs} == set(weights)
    assert aligned.notes == ()
    assert [tie.names[1] for tie in aligned.ties] == ["lm_head.weight"]


@pytest.mark.parametrize("bare_side", ["base", "tuned"])
def test_a_bare_side_aligns_with_a_head_model(bare_side: str) -> None:
    full = infos(gpt2_weights())
    bare = infos({n.removeprefix("transformer."): t for n, t in gpt2_weights().items()})
    sides = (bare, full) if bare_side == "base" else (full, bare)
    aligned = align(*sides, GPT2, NONE)
    assert {pair.name for pair in aligned.pairs} == set(full)
    assert any("'transformer.'" in note for note in aligned.notes)


def test_two_bare_sides_of_a_head_model_get_its_names() -> None:
    bare = infos({n.removeprefix("transformer."): t for n, t in gpt2_weights().items()})
    aligned = align(bare, bare, GPT2, GPT2)
    assert {pair.name for pair in aligned.pairs} == set(gpt2_weights())


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."]
)
@pytest.mark.parametrize("sides", ["base", "tuned", "both"])
def test_what_torch_and_peft_put_before_all_names_is_no_part_of_them(
    wrapper: str, sides: str
) -> None:
    """PEFT finds no module of such a name: the adapter would do nothing."""
    plain = infos(gpt2_weights())
    wrapped = {wrapper + name: info for name, info in plain.items()}
    base = wrapped if sides != "tuned" else plain
    tuned = wrapped if sides != "base" else plain
    aligned = align(base, tuned, GPT2, GPT2)
    assert {pair.name for pair in aligned.pairs} == set(plain)
    assert any(repr(wrapper) in note for note in aligned.notes)


@pytest.mark.parametrize("prefix", ["language_model.", "model.", "transformer.", "net."])
@pytest.mark.parametrize("config", [GPT2, NONE])
def test_a_prefix_of_tuned_that_is_not_the_head_models_is_not_the_adapters(
    prefix: str, config: ModelConfig
) -> None:
    """A training framework's attribute; 'transformer.transformer.' names no module either."""
    plain = infos(gpt2_weights())
    tuned = {prefix + name: info for name, info in plain.items()}
    aligned = align(plain, tuned, config, config)
    assert {pair.name for pair in aligned.pairs} == set(plain)


def test_a_head_models_prefix_that_stands_twice_in_base_stands_once_in_the_adapter() -> None:
    plain = infos(llama_weights())
    aligned = align({f"model.{n}": info for n, info in plain.items()}, plain, LLAMA, LLAMA)
    assert {pair.name for pair in aligned.pairs} == set(plain)


def test_tensors_on_one_side_only_are_named_with_near_misses() -> None:
    base = gpt2_weights()
    tuned = dict(base)
    tuned["transformer.h.0.attn.c_attm.weight"] = tuned.pop("transformer.h.0.attn.c_attn.weight")
    with pytest.raises(NothingMatches, match="2 tensors are in one checkpoint only") as caught:
        align(infos(base), infos(tuned), GPT2, GPT2)
    assert any("closest in base: transformer.h.0.attn.c_attn" in d for d in caught.value.details)
    assert any(d.startswith("only in base: ") for d in caught.value.details)


def test_shapes_that_differ_name_both_sides() -> None:
    base, tuned = gpt2_weights(), gpt2_weights(vocabulary=12)
    with pytest.raises(ShapeMismatch, match="1 tensor differs in shape") as caught:
        align(infos(base), infos(tuned), GPT2, GPT2)
    assert caught.value.details == ("transformer.wte.weight: base [16, 8], tuned [12, 8]",)


def test_constant_buffers_may_be_on_one_side() -> None:
    base = gpt2_weights()
    older = base | {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    aligned = align(infos(base), infos(older), GPT2, GPT2)
    assert aligned.ignored == ("transformer.h.0.attn.bias",)


def test_quantised_against_float_is_refused() -> None:
    shapes = {"m.q.weight": (4, 4)}
    pairs = align(infos(shapes), infos(shapes, "I8"), NONE, NONE).pairs
    with pytest.raises(Unplaced, match="is F32 in base and I8 in tuned"):
        check_floats(list(pairs))
    both = align(infos(shapes, "I64"), infos(shapes, "I64"), NONE, NONE).pairs
    assert check_floats(list(both)) == []


def test_several_adapters_meet_on_one_tensor_with_their_weights() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    one, two = adapter(**{name: low_rank(8, 8)}), adapter(**{name: low_rank(8, 8)})
    placed = place([(one, 0.7), (two, -0.3)], infos(llama_weights()), LLAMA).updates[name]
    assert [(update.weight, update.adapter) for update in placed] == [(0.7, 0), (-0.3, 1)]
    assert "rank" in describe(placed)
    assert " + " in describe(placed)


def test_replaced_values_stand_alone_and_unweighted() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    whole, more = adapter(**{name: replacement(8, 8)}), adapter(**{name: low_rank(8, 8)})
    with pytest.raises(DisagreementError, match=r"q_proj.*replaces values of it"):
        place([(whole, 1.0), (more, 1.0)], infos(llama_weights()), LLAMA)
    with pytest.raises(UsageError, match=r"q_proj.*weight of 0.5"):
        place([(whole, 0.5)], infos(llama_weights()), LLAMA)
