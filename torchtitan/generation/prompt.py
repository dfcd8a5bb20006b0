"""The recordings that are continued."""

import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from torchtitan.data.index import RecordingIndex, load_index
from torchtitan.data.recordings import HUB_DATASETS, ID_COLUMNS, Recordings, load_path, load_pile
from torchtitan.data.tokens import Counts

DEFAULT_SPLITS = ("test", "train")
"""The first of them that a dataset has: what the model was not trained on comes first."""


@dataclass(frozen=True)
class Prompt:
    """A recording to continue.

    Attributes:
        given: as the command line names it.
        row: of the dataset.
        counts: of the whole recording, uint8 [neurons, bins], a view.
        ids: its identity columns.
        recordings: those that it is one of, `Recordings.description`.
        split: the dataset's that it is of.
        fingerprint: of the split, `Recordings.cache_key`.
    """

    given: str
    row: int
    counts: Counts
    ids: dict[str, str]
    recordings: str
    split: str
    fingerprint: str

    @property
    def width(self) -> int:
        """Tokens of a bin."""
        return self.counts.shape[0] + 1

    @property
    def key(self) -> int:
        """A number of 64 bits that stands for the recording, by its identity and row, wherever its dataset lies."""
        text = json.dumps([*(self.ids[name] for name in ID_COLUMNS), self.row])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def open_prompt(given: str, split: str | None) -> Prompt:
    """The recording that `DATASET:ROW` names.

    Raises:
        ValueError: where there is no such dataset, split or row, or the row is malformed.
    """
    dataset, separator, text = given.rpartition(":")
    if not separator or not dataset or not re.fullmatch(r"\d+", text):
        raise ValueError(f"--prompt {given}: not DATASET:ROW, as in primate:12 or recordings.parquet:0")
    row = int(text)
    try:
        recordings, index, split = _open(dataset, split)
    except ValueError as error:
        raise ValueError(f"--prompt {given}: {error}") from error
    if row >= len(recordings):
        raise ValueError(
            f"--prompt {given}: {recordings.description} has {len(recordings):,} rows, 0 to {len(recordings) - 1:,}"
        )
    place = int(np.searchsorted(index.rows, row))
    if place == len(index.rows) or index.rows[place] != row:
        raise ValueError(f"--prompt {given}: that row is ragged, empty or lacks counts (null); take another")
    counts = recordings.spike_counts(row, int(index.neurons[place]), int(index.bins[place]))
    ids = {name: recordings.dataset.data.column(name)[row].as_py() for name in ID_COLUMNS}
    return Prompt(given, row, counts, ids, recordings.description, split, recordings.cache_key)


@cache
def _open(dataset: str, split: str | None) -> tuple[Recordings, RecordingIndex, str]:
    """The recordings, which of them are well-formed, and the split that they are of."""
    named = dataset in HUB_DATASETS
    if not named and not Path(dataset).expanduser().exists():
        near = difflib.get_close_matches(dataset, HUB_DATASETS, n=1)
        known = f"did you mean {near[0]}?" if near else f"a dataset is {', '.join(HUB_DATASETS)} or a path"
        raise ValueError(f"no such dataset, file or folder: {dataset}; {known}")
    found = load_pile(dataset, "DATASET") if named else load_path(dataset, "DATASET")
    if split is None:
        split = next((name for name in DEFAULT_SPLITS if name in found.splits), None)
        if split is None:
            raise ValueError(f"{found.origin} has only {', '.join(found.splits)}: say which by --split")
    recordings = found.recordings(split, "--split")
    return recordings, load_index(recordings, "skip"), split


def context_bins(prompt: Prompt, asked: int | None, bins: int, trained: int, *, sliding: bool) -> int:
    """How many bins of the recording to read.

    Where it was not asked for: as many as fit into the trained context beside the bins to generate (or into half of
    it, where it slides), and leave as many in the recording to compare with, if it is long enough for that.

    Raises:
        ValueError: where more are asked for than the recording or the trained context has, with the numbers.
    """
    recorded, width = prompt.counts.shape[1], prompt.width
    fitting = trained // width
    name = f"--prompt {prompt.given}: a bin of {width - 1} neurons is {width} tokens"
    if fitting < 2:
        raise ValueError(f"{name}: the model was trained with {trained:,}, which do not hold two bins")
    room = fitting - bins
    if room < 1 and not sliding:
        raise ValueError(
            f"{name}, and --bins {bins} of them leave no room for a prompt in the {trained:,} tokens that the model "
            f"was trained with: generate at most {fitting - 1}, or give --sliding_window"
        )
    if asked is None:
        room = room if room >= 1 else fitting // 2
        return max(1, min(room, recorded - bins if recorded > bins else recorded))
    if asked > recorded:
        raise ValueError(f"--context_bins {asked}: the recording of --prompt {prompt.given} has {recorded:,} bins")
    if asked >= fitting:
        raise ValueError(
            f"{name}, --context_bins {asked} of them {asked * width:,}: the model was trained with {trained:,}; "
            f"at most {fitting - 1} leave room to generate"
        )
    if asked > room and not sliding:
        raise ValueError(
            f"{name}, --context_bins {asked} and --bins {bins} together {(asked + bins) * width:,}: the model was "
            f"trained with {trained:,}; take at most {fitting} bins in all, or give --sliding_window"
        )
    return asked
