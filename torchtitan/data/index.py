"""Where each recording lies in the stream of tokens: the row lengths of a dataset, found once and cached."""

import hashlib
import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchtitan.data.recordings import Recordings
from torchtitan.logging import logger

FORMAT = 1
SAMPLED_ROWS, SAMPLED_BYTES = 256, 4096


@dataclass(frozen=True)
class RecordingIndex:
    """The well-formed rows of a dataset, in order.

    Attributes:
        rows: row number in the dataset, int64 [recordings].
        neurons, bins: size of each recording, int64 [recordings].
        malformed: rows that were left out, int64.
        fingerprint: digest of sizes, identities and a sample of the counts. Equal data elsewhere has an equal one.
    """

    rows: NDArray[np.int64]
    neurons: NDArray[np.int64]
    bins: NDArray[np.int64]
    malformed: NDArray[np.int64]
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole stream, one BOS a bin included."""
        return int(((self.neurons + 1) * self.bins).sum())


def load_index(recordings: Recordings, malformed_rows: str) -> RecordingIndex:
    """The index of `recordings`, from the cache beside the Hugging Face datasets or built and put there.

    Raises:
        ValueError: where no row is left, or there are malformed rows and `malformed_rows` is "error".
    """
    cache = _cache_file(recordings)
    index = _read(cache)
    if index is None or len(index.rows) + len(index.malformed) != len(recordings):
        index = _build(recordings)
        _write(index, cache)
    if index.malformed.size:
        named = ", ".join(map(str, index.malformed[:20])) + (", …" if index.malformed.size > 20 else "")
        rows = f"{index.malformed.size} of {len(recordings)} rows"
        message = f"{recordings.description}: {rows} are ragged, empty or lack counts (null): {named}"
        if malformed_rows == "error":
            raise ValueError(f'{message}; training.malformed_rows = "skip" leaves them out')
        logger.warning(f"{message}; they are left out")
    if not index.rows.size:
        raise ValueError(f"{recordings.description}: no usable rows")
    return index


def check_index(recordings: Recordings, index: RecordingIndex) -> None:
    """Raises ValueError where an index, built on another node, is not of these recordings: caches may differ."""
    if len(index.rows) + len(index.malformed) == len(recordings):
        with suppress(ValueError):  # rows that are too short for the sizes of the index
            if _fingerprint(recordings, index) == index.fingerprint:
                return
    raise ValueError(
        f"{recordings.description}: {os.uname().nodename} holds other data than the node of rank 0; "
        "fill both caches from the same version of the dataset"
    )


def _build(recordings: Recordings) -> RecordingIndex:
    lengths = list(recordings.row_lengths())
    neurons, fewest, most = (
        np.concatenate([chunk[i] for chunk in lengths]) if lengths else np.empty(0, np.int64) for i in range(3)
    )
    good = (neurons > 0) & (fewest > 0) & (fewest == most)
    rows = np.flatnonzero(good)
    index = RecordingIndex(rows, neurons[good], most[good], np.flatnonzero(~good), fingerprint="")
    return RecordingIndex(rows, index.neurons, index.bins, index.malformed, _fingerprint(recordings, index))


def _fingerprint(recordings: Recordings, index: RecordingIndex) -> str:
    digest = hashlib.sha256()
    for array in (index.rows, index.neurons, index.bins, index.malformed):
        digest.update(array.astype("<i8").tobytes() + b"|")
    for name, values in recordings.ids().items():
        digest.update(f"{name}:{values!r}|".encode())
    picked = np.unique(np.linspace(0, len(index.rows) - 1, SAMPLED_ROWS).astype(int)) if index.rows.size else []
    for i in picked:
        counts = recordings.spike_counts(int(index.rows[i]), int(index.neurons[i]), int(index.bins[i])).reshape(-1)
        middle = max(0, (counts.size - SAMPLED_BYTES) // 2)
        digest.update(counts[middle : middle + SAMPLED_BYTES].tobytes())
    return digest.hexdigest()[:16]


def _cache_file(recordings: Recordings) -> Path:
    import datasets.config

    return Path(datasets.config.HF_DATASETS_CACHE) / "torchtitan" / f"{recordings.cache_key}-v{FORMAT}.npz"


def _read(path: Path) -> RecordingIndex | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            columns = {name: arrays[name] for name in ("rows", "neurons", "bins", "malformed")}
            return RecordingIndex(**columns, fingerprint=str(arrays["fingerprint"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        logger.warning(f"{path}: the cached index cannot be read ({error}); it is built again")
        return None


def _write(index: RecordingIndex, path: Path) -> None:
    """Into place by a rename, so that another run never reads half a file. The cache is a convenience: it may fail."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, **vars(index))
        temporary.replace(path)
    except OSError as error:
        logger.warning(f"{path}: the index cannot be cached ({error.strerror}); the next start builds it again")
