"""What a model makes of each token of a pass: computed on all ranks, collected on rank 0 in the order of the stream."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.fsdp import FSDPModule

from torchtitan.data.loader import Batch, build_loader
from torchtitan.data.tokens import bos_token
from torchtitan.distributed.world import World
from torchtitan.evaluation.passes import Pass, Rounds
from torchtitan.models.llama.attention import Documents
from torchtitan.models.llama.model import Transformer, token_losses


@dataclass(frozen=True)
class WindowScore:
    """What the model makes of a window of the pass: of each of its labels that is scored.

    Attributes:
        window: its number.
        labels: uint8.
        nats: negative log likelihood, float32.
        rates: expected count, float32.
        expected: how often each count should occur among them by the model, float64 [vocab_size - 1].
    """

    window: int
    labels: NDArray[np.uint8]
    nats: NDArray[np.float32]
    rates: NDArray[np.float32]
    expected: NDArray[np.float64]


@dataclass(frozen=True)
class Started:
    """A batch's results, packed as `Scorer._unpack` reads them: on their way to the host."""

    packed: torch.Tensor
    arrived: torch.cuda.Event | None


class Scorer:
    """A model's way through a pass, together with the other ranks."""

    def __init__(
        self,
        model: Transformer,
        over: Pass,
        world: World,
        *,
        batch_size: int,
        document_mask: bool,
        num_workers: int = 0,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """`progress` is called on every rank when a round is done."""
        self.model, self.over, self.world = model, over, world
        self.batch_size, self.document_mask, self.num_workers = batch_size, document_mask, num_workers
        self.progress = progress
        self.vocab_size = model.shape.vocab_size

    @torch.no_grad()
    def score(self) -> Iterator[WindowScore]:
        """The windows of the pass in order, on rank 0; nothing on the others, which have to ask for it all the same.

        While rank 0 works on what it was given, the GPUs are in their next round.
        """
        rounds = Rounds(self.over.chosen, batch_size=self.batch_size, rank=self.world.rank, num_ranks=self.world.size)
        on_gpu = self.world.device.type == "cuda"
        loader = build_loader(self.over.windows, rounds, num_workers=self.num_workers, pin_memory=on_gpu)
        under_way: deque[Started] = deque()
        try:
            for number, batch in enumerate(loader):
                under_way.append(self._start(batch))
                if number > 0:
                    yield from self._collect(under_way.popleft(), rounds, number - 1)
            yield from self._collect(under_way.popleft(), rounds, len(rounds) - 1)
        finally:
            # Gathered weights stay after a forward pass that no backward pass follows: they would be out of date after
            # the next update or load, and in the way.
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _start(self, batch: Batch) -> Started:
        """Starts one forward pass."""
        device, bos = self.world.device, bos_token(self.vocab_size)
        tokens = batch.tokens.to(device, non_blocking=True).long()
        labels = tokens[:, 1:]
        documents = None
        if self.document_mask:
            documents = Documents.from_starts(batch.documents, labels.numel(), device)
        logits = self.model(tokens[:, :-1], documents)
        nats = token_losses(logits, labels)
        # Where a count is due is known, so BOS is left out of the distribution of counts.
        probabilities = logits[..., :bos].float().softmax(-1)
        rates = probabilities @ torch.arange(bos, dtype=torch.float32, device=device)
        places = torch.arange(labels.shape[1], device=device)
        valid = batch.valid.to(device, non_blocking=True)
        scored = (places >= self.over.lead) & (places < valid[:, None]) & (labels != bos)
        expected = (probabilities * scored[..., None]).sum(1, dtype=torch.float64)
        results = (expected, nats, rates, labels.to(torch.uint8))
        packed = torch.cat([values.contiguous().view(torch.uint8).flatten() for values in results])
        packed = packed.to("cpu", non_blocking=True)
        arrived = None
        if device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        return Started(packed, arrived)

    def _collect(self, started: Started, rounds: Rounds, number: int) -> Iterator[WindowScore]:
        """Gathers what all ranks have made of a round."""
        if started.arrived is not None:
            started.arrived.synchronize()
        packed = started.packed
        gathered = [torch.empty_like(packed) for _ in range(self.world.size)] if self.world.rank == 0 else None
        dist.gather(packed, gathered)
        self.progress()
        if gathered is None:
            return
        for place, window in enumerate(rounds.windows(number)):
            rank, row = divmod(place, self.batch_size)
            yield self._unpack(gathered[rank].numpy(), row, window)

    def _unpack(self, packed: NDArray[np.uint8], row: int, window: int) -> WindowScore:
        seq_len, counts = self.over.windows.seq_len, self.vocab_size - 1
        start, stop = self.over.scored(window)
        at = slice(self.over.lead, self.over.lead + stop - start)
        sections = []
        offset = 0
        for width, dtype in ((counts, np.float64), (seq_len, np.float32), (seq_len, np.float32), (seq_len, np.uint8)):
            end = offset + self.batch_size * width * np.dtype(dtype).itemsize
            sections.append(packed[offset:end].view(dtype).reshape(self.batch_size, width)[row])
            offset = end
        expected, nats, rates, labels = sections
        return WindowScore(window, labels[at], nats[at], rates[at], expected)
