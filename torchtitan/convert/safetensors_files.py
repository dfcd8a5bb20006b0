"""Safetensors, one file or several with an index, read and written one tensor at a time.

A file is the length of its header (8 bytes, little endian), the header (JSON: dtype, shape and place of each tensor),
and the bytes: https://huggingface.co/docs/safetensors. The library writes only what is in memory as a whole.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from torchtitan.convert.settings import read_json
from torchtitan.convert.weights import Tensors, Weight, bytes_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CODES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def open_safetensors(folder: Path) -> Tensors:
    """The tensors of `model.safetensors`, or of the files that the index names; they are mapped, not read.

    Raises:
        ValueError: where a file is missing, damaged or none of the model's, or does not hold what the index says.
    """
    files = _files(folder)
    opened: dict[str, Any] = {}
    weights: dict[str, Weight] = {}
    places: dict[str, str] = {}
    for file, expected in files.items():
        try:
            opened[file] = safe_open(folder / file, framework="pt")
            names = set(opened[file].keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file} is damaged: {error}") from error
        if expected is not None and names != expected:
            different = ", ".join(sorted(names ^ expected)[:3])
            raise ValueError(f"{folder / file} does not hold what {INDEX} says: it differs in {different}")
        for name in sorted(names):
            tensor = opened[file].get_slice(name)
            code = tensor.get_dtype()
            if code not in CODES:
                raise ValueError(f"{folder / file}: {name} is {code}; weights are {', '.join(CODES)}")
            weights[name] = Weight(tuple(tensor.get_shape()), CODES[code])
            places[name] = file
    return Tensors(weights, lambda name: opened[places[name]].get_tensor(name))


def write_safetensors(folder: Path, tensors: Tensors, max_shard_size: int) -> None:
    """Writes `model.safetensors`, or several files of at most that many bytes of weights each, and their index."""
    shards: list[list[str]] = []
    size = 0
    for name, weight in tensors.weights.items():
        if not shards or size + weight.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weight.nbytes
    count = len(shards)
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, Tensors({name: tensors.weights[name] for name in names}, tensors.read))
    if count > 1:
        index = {
            "metadata": {"total_size": tensors.nbytes},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, tensors: Tensors) -> None:
    codes = {dtype: code for code, dtype in CODES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, weight in tensors.weights.items():
        end = position + weight.nbytes
        header[name] = {"dtype": codes[weight.dtype], "shape": list(weight.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in tensors.weights:
            file.write(bytes_of(tensors.read(name)))


def _files(folder: Path) -> dict[str, set[str] | None]:
    """The model's files, each with the names that it has to hold where an index says them."""
    there = {path.name for path in folder.glob("*.safetensors")}
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise ValueError(f"{folder / INDEX} has no weight_map")
        wanted = set(index.values())
    elif any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in there):
        raise ValueError(f"{folder} holds several files of a model, but not their {INDEX}")
    else:
        index, wanted = None, {SINGLE}
    absent, stray = sorted(wanted - there), sorted(there - wanted)
    if absent:
        raise ValueError(f"{folder} lacks {', '.join(absent)}")
    if stray:
        raise ValueError(f"{folder} holds safetensors that are no part of the model: {', '.join(stray)}")
    return {file: None if index is None else {n for n in index if index[n] == file} for file in sorted(wanted)}
