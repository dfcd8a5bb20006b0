"""Small datasets with the Neural Pile's columns, written as users have them, and their tokens worked out by hand."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from torchtitan.data.index import RecordingIndex
    from torchtitan.data.recordings import Recordings

Format = Literal["parquet", "disk"]


def random_recordings(sizes: Iterable[tuple[int, int]], *, largest: int = 9, seed: int = 0) -> list[np.ndarray]:
    """One matrix of uniform counts 0 … largest for each (neurons, bins), uint8 [neurons, bins]."""
    random = np.random.default_rng(seed)
    return [random.integers(0, largest, size, dtype=np.uint8, endpoint=True) for size in sizes]


def write_recordings(folder: Path, splits: dict[str, list[np.ndarray]], format: Format = "parquet") -> Path:
    """Writes one row a matrix, one file or `save_to_disk` folder a split. Returns the folder, for a dataset_path."""
    return write_rows(folder, {split: [counts.tolist() for counts in rows] for split, rows in splits.items()}, format)


def write_rows(folder: Path, splits: dict[str, list[Any]], format: Format = "parquet") -> Path:
    """As `write_recordings`, of spike counts as nested lists, which may be malformed."""
    from datasets import Dataset, DatasetDict, Features, List, Value

    features = Features({"spike_counts": List(List(Value("uint8"))), **{name: Value("string") for name in ids(0)}})
    datasets = DatasetDict()
    for split, rows in splits.items():
        datasets[split] = Dataset.from_dict({"spike_counts": rows, **ids(len(rows))}, features=features)
    folder.mkdir(parents=True, exist_ok=True)
    if format == "disk":
        datasets.save_to_disk(str(folder))
    else:
        for split, dataset in datasets.items():
            dataset.to_parquet(folder / f"{split}.parquet")
    return folder


def in_memory(rows: Sequence[np.ndarray], source_datasets: Sequence[str] = ()) -> "tuple[Recordings, RecordingIndex]":
    """Recordings that are held in memory, and their index; of the source datasets of `ids` where none are given."""
    from datasets import Dataset, Features, List, Value

    from torchtitan.data.index import RecordingIndex
    from torchtitan.data.recordings import Recordings

    features = Features({"spike_counts": List(List(Value("uint8"))), **{name: Value("string") for name in ids(0)}})
    columns = {"spike_counts": [counts.tolist() for counts in rows], **ids(len(rows))}
    if source_datasets:
        columns["source_dataset"] = list(source_datasets)
    shapes = np.array([counts.shape for counts in rows])
    index = RecordingIndex(np.arange(len(rows)), shapes[:, 0], shapes[:, 1], np.empty(0, np.int64), "in memory")
    return Recordings(Dataset.from_dict(columns, features=features), "in memory"), index


def ids(num_rows: int) -> dict[str, list[str]]:
    """The identity columns of that many rows: two sessions a subject."""
    return {
        "subject_id": [f"subject-{i // 2}" for i in range(num_rows)],
        "session_id": [f"session-{i}" for i in range(num_rows)],
        "segment_id": [f"segment-{i}" for i in range(num_rows)],
        "source_dataset": ["tests"] * num_rows,
    }


def expected_tokens(recordings: Sequence[np.ndarray], vocab_size: int = 256) -> np.ndarray:
    """The stream of tokens as the contract words it: for each bin BOS, then each neuron's count, clipped below BOS."""
    stream = []
    for counts in recordings:
        for one_bin in counts.T.tolist():
            stream += [vocab_size - 1, *(min(count, vocab_size - 2) for count in one_bin)]
    return np.array(stream, np.uint8)
