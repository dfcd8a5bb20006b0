"""This rank's batches, in the order of the one cursor that all ranks share."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from torchtitan.config.schema import Training
from torchtitan.data.index import RecordingIndex
from torchtitan.data.recordings import Recordings
from torchtitan.data.synthetic import SyntheticWindows
from torchtitan.data.windows import RecordedWindows, WindowOrder, WindowSource


class Batch(NamedTuple):
    """B sequences of S inputs and S labels, as they leave the loader: in host memory, pinned where there is a GPU.

    Attributes:
        tokens: uint8 [B, S + 1]; the inputs are all but the last, the labels all but the first.
        valid: number of valid labels of each sequence, int64 [B]; S but for a short last window.
        documents: where the recordings begin, as positions in the B·S inputs, int32 [documents]; each sequence's
            first position is one of them.
        windows: each sequence's window, int64 [B].
        origins: row of the dataset and bin of each sequence's first token, int64 [B, 2].
        clipped: number of clipped counts, int64 [B].
    """

    tokens: torch.Tensor
    valid: torch.Tensor
    documents: torch.Tensor
    windows: torch.Tensor
    origins: torch.Tensor
    clipped: torch.Tensor


class WindowDataset(Dataset[Batch]):
    """Reads windows straight into the rows of a batch."""

    def __init__(self, source: WindowSource) -> None:
        self.source = source

    def __getitems__(self, windows: list[int]) -> Batch:
        """The batch of these windows, in this order."""
        seq_len = self.source.seq_len
        tokens = torch.empty(len(windows), seq_len + 1, dtype=torch.uint8)
        read = [self.source.read(window, row) for window, row in zip(windows, tokens.numpy(), strict=True)]
        starts = [i * seq_len + start for i, window in enumerate(read) for start in window.documents]
        return Batch(
            tokens=tokens,
            valid=torch.tensor([window.valid for window in read]),
            documents=torch.tensor(starts, dtype=torch.int32),
            windows=torch.tensor(windows),
            origins=torch.tensor([window.origin for window in read]),
            clipped=torch.tensor([window.clipped for window in read]),
        )

    def __getitem__(self, window: int) -> Batch:
        return self.__getitems__([window])


class RankSampler(Sampler[list[int]]):
    """The windows of one rank's batches, from a cursor on and without end.

    A step takes the next `global_batch_size` windows, whatever the number of ranks; each rank takes an equal,
    consecutive part of them, in batches of `batch_size`.
    """

    def __init__(
        self, order: WindowOrder, *, cursor: int, batch_size: int, global_batch_size: int, rank: int, num_ranks: int
    ) -> None:
        assert global_batch_size % num_ranks == 0, f"{num_ranks} ranks cannot share {global_batch_size} sequences"
        self.order, self.cursor = order, cursor
        self.batch_size, self.global_batch_size = batch_size, global_batch_size
        self.share = global_batch_size // num_ranks
        self.offset = rank * self.share

    def __iter__(self) -> Iterator[list[int]]:
        step_start = self.cursor
        while True:
            mine = range(step_start + self.offset, step_start + self.offset + self.share)
            for first in range(0, self.share, self.batch_size):
                yield [self.order[cursor] for cursor in mine[first : first + self.batch_size]]
            step_start += self.global_batch_size


def open_windows(
    training: Training, recordings: Recordings | None = None, index: RecordingIndex | None = None
) -> WindowSource:
    """The windows of the configured dataset; recordings and index are those of `training`, None if synthetic."""
    if recordings is None or index is None:
        return SyntheticWindows(
            kind=training.synthetic_kind,
            split=training.split,
            seed=training.seed,
            seq_len=training.seq_len,
            vocab_size=training.vocab_size,
        )
    return RecordedWindows(recordings, index, seq_len=training.seq_len, vocab_size=training.vocab_size)


def build_loader(
    source: WindowSource, sampler: Sampler[list[int]], *, num_workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """A loader of the sampler's batches, read by `num_workers` processes, or in this one where that is 0."""
    return DataLoader(
        WindowDataset(source),
        batch_sampler=sampler,
        num_workers=num_workers,
        # By now this process has threads, and a forked copy of one that holds a lock waits for it for ever.
        multiprocessing_context="forkserver" if num_workers else None,
        collate_fn=_as_read,
        worker_init_fn=_end_with_trainer,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        # The loader seeds its processes; drawn from the global generator, that would shift the run's random state.
        generator=torch.Generator(),
    )


def _end_with_trainer(worker: int) -> None:
    """Has a loader process end when the one that it loads for does, however that dies.

    Its own parent is a server that lives as long as its children do: left alone, both would stay for ever.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def watch() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_read(batch: Any) -> Any:
    return batch
