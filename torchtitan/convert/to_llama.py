"""From a checkpoint of a training to weights for other people's code, and to the Hub."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtitan.checkpoint.init_from import checkpoint_folder
from torchtitan.checkpoint.manifest import Record, read_record
from torchtitan.convert.ahead import reading_ahead
from torchtitan.convert.card import model_card, source_weights
from torchtitan.convert.dcp import open_dcp
from torchtitan.convert.hub import check_push, push
from torchtitan.convert.huggingface import write_hf
from torchtitan.convert.meta import write_meta
from torchtitan.convert.output import check_output, whole_folder
from torchtitan.convert.remote import local_input, local_output
from torchtitan.convert.report import progress, summary
from torchtitan.convert.weights import DTYPES, Source
from torchtitan.logging import logger

SHARD_SIZE = 5 * 10**9


def dcp_to_llama(arguments: argparse.Namespace) -> None:
    """Converts a DCP checkpoint to Meta's or Hugging Face's format, and pushes it to the Hub where that is asked for.

    Where an earlier run has finished this very conversion, only the push is left to do.

    Raises:
        ValueError: where the input cannot be converted, the output cannot be written there, or there is no login.
        PushError: where the upload breaks off.
    """
    repo_name = check_push(arguments.hf_repo_name, public=arguments.public) if arguments.push_to_hub else None
    done = False
    with (
        local_input(arguments.input_dir) as given,
        local_output(arguments.output_dir, overwrite=arguments.overwrite) as output_dir,
    ):
        input_dir = checkpoint_folder(given, "--input_dir")
        source = open_dcp(input_dir, arguments.flavor, arguments.rope_scaling)
        conversion = _conversion(arguments, input_dir)
        if repo_name is not None and not arguments.overwrite:
            done = (_record(output_dir) or {}).get("conversion") == conversion
        if done:
            logger.info(f"{output_dir} holds this conversion already")
        else:
            check_output(output_dir, arguments.overwrite)
            _write(source, arguments, output_dir, conversion)
        if repo_name is not None:
            push(output_dir, repo_name, public=arguments.public)


def _write(source: Source, arguments: argparse.Namespace, output_dir: Path, conversion: dict[str, Any]) -> None:
    weights = source.tensors.cast(DTYPES[arguments.dtype]) if arguments.dtype else source.tensors
    name = (arguments.hf_repo_name or output_dir.absolute().name).rpartition("/")[2]
    record = {key: source.record[key] for key in ("step", "data", "config", "versions") if key in source.record}
    record |= {"kind": "llama", "model": asdict(source.shape), "conversion": conversion}
    if origin := source_weights(source.record):
        record["source"] = origin
    card = model_card(name, source.shape, source.record, arguments.license, arguments.bits_per_spike)
    logger.info(f"{arguments.input_dir}: {source.shape}")
    with (
        whole_folder(output_dir, record, weights.nbytes, overwrite=arguments.overwrite) as temporary,
        reading_ahead(weights) as ahead,
        progress(ahead) as tensors,
    ):
        if arguments.format == "hf":
            write_hf(temporary, source.shape, tensors, source.trained_length, arguments.max_shard_size or SHARD_SIZE)
        else:
            write_meta(temporary, source.shape, tensors)
        (temporary / "README.md").write_text(card)
    print(summary(weights.weights, source.left_out))
    logger.info(f"{arguments.output_dir} is complete")


def _conversion(arguments: argparse.Namespace, input_dir: Path) -> dict[str, Any]:
    """What was asked for, of which input: two that are equal give the same files."""
    asked = ("format", "dtype", "max_shard_size", "license", "bits_per_spike")
    written = (input_dir / ".metadata").stat()
    return {
        **{key: getattr(arguments, key) for key in asked},
        "input": str(input_dir.absolute()),
        "input_written": written.st_mtime_ns,
    }


def _record(folder: Path) -> Record | None:
    return read_record(folder) if folder.is_dir() else None
