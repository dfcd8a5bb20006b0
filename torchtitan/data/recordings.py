"""Finds the recordings, checks their columns, and gives each one's spike counts without copying them."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from torchtitan.config.schema import Training
from torchtitan.data.tokens import Counts
from torchtitan.logging import logger

if TYPE_CHECKING:
    import datasets

HUB_DATASETS = {"primate": "eminorhan/neural-pile-primate", "rodent": "eminorhan/neural-pile-rodent"}
ID_COLUMNS = ("subject_id", "session_id", "segment_id", "source_dataset")


class Recordings:
    """The rows of one split, memory-mapped: each a matrix of spike counts, neurons × 20 ms bins, uint8.

    Pickles as the path of its files, so that loader processes map the same pages.
    """

    def __init__(self, dataset: "datasets.Dataset", description: str) -> None:
        self.dataset = dataset
        self.description = description
        self._map_columns()

    def _map_columns(self) -> None:
        column = self.dataset.data.column("spike_counts")
        self._chunks = [_Chunk(chunk) for chunk in column.chunks if len(chunk)]
        self._first_rows = np.cumsum([0, *(chunk.num_rows for chunk in self._chunks)])

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    @property
    def cache_key(self) -> str:
        """Hugging Face's fingerprint of the split: names the files, and changes when they do."""
        return str(self.dataset._fingerprint)

    @property
    def location(self) -> str:
        """The folders of the Arrow files that are mapped."""
        folders = sorted({str(Path(file["filename"]).parent) for file in self.dataset.cache_files})
        return ", ".join(folders) or "no folder"

    def spike_counts(self, row: int, num_neurons: int, num_bins: int) -> Counts:
        """Counts of a row that the index found to be well-formed: a read-only view, uint8 [neurons, bins]."""
        chunk = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self._chunks[chunk].counts(row - int(self._first_rows[chunk]), num_neurons, num_bins)

    def row_lengths(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each chunk of rows: neurons, fewest and most bins of a neuron (int64 each), from the offsets alone."""
        return (chunk.row_lengths() for chunk in self._chunks)

    def ids(self) -> dict[str, list[str]]:
        """The identity columns of all rows."""
        return {name: self.dataset.data.column(name).to_pylist() for name in ID_COLUMNS}

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "description": self.description}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class _Chunk:
    """Arrow's buffers of consecutive rows: row offsets, neuron offsets, counts."""

    def __init__(self, rows: pa.ListArray) -> None:
        neurons = rows.values
        self.num_rows = len(rows)
        self._rows, self._neurons = rows, neurons
        self.row_offsets = np.asarray(rows.offsets)
        self.neuron_offsets = np.asarray(neurons.offsets)
        values = neurons.values
        self._null_counts = np.flatnonzero(values.is_null()) if values.null_count else np.empty(0, np.int64)
        buffer = values.buffers()[1]
        self.values = np.frombuffer(buffer, np.uint8)[values.offset :] if buffer else np.empty(0, np.uint8)

    def counts(self, row: int, num_neurons: int, num_bins: int) -> Counts:
        start = int(self.neuron_offsets[self.row_offsets[row]])
        return self.values[start : start + num_neurons * num_bins].reshape(num_neurons, num_bins)

    def row_lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        num_neurons = np.diff(self.row_offsets).astype(np.int64)
        bins = np.diff(self.neuron_offsets).astype(np.int64)
        # A missing neuron, or one with a missing count, counts as one without bins: that makes its row malformed.
        if self._neurons.null_count:
            bins[np.asarray(self._neurons.is_null())] = 0
        holders = np.searchsorted(self.neuron_offsets, self._null_counts, side="right") - 1
        bins[holders[(holders >= 0) & (holders < len(bins))]] = 0  # a slice's buffers may reach beyond its neurons
        fewest, most = np.zeros_like(num_neurons), np.zeros_like(num_neurons)
        filled = np.flatnonzero(num_neurons)
        if filled.size:
            # The neurons of consecutive rows lie one after another: reduceat takes each row's stretch.
            starts = self.row_offsets[filled]
            stretch = bins[: self.row_offsets[-1]]
            fewest[filled] = np.minimum.reduceat(stretch, starts)
            most[filled] = np.maximum.reduceat(stretch, starts)
        if self._rows.null_count:
            num_neurons[np.asarray(self._rows.is_null())] = 0
        return num_neurons, fewest, most


def open_recordings(training: Training, split: str | None = None, named: str = "training.split") -> Recordings:
    """Opens the recordings that the configuration names: of `split`, or of `training.split`.

    Raises:
        ValueError: where they are not there, lack a column, have one of another type, or have no such split, which
            is then told by the name of the setting that has given it.
    """
    path, pile = training.dataset_path, str(training.dataset)
    found = load_path(path, "training.dataset_path") if path else load_pile(pile, "training.dataset")
    wanted = split or training.split
    recordings = found.recordings(wanted, named)
    others = ", ".join(f"{name} ({len(rows):,} rows)" for name, rows in found.splits.items() if name != wanted)
    if others and split is None:
        logger.info(f"{found.origin} has further splits, which are not used here: {others}")
    return recordings


@dataclass(frozen=True)
class Found:
    """A dataset with all of its splits.

    Attributes:
        splits: by name.
        origin: its repository or path.
    """

    splits: dict[str, "datasets.Dataset"]
    origin: str

    def recordings(self, split: str, named: str) -> Recordings:
        """Those of a split that the setting `named` has given; raises ValueError as `open_recordings`."""
        if split not in self.splits:
            advice = "; scripts/hold_out.py parts recordings into train and test" if split == "test" else ""
            raise ValueError(f'{named} = "{split}": {self.origin} has only {", ".join(self.splits)}{advice}')
        _check_columns(self.splits[split], self.origin)
        return Recordings(self.splits[split], f"{self.origin}, split {split}")


def load_pile(name: str, named: str) -> Found:
    """One of `HUB_DATASETS` from the cache; raises ValueError, by the setting `named`, where it is not there."""
    _stay_offline()
    import datasets.config

    repository = HUB_DATASETS[name]
    try:
        return Found({str(split): rows for split, rows in datasets.load_dataset(repository).items()}, repository)
    except (OSError, ValueError) as error:  # offline and absent: ConnectionError or FileNotFoundError, both OSError
        fill = f"HF_HUB_OFFLINE=0 python -c \"import datasets; datasets.load_dataset('{repository}')\""
        raise ValueError(
            f'{named} = "{name}": {repository} is not in the cache {datasets.config.HF_DATASETS_CACHE}; '
            f"fill it on a machine with network by\n  {fill}\nor set HF_HOME to the folder that holds it"
            f" ({type(error).__name__}: {_reason(error)})"
        ) from error


def load_path(given: str, named: str) -> Found:
    """Parquet files or a saved dataset; raises ValueError, by the setting `named`, where they cannot be read."""
    _stay_offline()
    import datasets.exceptions

    path = Path(given).expanduser()
    problem = f'{named} = "{given}"'
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what it logs as an error, it raises
    if not path.exists():
        raise ValueError(f"{problem}: no such file or folder")
    try:
        if path.is_file():
            loaded = datasets.load_dataset("parquet", data_files=str(path))
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(path))
        elif any(path.rglob("*.parquet")):
            loaded = datasets.load_dataset("parquet", data_files=_parquet_files(str(path)))
        else:
            raise ValueError("holds neither parquet files nor a save_to_disk dataset")
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        # What the system refuses, it names itself; only for the rest are files worth reading once more.
        refused = getattr(error.__cause__ or error, "errno", None) is not None
        raise ValueError(f"{problem}: {(not refused and _broken_parquet(path)) or _reason(error)}") from error
    except IndexError as error:  # what load_from_disk makes of a split without rows
        raise ValueError(f"{problem}: a split of it has no rows") from error
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
    return Found({str(split): rows for split, rows in splits.items()}, str(path))


