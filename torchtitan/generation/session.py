"""Prompts that have been read in, and sequences that go on from them, step by step."""

import time
from collections.abc import Callable

import torch

from torchtitan.generation.cache import Cache
from torchtitan.generation.choose import choose_attention, operations_with
from torchtitan.generation.decode import Decoder
from torchtitan.generation.room import check_room
from torchtitan.generation.sampling import Continuations

CHUNK = 256
"""Steps between two looks at the device: in between, the host only replays."""


class Session:
    """Continues prompts by a number of tokens.

    On a GPU a step is recorded once as a CUDA graph and then replayed, sampling included; the host reads nothing back
    until the end.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: list[torch.Tensor],
        samples: int,
        continuations: Continuations,
        attention: str = "auto",
    ) -> None:
        """Reads the prompts in, one after another.

        Args:
            decoder: the model.
            prompts: tokens of whole bins, int64 [tokens] each.
            samples: sequences that go on from each prompt.
            continuations: where their tokens are put; made for as many steps as there will be, at least 2.
            attention: see `choose_attention`.

        Raises:
            ValueError: where the GPU has no room for the cache, or not that attention.
        """
        self.decoder, self.continuations = decoder, continuations
        lengths, steps = [len(prompt) for prompt in prompts], continuations.steps
        self.sequences = len(prompts) * samples
        self.rope = decoder.rope(max(lengths) + steps)
        check_room(decoder.shape, decoder.dtype, decoder.device, lengths, samples, steps)
        self.cache = Cache.empty(decoder.shape, lengths, samples, steps, decoder.device, decoder.dtype)
        begun = time.perf_counter()
        for number, prompt in enumerate(prompts):
            decoder.prefill(prompt.to(decoder.device), self.rope, self.cache, number)
        self._wait()
        self.prefill_seconds = time.perf_counter() - begun
        self.graph: torch.cuda.CUDAGraph | None = None
        self.restart(attention)

    def restart(self, attention: str) -> None:
        """Forgets the continuations, to go on from the prompts anew with that attention."""
        attention = choose_attention(attention, self.decoder.device, self.decoder.dtype)
        self.ops = operations_with(attention, self.sequences)
        if self.decoder.device.type == "cuda":
            self.graph = self._recorded()
        self.cache.restart()
        self.decode_seconds = 0.0

    def run(self, steps: int, progress: Callable[[int], object] = lambda steps: None) -> None:
        """Goes on by that many steps; `progress` is told, every now and then, how many more are made."""
        begun = time.perf_counter()
        for first in range(0, steps, CHUNK):
            chunk = min(CHUNK, steps - first)
            for _ in range(chunk):
                self.step()
            self._wait()
            progress(chunk)
        self.decode_seconds += time.perf_counter() - begun

    def step(self) -> None:
        """One token more of each sequence."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()

    def _step(self) -> None:
        step = self.cache.step
        logits = self.decoder.step(self.continuations.current(step), self.rope, self.cache, self.ops)
        self.continuations.append(logits, step)
        self.cache.advance()

    def _recorded(self) -> torch.cuda.CUDAGraph:
        """A step as a graph. What the steps before the recording write is overwritten by those that count."""
        self.cache.restart()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Kernels are compiled and libraries set up in their first run, which cannot be recorded.
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph

    def _wait(self) -> None:
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize()
