"""What is scored in one pass over a split: which rows, which windows of them, and which tokens of each window."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import Sampler

from torchtitan.config.schema import Training
from torchtitan.data.index import RecordingIndex
from torchtitan.data.synthetic import SyntheticRecordings
from torchtitan.data.windows import RecordedWindows, Rows
from torchtitan.distributed.open_data import open_split
from torchtitan.distributed.world import World

SYNTHETIC_SPLITS = ("train", "test")
"""Those that synthetic data is taken to have, as a pile does: any name would make some."""


class Pass:
    """Windows over the stream of recordings, and which of their labels count.

    A label is scored where at least `min_context` tokens stand before it in its window; the others are left out or,
    where windows overlap, are scored in the window before, so that all tokens but the stream's first `min_context`
    are. With a `min_context` of 0 or 1 each token but the very first is scored exactly once, overlapping or not.

    Attributes:
        lead: labels at the beginning of each window that are not scored.
        chosen: the windows that are scored, ascending.
        num_scored: tokens that are scored, BOS included.
    """

    def __init__(
        self,
        recordings: Rows,
        index: RecordingIndex,
        *,
        seq_len: int,
        vocab_size: int,
        min_context: int = 0,
        overlap: bool = False,
        max_windows: int | None = None,
    ) -> None:
        """With `max_windows` that many windows are scored, in the middles of as many equal parts of the pass.

        Raises:
            ValueError: where no token would be scored.
        """
        if min_context > seq_len:
            raise ValueError(
                f"--min_context {min_context}: no token has that much context in windows of training.seq_len = "
                f"{seq_len} tokens"
            )
        # The label at place j of a window has j + 1 tokens before it there.
        self.lead = max(min_context - 1, 0)
        self.min_context, self.overlap, self.max_windows = min_context, overlap, max_windows
        stride = seq_len - self.lead if overlap else seq_len
        self.windows = RecordedWindows(recordings, index, seq_len=seq_len, vocab_size=vocab_size, stride=stride)
        last = self.windows.num_tokens - 1 - self.lead
        there = -(-last // stride)  # a window whose labels are all part of the lead is none
        if there <= 0:
            raise ValueError(
                f"--min_context {min_context}: no token of {recordings.description} has that much context; it holds "
                f"{self.windows.num_tokens} tokens"
            )
        count = there if max_windows is None else min(max_windows, there)
        self.chosen = [(2 * i + 1) * there // (2 * count) for i in range(count)]
        self.num_scored = sum(stop - start for start, stop in map(self.scored, self.chosen))

    def scored(self, window: int) -> tuple[int, int]:
        """The scored labels of a window, as a range of the stream's tokens."""
        first = window * self.windows.stride + 1
        return first + self.lead, min(first + self.windows.seq_len, self.windows.num_tokens)


class Rounds(Sampler[list[int]]):
    """The batches of one rank. In round r rank k scores batch r·world + k of the pass.

    Sharded ranks can only compute together: where the last round has no batch left for a rank, or the last batch is
    short, windows are repeated, and what is scored of them is thrown away.
    """

    def __init__(self, chosen: Sequence[int], *, batch_size: int, rank: int, num_ranks: int) -> None:
        self.chosen, self.batch_size = chosen, batch_size
        self.rank, self.num_ranks = rank, num_ranks

    def __len__(self) -> int:
        return -(-len(self.chosen) // (self.batch_size * self.num_ranks))

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(len(self)):
            first = (number * self.num_ranks + self.rank) * self.batch_size
            yield [self.chosen[place % len(self.chosen)] for place in range(first, first + self.batch_size)]

    def windows(self, number: int) -> Sequence[int]:
        """What all ranks score in a round, one rank after the other, without the repeats, which come last."""
        at_once = self.batch_size * self.num_ranks
        return self.chosen[number * at_once : (number + 1) * at_once]


def of_sources(recordings: Rows, index: RecordingIndex, names: Sequence[str]) -> RecordingIndex:
    """The rows of these source datasets alone.

    Raises:
        ValueError: where a name is not in the data, with the nearest ones that are.
    """
    sources = recordings.ids()["source_dataset"]
    there = sorted({sources[row] for row in index.rows})
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(there)}"
            raise ValueError(f"--source_dataset {name}: no recording of {recordings.description} has it; {hint}")
    kept = np.array([sources[row] in names for row in index.rows], bool)
    return replace(index, rows=index.rows[kept], neurons=index.neurons[kept], bins=index.bins[kept])


def open_held_out(training: Training, world: World, split: str, named: str) -> tuple[Rows, RecordingIndex]:
    """The recordings of a split of the configured dataset, on all ranks; of synthetic data, some that are made for it.

    Raises:
        ValueError: where they cannot be used; an absent split by the name of the setting that has given it.
    """
    if training.dataset == "synthetic":
        if split not in SYNTHETIC_SPLITS:
            raise ValueError(f'{named} = "{split}": synthetic data has only {", ".join(SYNTHETIC_SPLITS)}')
        made = SyntheticRecordings(kind=training.synthetic_kind, split=split, seed=training.seed)
        return made, made.index
    return open_split(training, world, split, named)
