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
        steps: tokens one after another: of the sequence with the most neurons, of all groups that went on in turn.
        prefills: prompts that were read in; more than there are where the window slid.
        prefill_seconds, decode_seconds: for reading them in, and for the steps.
    """

    counts: list[list[Counts]]
    steps: int
    prefills: int
    prefill_seconds: float
    decode_seconds: float


def rounds(read: int, bins: int, fitting: int) -> list[int]:
    """Bins to generate before and after each time that the window slides, where `read` of the `fitting` are taken."""
    made = [min(bins, fitting - read)]
    while sum(made) < bins:
        made.append(min(bins - sum(made), fitting - kept(fitting)))
    return made


def kept(fitting: int) -> int:
    """Bins that a full window goes on with."""
    return max(1, fitting // 2)


def groups(lengths: list[int], widths: list[int], bins: int, context: int) -> list[list[int]]:
    """Places of the prompts that go on beside each other: those that fit, and those whose windows slide in step.

    So what comes of a prompt does not depend on the others. `lengths`: tokens of each; else as `continue_prompts`.
    """
    found: dict[tuple[int, int] | None, list[int]] = {}
    for place, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        slides = len(rounds(length // width, bins, context // width)) > 1
        found.setdefault((length, width) if slides else None, []).append(place)
    return list(found.values())


def sessions(
    lengths: list[int], widths: list[int], *, bins: int, samples: int, context: int
) -> Iterator[tuple[list[int], int, int]]:
    """The largest sessions there will be: tokens of the prompts, samples of each, and tokens that they go on for."""
    for group in groups(lengths, widths, bins, context):
        longest, fitting = max(widths[place] for place in group), context // widths[group[0]]
        first, *later = rounds(lengths[group[0]] // widths[group[0]], bins, fitting)
        yield [lengths[place] for place in group], samples, first * longest
        if later:
            yield [kept(fitting) * longest] * (len(group) * samples), 1, later[0] * longest


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
    counts: list[list[Counts]] = [[] for _ in prompts]
    steps, prefills, prefill_seconds, decode_seconds = 0, 0, 0.0, 0.0
    together = groups([len(prompt) for prompt in prompts], widths, bins, context)
    with _progress(sum(bins * max(widths[place] for place in group) for group in together)) as progress:
        for group in together:
            each = [widths[place] for place in group for _ in range(samples)]
            histories = [prompts[place] for place in group for _ in range(samples)]
            uniform_NT = uniforms(sampling.seed, [keys[place] for place in group], samples, bins * max(each))
            contexts, shared, done = [prompts[place] for place in group], samples, 0
            for more in rounds(len(contexts[0]) // each[0], bins, context // each[0]):
                length = more * max(each)
                drawn = np.stack([row[done * w :][:length] for row, w in zip(uniform_NT, each, strict=True)])
                continuations = Continuations(sampling, decoder.shape.vocab_size, each, drawn, decoder.device)
                inputs = [torch.from_numpy(tokens).long() for tokens in contexts]
                session = Session(decoder, inputs, shared, continuations, attention)
                session.run(length, progress)
                new = continuations.tokens_NT.to(torch.uint8).cpu().numpy()
                histories = [np.append(h, t[: more * w]) for h, t, w in zip(histories, new, each, strict=True)]
                done, steps, prefills = done + more, steps + length, prefills + len(contexts)
                prefill_seconds += session.prefill_seconds
                decode_seconds += session.decode_seconds
                del session  # its cache makes room for the next one's
                contexts = [h[-kept(context // w) * w :] for h, w in zip(histories, each, strict=True)]
                shared = 1
            for number, (history, width) in enumerate(zip(histories, each, strict=True)):
                new = history[-bins * width :]
                counts[group[number // samples]].append(decode(new, width - 1, decoder.shape.vocab_size))
    return Generated(counts, steps, prefills, prefill_seconds, decode_seconds)


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
