"""From Llama's weights to a checkpoint that a training starts from."""

import argparse
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch

from torchtitan import __version__
from torchtitan.checkpoint.init_from import VOCABULARY_WEIGHTS
from torchtitan.convert.ahead import reading_ahead
from torchtitan.convert.dcp import write_dcp
from torchtitan.convert.huggingface import open_hf
from torchtitan.convert.meta import open_meta
from torchtitan.convert.output import check_output, whole_folder
from torchtitan.convert.remote import local_input, local_output
from torchtitan.convert.report import progress, summary
from torchtitan.convert.weights import Source, group_left_out
from torchtitan.logging import logger


def llama_to_dcp(arguments: argparse.Namespace) -> None:
    """Converts a folder in Meta's or Hugging Face's format to a DCP checkpoint of the weights, in their own dtype.

    Raises:
        ValueError: where the input cannot be converted, or the output cannot be written there.
    """
    overwrite = arguments.overwrite
    with local_output(arguments.output_dir, overwrite=overwrite) as output_dir:
        check_output(output_dir, overwrite)
        with local_input(arguments.input_dir) as input_dir:
            source = open_llama(input_dir, arguments.rope_scaling)
            if not arguments.keep_embeddings:
                source = _without_embeddings(source)
            record = {
                "kind": "weights",
                "model": asdict(source.shape),
                "source": {"name": input_dir.absolute().name, "license": _license(input_dir), **source.record},
                "versions": {"torchtitan": __version__, "torch": torch.__version__},
            }
            logger.info(f"{input_dir}: {source.shape}")
            with (
                whole_folder(output_dir, record, source.tensors.nbytes, overwrite=overwrite) as temporary,
                reading_ahead(source.tensors) as ahead,
                progress(ahead) as tensors,
            ):
                record["files"] = write_dcp(temporary, tensors)
    print(summary(source.tensors.weights, source.left_out))
    absent = "" if arguments.keep_embeddings else f" and checkpoint.init_missing_keys = {list(VOCABULARY_WEIGHTS)}"
    logger.info(f"{arguments.output_dir} is complete: start from it with checkpoint.init_from{absent}")


def open_llama(folder: Path, rope_scaling: str | None) -> Source:
    """The model of a folder in Meta's or Hugging Face's format, whichever it is.

    Raises:
        ValueError: where it is neither or both, or as `open_meta` and `open_hf`.
    """
    if not folder.is_dir():
        raise ValueError(f'--input_dir = "{folder}": no such folder')
    if not any(folder.iterdir()):
        raise ValueError(f'--input_dir = "{folder}": the folder is empty')
    meta, hf = any(folder.glob("*.pth")), any(folder.glob("*.safetensors*"))
    if meta and hf:
        raise ValueError(f"{folder} holds both .pth and safetensors files: leave those of one format in it")
    if hf or (folder / "config.json").is_file():
        return open_hf(folder, rope_scaling)
    if meta or (folder / "params.json").is_file():
        return open_meta(folder, rope_scaling)
    raise ValueError(f"{folder} holds neither Meta's consolidated.00.pth nor Hugging Face's model.safetensors")


def _without_embeddings(source: Source) -> Source:
    dropped = {name: source.tensors.weights[name] for name in VOCABULARY_WEIGHTS}
    reason = "of another vocabulary; --keep_embeddings keeps it"
    left_out = source.left_out + group_left_out(dropped, lambda name: (name, reason))
    return replace(source, tensors=source.tensors.without(VOCABULARY_WEIGHTS), left_out=left_out)


def _license(folder: Path) -> str | None:
    """The licence that lies with the weights: of a model card, or the head of a licence file."""
    card = folder / "README.md"
    stated = re.search(r"^license:\s*(\S+)", card.read_text(errors="replace"), re.M) if card.is_file() else None
    if stated:
        return stated[1]
    for path in sorted(folder.glob("LICENSE*")):
        head = path.read_text(errors="replace").strip().partition("\n")[0]
        llama = re.match(r"LLAMA (\d(?:\.\d)?) COMMUNITY LICENSE", head)
        return f"llama{llama[1]}" if llama else head
    return None
