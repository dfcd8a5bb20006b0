"""Draws spike counts from logits, and places BOS."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from torchtitan.data.tokens import bos_token


@dataclass(frozen=True)
class Sampling:
    """How counts are drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely count.
        top_k: only that many most likely counts; None: all.
        top_p: of these, only as many of the most likely as it takes to reach this probability (Holtzman et al., The
            Curious Case of Neural Text Degeneration, 2020).
        seed: of the random numbers.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def draw(self, logits_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
        """A count for each sequence, int64 [N].

        BOS, the last token, is no count and is left out. Each takes one uniform number of [0, 1): where it falls among
        the cumulated probabilities of the counts from the most likely one on.
        """
        logits = logits_NV[:, :-1].float()
        if self.temperature == 0:
            return logits.argmax(-1)
        ranked, counts = logits.sort(dim=-1, descending=True, stable=True)
        # Below the largest, and by a number whose reciprocal is finite: no temperature is too small.
        below = ranked[:, : self.top_k] - ranked[:, :1]
        probabilities = (below / max(self.temperature, torch.finfo(below.dtype).tiny)).softmax(-1)
        cumulated = probabilities.cumsum(-1)
        kept = cumulated - probabilities < self.top_p
        kept[:, 0] = True  # also where top_p is so small that rounding loses it
        mass = (probabilities * kept).sum(-1, keepdim=True)
        rank = (cumulated <= uniform_N[:, None] * mass).sum(-1, keepdim=True)
        return counts.gather(1, rank.minimum(kept.sum(-1, keepdim=True) - 1))[:, 0]


def uniforms(seed: int, recordings: Sequence[int], samples: int, steps: int) -> np.ndarray:
    """Random numbers of [0, 1) for each token of each sample of each recording, float32 [recordings · samples, steps].

    Those of a sample depend on seed, recording (the number that stands for it, see `Prompt.key`) and its own number
    alone: neither on how many others there are, nor on how many tokens are drawn after it.
    """
    keys = [(seed, recording, sample) for recording in recordings for sample in range(samples)]
    return np.stack([np.random.default_rng(key).random(steps, dtype=np.float32) for key in keys])


class Continuations:
    """The tokens that sequences go on with: BOS where a bin begins, drawn counts elsewhere."""

    def __init__(
        self, sampling: Sampling, vocab_size: int, widths: list[int], uniform_NT: np.ndarray, device: torch.device
    ) -> None:
        """`widths`: tokens of a bin of each sequence; `uniform_NT`: see `uniforms`, float32 [N, T]."""
        self.sampling, self.bos, self.steps = sampling, bos_token(vocab_size), uniform_NT.shape[1]
        self.widths = torch.tensor(widths, device=device)
        self.uniform_NT = torch.from_numpy(uniform_NT).to(device)
        # One column more than there are steps: the last step, too, draws a token to go on with.
        self.tokens_NT = torch.full((len(widths), self.steps + 1), self.bos, device=device)

    def current(self, step: torch.Tensor) -> torch.Tensor:
        """The tokens to feed in this step, int64 [N]; `step`: int64 [1] on the device."""
        return self.tokens_NT.index_select(1, step)[:, 0]

    def append(self, logits_NV: torch.Tensor, step: torch.Tensor) -> None:
        """Sets the tokens after this step: BOS behind a whole bin, else counts drawn from the logits."""
        drawn = self.sampling.draw(logits_NV, self.uniform_NT.index_select(1, step)[:, 0])
        following = step + 1
        tokens = torch.where(following % self.widths == 0, self.bos, drawn)
        self.tokens_NT.index_copy_(1, following, tokens[:, None])
