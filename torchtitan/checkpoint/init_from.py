"""Starts a model from the weights of another run, of a converted model, or of another program's DCP checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch

from torchtitan.checkpoint import folders
from torchtitan.checkpoint.manifest import Files, Record, read_manifest, read_record
from torchtitan.checkpoint.state import load_tensors, mismatches, model_tensors, raise_mismatches, stored_tensors
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.world import from_rank_zero
from torchtitan.logging import logger
from torchtitan.models.llama.model import Transformer

VOCABULARY_WEIGHTS = ("tok_embeddings.weight", "output.weight")


@dataclass(frozen=True)
class Source:
    """Weights that fit the model.

    Attributes:
        folder: the DCP checkpoint that holds them.
        prefix: what stands there before their names: "model." or nothing.
        absent: the model's weights that it does not hold.
        narrow: their dtypes other than float32.
        files: those that are verified while they are read.
        step: of the run that has written them; None where it is not recorded.
    """

    folder: Path
    prefix: str
    absent: list[str]
    narrow: list[str]
    files: Files
    step: int | None


def find_weights(model: Transformer, config: Checkpoint, named: str = "checkpoint.init_from") -> Source:
    """The weights that `checkpoint.init_from` names, compared with the model, which may still be without memory.

    `named` is the setting that the user has given the folder by, where it is another.

    Weights may stand under `model.` or bare; a `freqs_cis` buffer is ignored, as is everything beside the weights of a
    training checkpoint; bf16 and fp16 are widened. Only `checkpoint.init_missing_keys` may be missing.

    Raises:
        ValueError: listing every weight that is missing, unexpected, of another shape, or would be narrowed, and every
            other difference between the recorded model and this one; or naming what is damaged.
    """
    assert config.init_from is not None
    given = Path(config.init_from).expanduser()
    folder = from_rank_zero(lambda: checkpoint_folder(given, named))
    record = from_rank_zero(lambda: _read_record(folder))
    files = files_to_verify(record, config)
    stored = from_rank_zero(lambda: stored_tensors(folder, files))
    prefix = "model." if any(name.startswith("model.") for name in stored) else ""
    stored = {
        name: entry for name, entry in stored.items() if name.startswith(prefix) and not name.endswith("freqs_cis")
    }
    weights = {prefix + name.removeprefix("model."): tensor for name, tensor in model_tensors(model).items()}
    missing_keys = [key.removeprefix("model.") for key in config.init_missing_keys]
    unknown = [key for key in missing_keys if prefix + key not in weights]
    if unknown:
        raise ValueError(f"checkpoint.init_missing_keys names no weights of the model: {', '.join(unknown)}")
    absent = [key for key in missing_keys if prefix + key not in stored]
    for key in absent:
        del weights[prefix + key]

    recorded_shape = dict(record.get("model", {}))
    if all(key in absent for key in VOCABULARY_WEIGHTS):
        recorded_shape.pop("vocab_size", None)
    problems = model.shape.differences(recorded_shape)
    raise_mismatches(folder, problems + mismatches(weights, stored, widen=True))
    narrow = sorted({str(entry.properties.dtype) for entry in stored.values() if entry} - {str(torch.float32)})
    return Source(folder, prefix, absent, narrow, files, record.get("step"))


def load_weights(model: Transformer, source: Source) -> None:
    """Loads them into the model; those that are absent keep their initial values."""
    weights = {name.removeprefix("model."): tensor for name, tensor in model_tensors(model).items()}
    present = {source.prefix + name: tensor for name, tensor in weights.items() if name not in source.absent}
    load_tensors(present, source.folder, files=source.files)
    widened = f", widened from {', '.join(source.narrow)} to float32" if source.narrow else ""
    random = f"; left at their random initial values: {', '.join(source.absent)}" if source.absent else ""
    logger.info(f"starting from the weights in {source.folder}{widened}{random}")


def files_to_verify(record: Record, config: Checkpoint) -> Files:
    """The files whose bytes are compared with their checksums, by `checkpoint.verify`."""
    files: Files = record.get("files", {})
    return {name: files[name] for name in files if config.verify == "full" or name == ".metadata"}


def _read_record(folder: Path) -> Record:
    record = read_record(folder) or {}
    if "files" in record:
        return read_manifest(folder)
    logger.warning(f"{folder} has no manifest: nothing shows whether its files are as they were written")
    return record


def checkpoint_folder(given: Path, named: str) -> Path:
    """`given` itself where it is a DCP checkpoint, else the newest step in it.

    Raises:
        ValueError: where it is neither, with the name of the setting that has given it.
    """
    if (given / ".metadata").is_file():
        return given
    steps = folders.named_steps(given)
    if steps:
        return folders.step_folder(given, steps[-1])
    inside = sorted({metadata.parents[1] for metadata in given.glob("*/step-*/.metadata")})
    hint = f"; did you mean {inside[0]}?" if inside else ""
    reason = "holds neither a DCP checkpoint nor steps of one" if given.is_dir() else "no such folder"
    raise ValueError(f'{named} = "{given}": {reason}{hint}')
