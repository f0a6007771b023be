"""Reading a PEFT adapter.

Checked against PEFT 0.21: what its loader does with each kind of key (``base_layer``,
``modules_to_save``, biases, ``token_adapter``), and the shapes, come from its source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loratool.adapter import (
    Adapter,
    DenseUpdate,
    DoraUpdate,
    KasaUpdate,
    LowRankUpdate,
    Replacement,
    TokenRows,
    Update,
    module_of,
)
from loratool.errors import DisagreementError, MalformedFile, Unplaced, UnsupportedInput, UsageError
from loratool.formats.hints import NOTHING, Hints
from loratool.formats.peft_config import CONFIG_FILE, TASK_HEADS, Scaling, read_config, scaling_of
from loratool.formats.peft_experts import Wrapped, decode_parameter, is_bare
from loratool.formats.peft_keys import (
    BASE_COPY,
    DIAGONAL,
    FACTOR,
    FACTOR_BIAS,
    LYCORIS,
    MAGNITUDE,
    PREFIX,
    SAVED,
    TOKENS,
)
from loratool.formats.peft_lycoris import lycoris_updates
from loratool.plural import counted
from loratool.storage.tensors import LazyTensor
from loratool.storage.views import Flattened

_OWN_PARTS = ("lora_", "token_adapter", "trainable_tokens")


def decode(
    label: str,
    tensors: Mapping[str, LazyTensor],
    side_files: Mapping[str, bytes],
    hints: Hints = NOTHING,
) -> Adapter:
    """Read a PEFT LoRA (DoRA, trained biases, tokens and expert parameters among them), LoHa,
    LoKr or set of trained tokens.

    Raises UnsupportedInput for kinds of adapter not handled, MalformedFile for a config or
    factors that make no sense, DisagreementError where config and tensors contradict each other,
    Unplaced for keys of unknown meaning.
    """
    config = read_config(label, side_files)
    if hints.alpha is not None:
        raise UsageError(f"{label}: stores its own alpha; --alpha is for adapters that do not")
    if hints.fused_parts:
        raise UsageError(f"{label}: --fused-parts is for loralib's fused modules, it has none")
    return _Reader(label, tensors, config).read()


class _Reader:
    """One adapter being read: its keys sorted by meaning, then put together module by module."""

    def __init__(self, label: str, tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]):
        self.label = label
        self.tensors = tensors
        self.config = config
        self.updates: dict[str, Update] = {}
        self.base_copies: dict[str, LazyTensor] = {}
        self.factors: dict[str, dict[str, str]] = {}
        self.lycoris: dict[str, dict[str, LazyTensor]] = {}
        self.as_parameters: set[str] = set()
        self.unplaced: list[str] = []
        self.claimed: dict[str, str] = {}
        self.saved_biases: dict[str, Replacement] = {}

    def read(self) -> Adapter:
        for key in self.tensors:
            self._sort(key)
        if self.unplaced:
            raise Unplaced(
                f"{self.label}: {counted(len(self.unplaced), 'tensor has', 'tensors have')} no "
                f"known meaning in a PEFT {self.config['peft_type']} adapter",
                details=self.unplaced[:12],
            )
        if self.factors or self.lycoris:
            scaling = scaling_of(self.label, self.config)
            for name, update in lycoris_updates(self.label, self.lycoris, scaling).items():
                self._put(name, update, f"the factors of {module_of(name)}")
            for module, parts in self.factors.items():
                self._read_module(module, parts, scaling)
        for name, saved in self.saved_biases.items():
            if not isinstance(self.updates.get(name, saved), Replacement):
                self._put(name, saved, f"the saved bias of {module_of(name)}")
            self.updates[name] = saved
        return Adapter(
            self.updates,
            "PEFT",
            base_model=_text(self.config.get("base_model_name_or_path")),
            fan_in_fan_out=bool(self.config.get("fan_in_fan_out")),
            task_type=_text(self.config.get("task_type")),
            base_copies=self.base_copies,
            as_parameters=frozenset(self.as_parameters),
            lacking=tuple(self._lacking()),
        )

    def _lacking(self) -> Iterator[str]:
        """What was trained by the config and is not here: PEFT saved it elsewhere or not at all."""
        modules = {f".{module_of(name)}." for name in self.updates}
        saved = self.config.get("modules_to_save")
        named = [name for name in saved if isinstance(name, str)] if isinstance(saved, list) else []
        heads = TASK_HEADS.get(str(self.config.get("task_type")), ())
        if any(f".{head}." in module for head in heads for module in modules):
            named = [name for name in named if name not in heads]  # one of them is the model's
        for name in named:
            if not any(f".{name}." in module for module in modules):
                yield f"lists {name} in modules_to_save"
        tokens = self.config.get("trainable_token_indices")
        if tokens and not any(isinstance(one, TokenRows) for one in self.updates.values()):
            yield "lists tokens in trainable_token_indices"

    def _sort(self, key: str) -> None:
        name = key.removeprefix(PREFIX)
        tensor = self.tensors[key]
        if found := FACTOR.fullmatch(name):
            module, embedding, side = found.groups()
            self._part(module, f"{embedding or ''}{side}", key)
        elif found := FACTOR_BIAS.fullmatch(name):
            self._part(found[1], "bias", key)
        elif found := MAGNITUDE.fullmatch(name):
            self._part(found[1], "magnitude", key)
        elif found := DIAGONAL.fullmatch(name):
            self._part(found[1], "diagonal", key)
        elif found := LYCORIS.fullmatch(name):
            self._claim(f"{found[2]} of {found[1]}", key)
            self.lycoris.setdefault(found[1], {})[found[2]] = tensor
        elif found := TOKENS.fullmatch(name):
            module = found[1]
            self._put(f"{module}.weight", self._token_rows(module, tensor), key)
        elif found := SAVED.fullmatch(name):
            self._saved(found[1], found[2], tensor, key)
        elif found := BASE_COPY.fullmatch(name):
            module, part = found.groups()
            if part == "bias" and ".base_layer." in name:
                self._put(f"{module}.bias", Replacement(tensor), key)
            elif ".base_layer." in name:
                self._claim(f"the base's weight of {module}", key)
                self.base_copies[f"{module}.weight"] = tensor
        elif key.startswith(PREFIX) and not any(
            part.startswith(("lora_", "token_adapter", "trainable_tokens"))
            for part in name.split(".")
        ):
            self._put(name, Replacement(tensor), key)
        else:
            self.unplaced.append(key)

    def _part(self, module: str, part: str, key: str) -> None:
        what = f"lora_{part}" if part[-1] in "AB" else f"the {part}"
        self._claim(f"{what} of {module}", key)
        self.factors.setdefault(module, {})[part] = key

    def _claim(self, what: str, key: str) -> None:
        """A name with and without PEFT's prefix, or an adapter's name in it, is one name."""
        first = self.claimed.setdefault(what, key)
        if first != key:
            raise MalformedFile(
                f"{self.label}: {first} and {key} both are {what}",
                hint="the file was put together of two; only one of them can be meant",
            )

    def _saved(self, module: str, part: str, tensor: LazyTensor, key: str) -> None:
        """With bias="all" PEFT writes a saved module's bias a second time under its plain name."""
        name = f"{module}.{part}"
        if part == "bias":
            self._claim(f"the saved bias of {module}", key)
            self.saved_biases[name] = Replacement(tensor)
        else:
            self._put(name, Replacement(tensor), key)

    def _put(self, name: str, update: Update, key: str) -> None:
        self._claim(f"an update of {name}", key)
        self.updates[name] = update

    # Modules ------------------------------------------------------------------------------------

    def _read_module(self, module: str, parts: Mapping[str, str], scaling: Scaling) -> None:
        embedding = "embedding_A" in parts or "embedding_B" in parts
        side_a, side_b = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        for side, other in ((side_b, side_a), (side_a, side_b)):
            if other not in parts:
                key = parts.get(side) or next(iter(parts.values()))
                raise MalformedFile(f"{self.label}: {key} has no lora_{other} beside it")
        a, b = self.tensors[parts[side_a]], self.tensors[parts[side_b]]
        wrapped = self._wrapped()
        parameter = wrapped.parameter(module, self.tensors) if wrapped.targets else None
        if parameter is not None:
            self._parameter(parameter, a, b, scaling)
            return
        update = self._low_rank(module, a, b, embedding, scaling)
        whole: Update = update
        if self.config.get("use_dora") and "magnitude" not in parts:
            raise MalformedFile(
                f"{self.label}: {module}: use_dora is set, but it has no lora_magnitude_vector"
            )
        if self.config.get("kasa_config") or "diagonal" in parts:
            whole = self._kasa(module, update, parts)
        if "magnitude" in parts:
            whole = self._dora(module, update, parts["magnitude"])
        self._put(f"{module}.weight", whole, parts[side_a])
        if "bias" in parts:
            self._put(f"{module}.bias", self._bias(module, parts["bias"], update), parts["bias"])
        elif self.config.get("lora_bias") and not embedding:
            raise MalformedFile(
                f"{self.label}: {module}: lora_bias is set, but it has no lora_B.bias"
            )

    def _low_rank(
        self, module: str, a: LazyTensor, b: LazyTensor, embedding: bool, scaling: Scaling
    ) -> LowRankUpdate:
        if len(a.shape) < 2 or len(a.shape) != len(b.shape) or (embedding and len(a.shape) > 2):
            raise MalformedFile(
                f"{self.label}: {module}: factors of shapes {list(b.shape)} and {list(a.shape)}"
            )
        grouped = a.shape[0] != b.shape[1] and b.shape[1] and not a.shape[0] % b.shape[1]
        if len(a.shape) > 2 and grouped:
            raise UnsupportedInput(
                f"{self.label}: {module}: is a grouped convolution (lora_B {list(b.shape)} for "
                f"rank {a.shape[0]}); its lora_A mixes channels of all groups, for which the "
                "weight has no place, so PEFT does not merge it either",
                hint="train it as LoHa or LoKr, or without that layer",
            )
        if a.shape[0] != b.shape[1] or a.shape[0] == 0 or any(side != 1 for side in b.shape[2:]):
            raise MalformedFile(
                f"{self.label}: {module}: lora_B {b.shape} and lora_A {a.shape} do not chain"
            )
        scale, alpha = scaling.of(module, a.shape[0])
        return LowRankUpdate(b, a, scale, alpha, embedding)

    def _kasa(self, module: str, update: LowRankUpdate, parts: Mapping[str, str]) -> KasaUpdate:
        if "diagonal" not in parts or not self.config.get("kasa_config"):
            raise DisagreementError(
                f"{self.label}: {module}: kasa_config in the config and a lora_diag in the file go "
                "together, and one of them is missing",
            )
        diagonal = self.tensors[parts["diagonal"]]
        if "magnitude" in parts or update.is_embedding or diagonal.shape != (update.rank,):
            raise MalformedFile(
                f"{self.label}: {module}: a KaSA with a lora_diag {list(diagonal.shape)} for rank "
                f"{update.rank}" + (" and a magnitude" if "magnitude" in parts else "")
            )
        return KasaUpdate(update, diagonal)

    def _dora(self, module: str, update: LowRankUpdate, key: str) -> DoraUpdate:
        if not self.config.get("use_dora"):
            raise DisagreementError(
                f"{self.label}: {key}: a DoRA magnitude, but the config does not say use_dora",
                hint="PEFT would leave the magnitude out; set use_dora to true if it is meant",
            )
        magnitude = Flattened(self.tensors[key])
        if magnitude.shape != (update.b.shape[0],):
            raise MalformedFile(
                f"{self.label}: {module}: {magnitude.shape[0]} magnitudes for "
                f"{update.b.shape[0]} outputs"
            )
        return DoraUpdate(update, magnitude)

    def _bias(self, module: str, key: str, update: LowRankUpdate) -> DenseUpdate:
        if not self.config.get("lora_bias"):
            raise DisagreementError(
                f"{self.label}: {key}: the config does not say lora_bias",
                hint="PEFT would leave the bias out; set lora_bias to true if it is meant",
            )
        bias = self.tensors[key]
        if bias.shape != (update.b.shape[0],):
            raise MalformedFile(
                f"{self.label}: {module}: a lora_B.bias of shape {list(bias.shape)} for "
                f"{update.b.shape[0]} outputs"
            )
        return DenseUpdate(bias, update.scale)

    # Bare parameters ----------------------------------------------------------------------------

    def _wrapped(self) -> Wrapped:
        targets = self.config.get("target_parameters") or []
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise MalformedFile(f"{self.label}: {CONFIG_FILE} has an unusable target_parameters")
        return Wrapped(self.label, tuple(targets))

    def _parameter(self, name: str, a: LazyTensor, b: LazyTensor, scaling: Scaling) -> None:
        if not is_bare(name):
            self.as_parameters.add(name)
        rank = scaling.rank_of(name)
        scale, alpha = scaling.of(name, None)
        found = decode_parameter(self.label, name, a, b, rank=rank, scale=scale, alpha=alpha)
        for matrix, update in found.items():
            self._put(matrix, update, f"the factors of {name}")

    # Tokens -------------------------------------------------------------------------------------

    def _token_rows(self, module: str, value: LazyTensor) -> TokenRows:
        indices = self._token_indices(module)
        if len(value.shape) != 2 or len(indices) != value.shape[0]:
            raise MalformedFile(
                f"{self.label}: {module}: {len(indices)} trained tokens, but values of shape "
                f"{list(value.shape)}"
            )
        if len(set(indices)) != len(indices) or min(indices, default=0) < 0:
            raise MalformedFile(f"{self.label}: {module}: trained tokens repeat or are negative")
        return TokenRows(tuple(indices), value)

    def _token_indices(self, module: str) -> Sequence[int]:
        key = "token_indices" if "token_indices" in self.config else "trainable_token_indices"
        said = self.config.get(key)
        if isinstance(said, dict):
            ends = [name for name in said if f".{module}".endswith(f".{name}")]
            said = said[max(ends, key=len)] if ends else None
        if not isinstance(said, list) or not all(
            isinstance(index, int) and not isinstance(index, bool) for index in said
        ):
            raise MalformedFile(f"{self.label}: {CONFIG_FILE} has no usable {key} for {module}")
        return said


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
