"""Llama in Meta's format: `params.json` beside `consolidated.00.pth`, and more of them where it is model-parallel."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from torchtitan.convert.archive import Archive, Stored, write_tensors
from torchtitan.convert.settings import agreed_rope_scaling, number, read_json, shape_of
from torchtitan.convert.weights import Source, Tensors, Weight, check_dtypes, check_weights, group_left_out
from torchtitan.models.llama import rope
from torchtitan.models.llama.shape import ModelShape

PARAMS = "params.json"
LLAMA_3_WIDTH = {"ffn_dim_multiplier": 1.3, "multiple_of": 1024}


def open_meta(folder: Path, rope_scaling: str | None = None) -> Source:
    """The model of a folder in Meta's format; `rope_scaling` says it where `params.json` does not.

    Raises:
        ValueError: where a file, a shard, a layer or a key is missing, there is more than one model, a shape is not
            that of `params.json`, or a file is damaged or holds anything but tensors.
    """
    path = folder / PARAMS
    shape = _read_params(path, rope_scaling)
    shards = [Archive(file) for file in _shard_files(folder)]
    for shard in shards:
        if not isinstance(shard.content, dict) or not all(isinstance(t, Stored) for t in shard.content.values()):
            raise ValueError(f"{shard.path} is not a dictionary of tensors")
        if shard.content.keys() != shards[0].content.keys():
            raise ValueError(f"{shard.path} and {shards[0].path.name} are shards of different models: other names")
    for name, heads in (("n_heads", shape.n_heads), ("n_kv_heads", shape.n_kv_heads)):
        if heads % len(shards):
            raise ValueError(f"{path}: {name} = {heads} cannot be spread over the {len(shards)} shards in {folder}")

    stored = {name: Weight(t.shape, t.dtype) for name, t in shards[0].content.items()}
    tables = {name: weight for name, weight in stored.items() if name.endswith(("rope.freqs", "freqs_cis"))}
    # Where a shard holds a part of a tensor, its share says along which dimension.
    axes = {name: _split_axis(name, shards, shape) for name in stored if name not in tables}
    found = {name: _whole_shape(name, shards, axis) for name, axis in axes.items()}
    rows = found.get("layers.0.attention.wq.weight", (shape.dim,))[0]
    if rows < shape.dim:
        raise ValueError(
            f"{folder}: its {len(shards)} shards hold {rows} of the {shape.dim} rows of wq that {PARAMS} tells of: "
            "shards are missing, or belong to another model"
        )
    order = check_weights(folder, PARAMS, shape, found)
    weights = {name: Weight(found[name], stored[name].dtype) for name in order}
    check_dtypes(folder, weights)
    for name in (name for name in order if axes[name] is None and len(shards) > 1):
        _check_copies(name, shards)
    tensors = Tensors(weights, lambda name: _read(name, shards, axes[name]))
    left_out = group_left_out(tables, lambda name: (name, "a table that follows from the shape"))
    return Source(shape, tensors, left_out)


def write_meta(folder: Path, shape: ModelShape, tensors: Tensors) -> None:
    """Writes `consolidated.00.pth` and `params.json`."""
    with open(folder / "consolidated.00.pth", "wb") as file:
        write_tensors(file, tensors.weights, (tensors.read(name) for name in tensors.weights))
    params = {
        "dim": shape.dim,
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads,
        "vocab_size": shape.vocab_size,
        **_width_params(shape),
        "norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "use_scaled_rope": shape.rope_scaling == "llama3.1",
    }
    (folder / PARAMS).write_text(json.dumps(params, indent=2) + "\n")


def _read_params(path: Path, rope_scaling: str | None) -> ModelShape:
    params = read_json(path)
    dim, n_heads = number(path, params, "dim"), number(path, params, "n_heads")
    stated = None
    if "use_scaled_rope" in params:
        stated = "llama3.1" if params["use_scaled_rope"] else "none"
        for key, value in (("rope_scaling_factor", rope.FACTOR), ("rope_high_freq_factor", rope.HIGH)):
            if params["use_scaled_rope"] and params.get(key, value) != value:
                raise ValueError(f"{path}: {key} = {params[key]}: only Llama 3.1's scaling is known, with {value:g}")
    return shape_of(
        path,
        dim=dim,
        n_layers=number(path, params, "n_layers"),
        n_heads=n_heads,
        n_kv_heads=number(path, params, "n_kv_heads") if params.get("n_kv_heads") is not None else n_heads,
        ffn_dim=_ffn_dim(dim, number(path, params, "multiple_of"), params.get("ffn_dim_multiplier")),
        vocab_size=number(path, params, "vocab_size"),
        norm_eps=number(path, params, "norm_eps", float),
        rope_theta=number(path, params, "rope_theta", float),
        rope_scaling=agreed_rope_scaling(path, "use_scaled_rope", stated, rope_scaling),
    )


def _ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's formula for the feed-forward width."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def _width_params(shape: ModelShape) -> dict[str, Any]:
    """What makes Meta's formula give the width of this shape: Llama 3's own numbers where they do."""
    if _ffn_dim(shape.dim, LLAMA_3_WIDTH["multiple_of"], LLAMA_3_WIDTH["ffn_dim_multiplier"]) == shape.ffn_dim:
        return LLAMA_3_WIDTH
    # Half a unit above the width, so that no rounding of the quotient can fall below it.
    return {"ffn_dim_multiplier": (shape.ffn_dim + 0.5) / int(2 * 4 * shape.dim / 3), "multiple_of": 1}


def _shard_files(folder: Path) -> list[Path]:
    """`consolidated.00.pth`, `consolidated.01.pth` and so on, without a gap and with nothing else beside them."""
    files = sorted(folder.glob("*.pth"))
    numbers = [re.fullmatch(r"consolidated\.(\d+)\.pth", file.name) for file in files]
    stray = [file.name for file, number in zip(files, numbers, strict=True) if not number]
    if stray:
        raise ValueError(f"{folder} holds .pth files that are no part of a model in Meta's format: {', '.join(stray)}")
    if not files:
        raise ValueError(f"{folder} has no consolidated.00.pth")
    names = [f"consolidated.{number:02}.pth" for number in range(len(files))]
    absent = sorted(set(names) - {file.name for file in files})
    if absent:
        raise ValueError(f"{folder} lacks {', '.join(absent)}, but has {files[-1].name}")
    return [folder / name for name in names]


def _split_axis(name: str, shards: list[Archive], shape: ModelShape) -> int | None:
    """The dimension along which a tensor is spread over the shards; None where each has all of it."""
    if len(shards) == 1 or name.endswith("norm.weight"):
        return None
    if name == "tok_embeddings.weight":  # Llama 3 spreads the vocabulary, Llama 2 the width
        return 0 if shards[0].content[name].shape[-1] == shape.dim else 1
    return 1 if name.endswith(("wo.weight", "w2.weight")) else 0


def _whole_shape(name: str, shards: list[Archive], axis: int | None) -> tuple[int, ...]:
    first = shards[0].content[name]
    for shard in shards[1:]:
        tensor = shard.content[name]
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"{shard.path} and {shards[0].path.name} are shards of different models: {name} is "
                f"{list(tensor.shape)} {tensor.dtype} and {list(first.shape)} {first.dtype}"
            )
    whole = list(first.shape)
    if axis is not None and axis < len(whole):
        whole[axis] *= len(shards)
    return tuple(whole)


def _read(name: str, shards: list[Archive], axis: int | None) -> torch.Tensor:
    parts = [shard.read(shard.content[name]) for shard in (shards if axis is not None else shards[:1])]
    return torch.cat(parts, axis or 0).contiguous() if len(parts) > 1 else parts[0].contiguous()


def _check_copies(name: str, shards: list[Archive]) -> None:
    """What every shard holds whole must be the same in all."""
    first = _read(name, shards[:1], None)
    for shard in shards[1:]:
        if not torch.equal(_read(name, [shard], None), first):
            raise ValueError(
                f"{shard.path} and {shards[0].path.name} are shards of different models: {name} is not the same in them"
            )