def _stay_offline() -> None:
    """Compute nodes have no network: the library would wait for it, or fetch a whole pile on every node."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()


def _parquet_files(folder: str) -> dict[str, list[str]]:
    """The files of each split by the library's own naming rules, which take notes and checksums for data too."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    found = DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder, allowed_extensions=[".parquet"])
    return {str(split): list(files) for split, files in found.items() if files}


def _reason(error: BaseException) -> str:
    """What the library found wrong, in one line; it wraps the message that says so in a general one."""
    return " ".join(str(error.__cause__ or error).split()) or type(error).__name__


def _broken_parquet(path: Path) -> str | None:
    """Which parquet file it is that could not be loaded, and why; None where there is no such file."""
    import pyarrow.parquet as pq

    columns: list[str] = []
    for file in [path] if path.is_file() else sorted(path.rglob("[!.]*.parquet")):
        try:
            opened = pq.ParquetFile(file)
        except (OSError, pa.ArrowException) as error:
            return f"{file} is not a parquet file, or not all of one; write or copy it again ({_reason(error)})"
        if not opened.metadata.num_rows:
            return f"{file} has no rows"
        columns = columns or opened.schema_arrow.names
        if opened.schema_arrow.names != columns:
            return (
                f"{file} has columns {', '.join(opened.schema_arrow.names)}, the files before it {', '.join(columns)}"
            )
        try:
            for _ in opened.iter_batches():
                pass
        except (OSError, pa.ArrowException) as error:
            return f"{file} is damaged; write or copy it again ({_reason(error)})"
    return None


def _check_columns(dataset: "datasets.Dataset", origin: str) -> None:
    schema = dataset.data.schema
    problems = []
    missing = [name for name in ("spike_counts", *ID_COLUMNS) if name not in schema.names]
    if missing:
        are = f"column {missing[0]} is" if len(missing) == 1 else f"columns {', '.join(missing)} are"
        problems.append(f"{are} missing (found: {', '.join(schema.names)})")
    if "spike_counts" not in missing:
        found = schema.field("spike_counts").type
        if not _is_list(found) or not _is_list(found.value_type) or found.value_type.value_type != pa.uint8():
            problem = f"column spike_counts has type {found}, not lists (neurons) of lists (bins) of uint8"
            if _is_numbers(found, nesting=2):
                problem += '; dataset.cast_column("spike_counts", List(List(Value("uint8")))) converts it'
            problems.append(problem)
    for name in ID_COLUMNS:
        if name in missing:
            continue
        found = schema.field(name).type
        if not (pa.types.is_string(found) or pa.types.is_large_string(found)):
            cast = f'dataset.cast_column("{name}", Value("string")) converts it'
            problems.append(f"column {name} has type {found}, not string; {cast}")
        elif nulls := dataset.data.column(name).null_count:
            problems.append(f'column {name} has {nulls:,} nulls; give each row one, if only "unknown"')
    if problems:
        raise ValueError(f"{origin}: " + "; ".join(problems))


def _is_numbers(arrow_type: pa.DataType, nesting: int) -> bool:
    """Whether it is lists of lists … of numbers, that many deep."""
    if not nesting:
        return pa.types.is_integer(arrow_type) or pa.types.is_floating(arrow_type)
    is_list = _is_list(arrow_type) or pa.types.is_fixed_size_list(arrow_type)
    return is_list and _is_numbers(arrow_type.value_type, nesting - 1)


def _is_list(arrow_type: pa.DataType) -> bool:
    return pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type)
