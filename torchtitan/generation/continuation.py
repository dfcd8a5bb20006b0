"""Continues prompts by whole bins, also past the context that the model was trained with."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from torchtitan.data.tokens import Counts, Tokens, decode
from torchtitan.generation.decode import Decoder
from torchtitan.generation.sampling import Continuations, Sampling, uniforms
from torchtitan.generation.session import Session
from torchtitan.logging import logger


@dataclass(frozen=True)
class Generated:
    """What came of it, and how long it took.

    Attributes:
        counts: of each prompt each sample's, uint8 [neurons, bins].
        steps: tokens of each sequence, of the one with the most neurons.
        prefills: prompts that were read in; more than there are where the window slid.
        prefill_seconds, decode_seconds: for reading them in, and for the steps.
    """

    counts: list[list[Counts]]
    steps: int
    prefills: int
    prefill_seconds: float
    decode_seconds: float


@torch.inference_mode()
def continue_prompts(
    decoder: Decoder,
    prompts: list[Tokens],
    widths: list[int],
    keys: list[int],
    *,
    bins: int,
    samples: int,
    sampling: Sampling,
    context: int,
    attention: str = "auto",
) -> Generated:
    """Goes on from each prompt with that many bins, in several samples.

    Where `context` is full, the newest half of it, in whole bins, is read in anew and the rest forgotten: by then the
    samples are sequences of their own.

    Args:
        decoder: the model.
        prompts: tokens of whole bins, uint8 [tokens] each.
        widths: tokens of a bin of each.
        keys: of the recordings, `Prompt.key`: the random numbers depend on them.
        bins: to generate.
        samples: of each prompt.
        sampling: how to draw.
        context: most tokens that the model may look at.
        attention: see `choose_attention`.
    """
    each = [width for width in widths for _ in range(samples)]
    histories = [prompt for prompt in prompts for _ in range(samples)]
    starts = [len(history) for history in histories]
    uniform_NT = uniforms(sampling.seed, keys, samples, bins * max(widths))
    contexts, shared, done, steps, prefills, prefill_seconds, decode_seconds = prompts, samples, 0, 0, 0, 0.0, 0.0
    with _progress(bins * max(widths)) as progress:
        while True:
            room = min(context // w - len(tokens) // w for tokens, w in zip(contexts, each[::shared], strict=True))
            ending = min(bins, done + room)
            length = (ending - done) * max(each)
            drawn = np.stack([row[done * w :][:length] for row, w in zip(uniform_NT, each, strict=True)])
            continuations = Continuations(sampling, decoder.shape.vocab_size, each, drawn, decoder.device)
            inputs = [torch.from_numpy(tokens).long() for tokens in contexts]
            session = Session(decoder, inputs, shared, continuations, attention)
            session.run(length, progress)
            new = continuations.tokens_NT.to(torch.uint8).cpu().numpy()
            histories = [np.append(h, t[: (ending - done) * w]) for h, t, w in zip(histories, new, each, strict=True)]
            done, steps, prefills = ending, steps + length, prefills + len(contexts)
            prefill_seconds += session.prefill_seconds
            decode_seconds += session.decode_seconds
            if done == bins:
                break
            del session  # its cache makes room for the next one's
            contexts = [h[-max(1, context // w // 2) * w :] for h, w in zip(histories, each, strict=True)]
            shared = 1
    vocab_size = decoder.shape.vocab_size
    ends = zip(histories, starts, each, strict=True)
    counts = [decode(history[start:], width - 1, vocab_size) for history, start, width in ends]
    grouped = [counts[first : first + samples] for first in range(0, len(counts), samples)]
    return Generated(grouped, steps, prefills, prefill_seconds, decode_seconds)


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int], None]]:
    """Told of steps, moves a bar on a terminal, and writes a line every tenth of the way to a log."""
    done, tenths, begun = 0, 0, time.monotonic()

    def advance(made: int) -> None:
        nonlocal done, tenths
        bar.update(made)
        done += made
        if bar.disable and done * 10 // steps > tenths:
            tenths = done * 10 // steps
            rate = done / (time.monotonic() - begun)
            logger.info(f"{tenths * 10} %: {done:,} of {steps:,} tokens of each sequence, {rate:,.0f}/s")

    with tqdm(total=steps, unit="token", disable=not sys.stderr.isatty()) as bar:
        yield advance
