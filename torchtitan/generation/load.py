"""Builds a model from a checkpoint on one device, without sharding it."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from torchtitan.checkpoint.init_from import checkpoint_folder
from torchtitan.convert.ahead import reading_ahead
from torchtitan.convert.dcp import open_dcp
from torchtitan.convert.report import progress
from torchtitan.convert.weights import Source
from torchtitan.models.llama.attention import choose_attention
from torchtitan.models.llama.model import Transformer
from torchtitan.models.llama.rope import rope_cache
from torchtitan.models.llama.shape import ModelShape

LARGEST_VOCABULARY = 256
"""Tokens: counts are bytes, and BOS is the last of them."""

WORTH_A_WORD = 2**28
"""Bytes: fewer are read before one could read about it."""


def open_checkpoint(given: str, flavor: str | None, rope_scaling: str | None) -> tuple[Path, Source]:
    """The step's folder, and what it holds.

    Raises:
        ValueError: where it is no checkpoint of this kind of model, or of one with another vocabulary.
    """
    folder = checkpoint_folder(Path(given).expanduser(), "--checkpoint")
    source = open_dcp(folder, flavor, rope_scaling)
    if source.shape.vocab_size > LARGEST_VOCABULARY:
        raise ValueError(
            f'--checkpoint = "{given}": its vocabulary has {source.shape.vocab_size:,} tokens, and recordings are '
            f"written in at most {LARGEST_VOCABULARY}: it is a model of something else"
        )
    return folder, source


def load_model(source: Source, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The model with its weights, read and rounded to `dtype` one after another."""
    model = empty_model(source.shape, source.trained_length, device, dtype)
    said = partial(progress, verb="reading") if source.tensors.nbytes > WORTH_A_WORD else nullcontext
    with reading_ahead(source.tensors) as ahead, said(ahead) as tensors:
        weights = {name: tensors.read(name).to(device, dtype) for name in tensors.weights}
    model.load_state_dict(weights, assign=True)
    return model


def empty_model(shape: ModelShape, length: int, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A model for sequences up to that length whose weights are still without memory; its rotary table is there."""
    with torch.device("meta"):
        model = Transformer(shape, choose_attention("auto", device, dtype), max_length=length)
    model.rope_cache = rope_cache(shape, length, device)
    return model.requires_grad_(False)
