"""What every conversion is made of: named tensors that are read one at a time, and what they have to be."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from torchtitan.models.llama.attention import BACKENDS, Attention
from torchtitan.models.llama.model import Transformer
from torchtitan.models.llama.shape import ModelShape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The precisions that weights come in."""
LISTED = 10


@dataclass(frozen=True)
class Weight:
    """A tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Tensors:
    """Tensors by name, and how to read one: whole, contiguous, on the CPU, of the shape and dtype stated here."""

    weights: dict[str, Weight]
    read: Callable[[str], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(weight.nbytes for weight in self.weights.values())

    def cast(self, dtype: torch.dtype) -> "Tensors":
        """The same tensors, rounded to `dtype` where they have another."""
        weights = {name: replace(weight, dtype=dtype) for name, weight in self.weights.items()}
        return Tensors(weights, lambda name: self.read(name).to(dtype))

    def without(self, names: Iterable[str]) -> "Tensors":
        """All but these."""
        dropped = set(names)
        return replace(self, weights={name: w for name, w in self.weights.items() if name not in dropped})

    def renamed(self, new_name: Callable[[str], str]) -> "Tensors":
        """The same tensors under other names."""
        old_names = {new_name(name): name for name in self.weights}
        weights = {name: self.weights[old] for name, old in old_names.items()}
        return Tensors(weights, lambda name: self.read(old_names[name]))


@dataclass(frozen=True)
class LeftOut:
    """Tensors of a source that are not part of its conversion, and why."""

    what: str
    tensors: int
    nbytes: int
    dtype: str
    why: str


@dataclass(frozen=True)
class Source:
    """A model to convert.

    Attributes:
        shape: its dimensions.
        tensors: its weights under Meta's names, in the model's order.
        left_out: what lay beside them.
        record: what is known of it besides; it goes with every conversion.
    """

    shape: ModelShape
    tensors: Tensors
    left_out: list[LeftOut] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def trained_length(self) -> int:
        """The longest sequence that the model is known to have been trained with, else what its kind usually is."""
        training = self.record.get("config", {}).get("training", {})
        known = training.get("seq_len") or self.record.get("source", {}).get("max_length")
        return known or (131_072 if self.shape.rope_scaling == "llama3.1" else 8192)


def model_weights(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of each weight of a model, in its order."""
    with torch.device("meta"):
        model = Transformer(shape, Attention(BACKENDS["sdpa"], ""), max_length=1)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_weights(place: Path, stated_in: str, shape: ModelShape, found: dict[str, tuple[int, ...]]) -> list[str]:
    """Compares the weights found in a place with those of a model of the stated shape; returns the model's names.

    Raises:
        ValueError: listing what is missing, unexpected and of another shape.
    """
    expected = model_weights(shape)
    layers = {int(layer[1]) for name in found if (layer := re.match(r"layers\.(\d+)\.", name))}
    if layers != set(range(shape.n_layers)):
        absent = sorted(set(range(shape.n_layers)) - layers)
        raise ValueError(
            f"{place} does not hold the {shape.n_layers} layers of {stated_in}: it has {len(layers)}"
            + (f", without {_some(map(str, absent))}" if absent else "")
        )
    lines = [f"missing: {name}" for name in expected if name not in found]
    lines += [f"unexpected: {name}" for name in found if name not in expected]
    lines += [
        f"other shape: {name} is {list(found[name])} there and {list(wanted)} by {stated_in}"
        for name, wanted in expected.items()
        if name in found and found[name] != wanted
    ]
    if lines:
        raise ValueError(f"{place} does not hold the model of {stated_in}: {_some(lines, '; ')}")
    return list(expected)


def check_dtypes(place: Path, weights: dict[str, Weight]) -> None:
    """Raises ValueError where a tensor has a dtype that no weight has, as quantised ones do."""
    other = {name: weight.dtype for name, weight in weights.items() if weight.dtype not in DTYPES.values()}
    if other:
        name, dtype = next(iter(other.items()))
        raise ValueError(f"{place}: {name} is {dtype}; weights are {', '.join(DTYPES)}")


def group_left_out(weights: dict[str, Weight], reason: Callable[[str], tuple[str, str]]) -> list[LeftOut]:
    """One line for all tensors of a kind; `reason` says (kind, why) of a name."""
    kinds: dict[tuple[str, str], list[Weight]] = defaultdict(list)
    for name, weight in weights.items():
        kinds[reason(name)].append(weight)
    return [
        LeftOut(what, len(ws), sum(w.nbytes for w in ws), ", ".join(sorted({str(w.dtype)[6:] for w in ws})), why)
        for (what, why), ws in kinds.items()
    ]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _some(items: Iterable[str], separator: str = ", ") -> str:
    listed = list(items)
    more = f"{separator}and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    return separator.join(listed[:LISTED]) + more
