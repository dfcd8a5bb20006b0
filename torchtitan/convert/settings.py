"""Reads a model's settings from the JSON that lies beside its weights, or says what is wrong with it."""

import json
from pathlib import Path
from typing import Any

from torchtitan.models.llama.shape import ModelShape


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ValueError: where the file is absent, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def number(path: Path, settings: dict[str, Any], key: str, kind: type[int] | type[float] = int) -> Any:
    """A positive number; a float may be written as an integer.

    Raises:
        ValueError: where it is absent or not one.
    """
    if key not in settings:
        raise ValueError(f"{path} lacks the key {key}")
    value = settings[key]
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not value > 0:
        raise ValueError(f"{path}: {key} = {json.dumps(value)}: not a positive {kind.__name__}")
    return kind(value)


def agreed_rope_scaling(path: Path, key: str, stated: str | None, given: str | None) -> str:
    """The rope scaling that the file states, or that the command line gives where the file does not.

    Raises:
        ValueError: where neither says it, or they contradict each other.
    """
    if stated is None and given is None:
        raise ValueError(
            f"{path} lacks the key {key}, and weights are wrong with another rope scaling than they were trained with: "
            "give --rope_scaling llama3.1 (Llama 3.1) or none (Llama 3 and older)"
        )
    if stated is not None and given is not None and stated != given:
        raise ValueError(f"--rope_scaling {given}: by {key} in {path} it is {stated}")
    return stated or given or ""


def shape_of(path: Path, **dimensions: Any) -> ModelShape:
    """A model's shape, whose heads divide what they have to.

    Raises:
        ValueError: where they do not.
    """
    shape = ModelShape(**dimensions)
    if shape.dim % shape.n_heads or shape.head_dim % 2:
        raise ValueError(f"{path}: {shape.n_heads} heads do not divide a width of {shape.dim} into pairs of channels")
    if shape.n_heads % shape.n_kv_heads:
        raise ValueError(f"{path}: {shape.n_kv_heads} key and value heads do not divide {shape.n_heads} heads")
    return shape
