"""The loss of a model over one pass of a split."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import Sampler

from torchtitan.data.loader import build_loader
from torchtitan.data.tokens import bos_token
from torchtitan.data.windows import RecordedWindows
from torchtitan.models.llama.attention import Documents
from torchtitan.models.llama.model import token_losses


@dataclass(frozen=True)
class Score:
    """Nats a token over the counts alone and with the (predictable) BOS tokens, and how many tokens that were."""

    nats_per_count: float
    nats_per_token_with_bos: float
    counts: int
    tokens: int


class _OnePass(Sampler[list[int]]):
    """All windows of the split in order, the short last one included."""

    def __init__(self, windows: RecordedWindows, batch_size: int) -> None:
        self.num_windows = (windows.num_windows or 0) + (windows.tail > 0)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(0, self.num_windows, self.batch_size):
            yield list(range(first, min(first + self.batch_size, self.num_windows)))


@torch.no_grad()
def score(
    model: nn.Module,
    windows: RecordedWindows,
    device: torch.device,
    batch_size: int,
    *,
    document_mask: bool = False,
) -> Score:
    """Scores every token of the stream but the first exactly once, with the mask that the model was trained with."""
    bos = bos_token(windows.vocab_size)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in build_loader(windows, _OnePass(windows, batch_size), num_workers=0, pin_memory=False):
        tokens = batch.tokens.to(device).long()
        labels = tokens[:, 1:]
        documents = Documents.from_starts(batch.documents, labels.numel(), device) if document_mask else None
        losses = token_losses(model(tokens[:, :-1], documents), labels).double()
        valid = torch.arange(windows.seq_len, device=device) < batch.valid.to(device)[:, None]
        counts = valid & (labels != bos)
        sums += torch.stack([(losses * counts).sum(), (losses * valid).sum(), counts.sum(), valid.sum()])
    count_nats, token_nats, counts, tokens = sums.tolist()
    return Score(count_nats / counts, token_nats / tokens, int(counts), int(tokens))
