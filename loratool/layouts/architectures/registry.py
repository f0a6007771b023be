"""Model types and the functions that list their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loratool.errors import MalformedFile, UnsupportedInput
from loratool.layouts.config import ModelConfig
from loratool.layouts.names import head_model_prefix

Shape = tuple[int, ...]
Parameters = Iterator[tuple[str, Shape]]

_MOST = 10**8
_MOST_LAYERS = 10**4


class Sizes:
    """A config's numbers, checked: they come from a file."""

    def __init__(self, config: ModelConfig):
        self._config = config

    def number(self, *names: str, default: int | None = None, most: int = _MOST) -> int:
        """The first of these fields that is there, a positive integer.

        Raises UnsupportedInput where none is and there is no default, MalformedFile for a value
        that is no size.
        """
        for name in names:
            value = self._config.values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
                raise MalformedFile(f"config.json: {name} is {value!r}, not a size")
            return value
        if default is None:
            raise UnsupportedInput(
                f"config.json lacks {' or '.join(names)}, which a model of type "
                f"{self._config.model_type!r} needs",
                hint="name a checkpoint instead: its headers hold all shapes",
            )
        return default

    def layers(self, *names: str) -> range:
        """The layers' numbers."""
        return range(self.number(*names, most=_MOST_LAYERS))

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._config.values.get(name)
        return default if value is None else bool(value)

    def value(self, name: str) -> object:
        return self._config.values.get(name)

    @property
    def architecture(self) -> str:
        return self._config.architecture or ""


@dataclass(frozen=True)
class _Family:
    body: Callable[[Sizes], Parameters]
    tied: bool
    head: str


_FAMILIES: dict[str, _Family] = {}
_WITH_LM_HEAD = ("ForCausalLM", "LMHeadModel")


def architecture(
    *model_types: str, tied: bool = True, head: str = "lm_head"
) -> Callable[[Callable[[Sizes], Parameters]], Callable[[Sizes], Parameters]]:
    """Register a function that lists the parameters of the bare model.

    tied: whether the output head is the embedding unless the config says otherwise, as
    transformers' default for the type is.
    """

    def register(body: Callable[[Sizes], Parameters]) -> Callable[[Sizes], Parameters]:
        for model_type in model_types:
            _FAMILIES[model_type] = _Family(body, tied, head)
        return body

    return register


def known_model_types() -> list[str]:
    """The model types whose parameters can be listed without weights."""
    return sorted(_FAMILIES)


def parameters_of(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter of the model that ``config`` describes: name → shape as stored.

    A language model's own head is listed where it is not the embedding; the heads of other tasks
    are not, for their size is not in the config. Raises UnsupportedInput for an unknown type or
    missing sizes, MalformedFile for sizes that are none.
    """
    family = _FAMILIES.get(config.model_type or "")
    if family is None:
        raise UnsupportedInput(
            f"config.json: model type {config.model_type!r} is not among those whose shapes are "
            "known without weights",
            details=[f"known: {', '.join(known_model_types())}"],
            hint="name a checkpoint instead: its headers hold all shapes",
        )
    sizes = Sizes(config)
    body = dict(family.body(sizes))
    prefix = head_model_prefix(body, config)
    shapes = {prefix + name: shape for name, shape in body.items()}
    tied = sizes.flag("tie_word_embeddings", family.tied)
    if not tied and sizes.architecture.endswith(_WITH_LM_HEAD):
        vocabulary, width = next(iter(body.values()))
        shapes[f"{family.head}.weight"] = (vocabulary, width)
    return shapes


def linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Parameters:
    """A linear layer: weight (out, in), and its bias."""
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def norm(name: str, width: int, *, bias: bool = True) -> Parameters:
    """A normalisation's scale, and its shift."""
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)
