"""DCP checkpoints as source and as output."""

import warnings
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from torchtitan.checkpoint.manifest import RECORD, Files, read_manifest, read_record
from torchtitan.checkpoint.reader import SafeReader
from torchtitan.checkpoint.writer import CheckedWriter
from torchtitan.convert.archive import Archive, Stored
from torchtitan.convert.weights import Source, Tensors, Weight, check_dtypes, check_weights, group_left_out
from torchtitan.models.llama.shape import FLAVORS, ModelShape

PREFIX = "model."


def open_dcp(folder: Path, flavor: str | None = None, rope_scaling: str | None = None) -> Source:
    """The model of a DCP checkpoint of this project or of the group's older ones, saved on any number of processes.

    Weights may stand behind `model.` or bare. `flavor` and `rope_scaling` say what the checkpoint does not record.

    Raises:
        ValueError: where the folder is no DCP checkpoint, its shape is recorded nowhere, or its weights are not those
            of that shape.
    """
    if not (folder / ".metadata").is_file():
        raise ValueError(f"{folder} is not a DCP checkpoint: it has no .metadata file")
    record = read_record(folder) or {}
    # The tensors' own checksums are compared where they are read.
    files = read_manifest(folder)["files"] if "files" in record else {}
    metadata = SafeReader(folder, {name: files[name] for name in files if name == ".metadata"}).read_metadata()
    entries = {
        name: entry for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }
    prefix = PREFIX if any(name.startswith(PREFIX) for name in entries) else ""
    everything = {name: Weight(tuple(entry.size), entry.properties.dtype) for name, entry in entries.items()}
    ours = {
        name: weight
        for name, weight in everything.items()
        if name.startswith(prefix) and _left_out(name, prefix) is None
    }
    found = {name.removeprefix(prefix): weight.shape for name, weight in ours.items()}

    shape = _shape(folder, record, flavor, rope_scaling, found)
    stated_in = RECORD if "dim" in record.get("model", {}) else f"--flavor {flavor}"
    order = check_weights(folder, stated_in, shape, found)
    check_dtypes(folder, ours)
    tensors = Tensors(
        {name: ours[prefix + name] for name in order},
        lambda name: _read(folder, metadata, prefix + name),
    )
    others = {name: weight for name, weight in everything.items() if name not in ours}
    left_out = group_left_out(others, lambda name: _left_out(name, prefix) or ("other", "not a weight of the model"))
    return Source(shape, tensors, left_out, record)


def write_dcp(folder: Path, tensors: Tensors) -> Files:
    """Writes a DCP checkpoint under the names that this project's have; returns its files, for the manifest."""
    named = tensors.renamed(lambda name: PREFIX + name)
    state = {name: torch.empty(w.shape, dtype=w.dtype, device="meta") for name, w in named.weights.items()}
    written: Files = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant to be
        writer = CheckedWriter(folder, written.update)
        dcp.save(state, storage_writer=writer, planner=_TensorByTensor(named), no_dist=True)
    return written


class _TensorByTensor(DefaultSavePlanner):
    """Reads each tensor when it is written."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.tensors = tensors

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.tensors.read(index.fqn)


def _shape(
    folder: Path,
    record: dict[str, Any],
    flavor: str | None,
    rope_scaling: str | None,
    found: dict[str, tuple[int, ...]],
) -> ModelShape:
    """The recorded shape, which the command line must not contradict, or the one that it gives."""
    recorded = record.get("model", {})
    if "dim" in recorded:
        try:
            shape = ModelShape(**recorded)
        except TypeError as error:
            raise ValueError(f"{folder / RECORD}: not the shape of a model: {error}") from error
    else:
        rope_scaling = recorded.get("rope_scaling", rope_scaling)
        missing = [flag for flag, value in (("--flavor", flavor), ("--rope_scaling", rope_scaling)) if value is None]
        if missing or flavor is None or rope_scaling is None:
            raise ValueError(
                f"{folder} does not record the shape of its model, and its weights do not show the number of heads or "
                f"the rope scaling: give {' and '.join(missing)}"
            )
        vocab_size = found.get("tok_embeddings.weight", (FLAVORS[flavor].vocab_size,))[0]
        shape = ModelShape(**{**vars(FLAVORS[flavor]), "vocab_size": vocab_size, "rope_scaling": rope_scaling})
    if flavor is not None:
        own = {key: value for key, value in vars(FLAVORS[flavor]).items() if key not in ("vocab_size", "rope_scaling")}
        differences = shape.differences({**vars(shape), **own})
        if differences:
            raise ValueError(f"--flavor {flavor} is not the model of {folder}: {', '.join(differences)}")
    if rope_scaling is not None and rope_scaling != shape.rope_scaling:
        raise ValueError(f"--rope_scaling {rope_scaling}: {folder} records {shape.rope_scaling}")
    return shape


def _left_out(name: str, prefix: str) -> tuple[str, str] | None:
    """What this tensor is and why it is no weight of the model; None for a weight."""
    if name.endswith("freqs_cis"):
        return "freqs_cis", "a table that follows from the shape"
    if name.startswith(prefix) and (prefix or name.split(".")[0] not in ("optimizer", "random")):
        return None
    return f"{name.split('.')[0]}.*", "state of the training, not of the model"


def _read(folder: Path, metadata: Metadata, name: str) -> torch.Tensor:
    """One whole tensor from however many pieces."""
    entry: Any = metadata.state_dict_metadata[name]
    if sum(prod(chunk.sizes) for chunk in entry.chunks) != prod(entry.size):
        raise ValueError(f"{folder} is damaged: the pieces of {name} do not make up the whole of it")
    if len(entry.chunks) == 1:
        return _read_piece(folder, metadata, name, entry.chunks[0]).contiguous()
    whole = torch.empty(entry.size, dtype=entry.properties.dtype)
    for chunk in entry.chunks:
        place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[place] = _read_piece(folder, metadata, name, chunk)
    return whole


def _read_piece(folder: Path, metadata: Metadata, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
    place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
    path, dtype = folder / place.relative_path, cast(Any, metadata.state_dict_metadata[name]).properties.dtype
    if place.transform_descriptors:
        raise ValueError(f"{path} is stored with {', '.join(place.transform_descriptors)}, which cannot be read here")
    try:
        with Archive(path, place.offset, place.length) as archive:
            stored = archive.content
            if not isinstance(stored, Stored) or (stored.shape, stored.dtype) != (tuple(chunk.sizes), dtype):
                raise ValueError(f"{path} is damaged: {name} is not there")
            return archive.read(stored)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
