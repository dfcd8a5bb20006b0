"""Continues recordings with a checkpoint's model, from the command line's arguments to the files."""

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from torchtitan.convert.weights import DTYPES, Source
from torchtitan.data.tokens import encode, largest_count
from torchtitan.generation.choose import choose_attention
from torchtitan.generation.continuation import Generated, continue_prompts, sessions
from torchtitan.generation.decode import Decoder
from torchtitan.generation.floor import bandwidth, bytes_per_step
from torchtitan.generation.load import load_model, open_checkpoint
from torchtitan.generation.output import (
    PLOTS,
    SAMPLES,
    SUMMARY,
    Continued,
    draw,
    output_folder,
    write_samples,
    write_summary,
)
from torchtitan.generation.prompt import context_bins, open_prompt
from torchtitan.generation.room import check_room, full_memory_told
from torchtitan.generation.sampling import Sampling
from torchtitan.logging import logger


def generate(arguments: argparse.Namespace) -> Path:
    """Continues the recordings that were asked for; returns the folder that holds the results.

    Raises:
        ValueError: where something that was asked for is not there, or does not fit the model or the GPU.
    """
    checkpoint, source = open_checkpoint(arguments.checkpoint, arguments.flavor, arguments.rope_scaling)
    prompts = [open_prompt(given, arguments.split) for given in dict.fromkeys(arguments.prompt)]
    context = [
        context_bins(
            prompt,
            arguments.context_bins,
            arguments.bins,
            source.trained_length,
            sliding=arguments.sliding_window,
        )
        for prompt in prompts
    ]
    device = _device(arguments.device)
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    read = [prompt.counts[:, :bins] for prompt, bins in zip(prompts, context, strict=True)]
    for prompt, bins, counts in zip(prompts, context, read, strict=True):
        clipped = int((counts > largest_count(source.shape.vocab_size)).sum())
        logger.info(
            f"{prompt.given} ({prompt.recordings}): {len(counts)} neurons, the first {bins:,} of "
            f"{prompt.counts.shape[1]:,} bins = {bins * prompt.width:,} tokens of the {source.trained_length:,} that "
            "the model was trained with" + (f"; {clipped:,} counts clipped below BOS" if clipped else "")
        )
    attention = choose_attention(arguments.attention, device, dtype)
    widths = [prompt.width for prompt in prompts]
    lengths = [bins * width for bins, width in zip(context, widths, strict=True)]
    extent = {"bins": arguments.bins, "samples": arguments.samples, "context": source.trained_length}
    for session in sessions(lengths, widths, **extent):
        check_room(source.shape, dtype, device, *session, weights=True)
    with output_folder(arguments.output, checkpoint, prompts) as folder, full_memory_told():
        decoder = Decoder(load_model(source, device, dtype))
        logger.info(
            f"{checkpoint}: {source.shape.num_params:,} parameters in {_name(dtype)} on {_card(device)}; attention: "
            f"{decoder.attention.describe(device, document_mask=False)} for prompts, {attention} for the cache"
        )
        generated = continue_prompts(
            decoder,
            [encode(counts, source.shape.vocab_size) for counts in read],
            widths,
            [prompt.key for prompt in prompts],
            sampling=sampling,
            attention=attention,
            **extent,
        )
        continued = [Continued(*one) for one in zip(prompts, context, generated.counts, strict=True)]
        write_samples(folder / SAMPLES, continued)
        summary = {
            "format": 1,
            "checkpoint": str(checkpoint),
            "step": source.record.get("step"),
            "time": time.time(),
            "model": asdict(source.shape),
            "trained_context": source.trained_length,
            "prompts": [_described(one) for one in continued],
            "settings": {
                **{key: getattr(arguments, key) for key in ("split", "bins", "samples", "sliding_window")},
                **asdict(sampling),
            },
            "device": _card(device),
            "dtype": _name(dtype),
            "attention": attention,
            "speed": _speed(generated, continued, source, device, dtype),
        }
        write_summary(folder / SUMMARY, summary)
        if not arguments.no_plots:
            draw(folder / PLOTS, continued, checkpoint, source.record.get("step") or 0)
    _report(summary, folder, plots=not arguments.no_plots)
    return folder


def _device(asked: str | None) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU; --device cpu runs without")
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def _speed(
    generated: Generated, continued: list[Continued], source: Source, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Seconds and rates, and how they compare with the memory's where that is known and one cache served all."""
    tokens = sum(one.prompt.width * sample.shape[1] for one in continued for sample in one.samples)
    step_seconds = generated.decode_seconds / generated.steps
    lengths, samples = [one.context_bins * one.prompt.width for one in continued], len(continued[0].samples)
    known = bandwidth(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    floor = None
    if known is not None and generated.prefills == len(continued):
        floor = bytes_per_step(source.shape, dtype.itemsize, lengths, samples, generated.steps / 2) / known
    return {
        "prefill_seconds": generated.prefill_seconds,
        "prefills": generated.prefills,
        "decode_seconds": generated.decode_seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / generated.decode_seconds,
        "milliseconds_per_step": 1e3 * step_seconds,
        "floor_milliseconds_per_step": None if floor is None else 1e3 * floor,
        "floor_ratio": None if floor is None else step_seconds / floor,
    }


def _described(one: Continued) -> dict[str, Any]:
    """A prompt for the summary, with the mean counts of what was read, of what came, and of what is real."""
    read = one.prompt.counts[:, : one.context_bins]
    generated = np.stack(one.samples)
    return {
        "prompt": one.prompt.given,
        "recordings": one.prompt.recordings,
        "split": one.prompt.split,
        "fingerprint": one.prompt.fingerprint,
        **one.prompt.ids,
        "neurons": read.shape[0],
        "context_bins": one.context_bins,
        "context_tokens": one.context_bins * one.prompt.width,
        "recorded_bins": one.real.shape[1],
        "mean_count_prompt": float(read.mean()),
        "mean_count_recorded": float(one.real.mean()) if one.real.size else None,
        "mean_count_generated": float(generated.mean()),
    }


def _report(summary: dict[str, Any], folder: Path, *, plots: bool) -> None:
    rows = [
        [
            one["prompt"],
            one["neurons"],
            f"{one['context_bins']:,}",
            f"{one['context_tokens']:,}",
            f"{one['mean_count_prompt']:.4f}",
            "" if one["mean_count_recorded"] is None else f"{one['mean_count_recorded']:.4f}",
            f"{one['mean_count_generated']:.4f}",
        ]
        for one in summary["prompts"]
    ]
    headers = ["prompt", "neurons", "bins read", "tokens", "mean count read", "recorded after it", "generated"]
    print("\n" + tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 6)))
    settings, speed = summary["settings"], summary["speed"]
    took = (
        f"{speed['milliseconds_per_step']:.2f} ms a token of each sequence, {speed['tokens_per_second']:,.0f} tokens/s"
    )
    if speed["floor_ratio"] is not None:
        took += f", {speed['floor_ratio']:.2f} × the memory's {speed['floor_milliseconds_per_step']:.2f} ms"
    lines = [
        ("generated", f"{settings['samples']} samples of {settings['bins']:,} bins each, {speed['tokens']:,} tokens"),
        ("reading the prompts", f"{speed['prefill_seconds']:.2f} s"),
        ("generating", f"{speed['decode_seconds']:.2f} s: {took}"),
        ("samples", f"{folder / SAMPLES} (a dataset for --training.dataset_path)"),
        ("summary", str(folder / SUMMARY)),
    ]
    if plots:
        lines.append(("pictures", str(folder / PLOTS)))
    print("\n" + tabulate(lines, tablefmt="plain"))


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
