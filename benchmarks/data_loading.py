"""How fast one core loads windows of 131,072 tokens, and whether the place to resume at matters.

Compares the loader, on a dataset on disk whose rows have the Neural Pile's size, with the straightforward way: rows
as Python lists, appended to a buffer, sliced. Everything comes from a warm page cache.

    python benchmarks/data_loading.py [--json FILE]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchtitan.config.schema import Training
from torchtitan.data.index import RecordingIndex, load_index
from torchtitan.data.loader import Batch, RankSampler, build_loader
from torchtitan.data.recordings import ID_COLUMNS, Recordings, open_recordings
from torchtitan.data.tokens import bos_token
from torchtitan.data.windows import RecordedWindows, WindowOrder, WindowSource

NUM_NEURONS, NUM_BINS, NUM_ROWS = 395, 21_000, 6
MEAN_COUNT = 0.08  # 92 % zeros, as in the Neural Pile
SEQ_LEN, VOCAB_SIZE = 131_072, 256
RESUME_AT, LARGE_INDEX_WINDOWS = 250_000, 300_000
ROUNDS, FIRST_BATCH_REPEATS = 5, 101
LISTS_WINDOWS = ((NUM_NEURONS + 1) * NUM_BINS - 1) // SEQ_LEN  # all windows of one row
LOADER_WINDOWS = 5_000


def write_dataset(folder: Path) -> None:
    """Rows of Poisson counts, each neuron with a rate of its own, as one file of parquet."""
    random = np.random.default_rng(0)
    rates = random.gamma(0.5, MEAN_COUNT / 0.5, (NUM_ROWS * NUM_NEURONS, 1))
    counts = np.concatenate([random.poisson(rate, NUM_BINS).astype(np.uint8) for rate in rates])
    neuron_offsets = np.arange(0, counts.size + 1, NUM_BINS, dtype=np.int32)
    row_offsets = np.arange(0, len(rates) + 1, NUM_NEURONS, dtype=np.int32)
    neurons = pa.ListArray.from_arrays(pa.array(neuron_offsets), pa.array(counts))
    columns = {"spike_counts": pa.ListArray.from_arrays(pa.array(row_offsets), neurons)}
    columns |= {name: pa.array([f"{name}-{i}" for i in range(NUM_ROWS)]) for name in ID_COLUMNS}
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "train.parquet")


def batches(source: WindowSource, cursor: int) -> Iterator[Batch]:
    """One sequence a batch, as a rank of the 8B models loads them, from the cursor on."""
    order = WindowOrder(source.num_windows, seed=0, shuffle=True)
    sampler = RankSampler(order, cursor=cursor, batch_size=1, global_batch_size=1, rank=0, num_ranks=1)
    return iter(build_loader(source, sampler, num_workers=0, pin_memory=False))


def windows_from_lists(recordings: Recordings) -> Iterator[torch.Tensor]:
    """The straightforward loader: one epoch's windows, uint8 [SEQ_LEN + 1]."""
    buffer: list[int] = []
    for row in range(len(recordings)):
        for one_bin in zip(*recordings.dataset[row]["spike_counts"], strict=True):
            buffer.append(bos_token(VOCAB_SIZE))
            buffer.extend(one_bin)
        while len(buffer) > SEQ_LEN:
            yield torch.tensor(buffer[: SEQ_LEN + 1], dtype=torch.uint8)
            buffer = buffer[SEQ_LEN:]


def compare(source: WindowSource, recordings: Recordings) -> tuple[float, float]:
    """Mtokens/s of this loader and of the straightforward one: medians of rounds that take turns."""
    assert source.num_windows is not None
    loader = batches(source, 0)
    seconds_to_read(loader, source.num_windows)  # puts all pages into the cache
    ours, lists = [], []
    for _ in range(ROUNDS):
        ours.append(seconds_to_read(loader, LOADER_WINDOWS))
        lists.append(seconds_to_read(windows_from_lists(recordings), LISTS_WINDOWS))
    to_mtokens = SEQ_LEN / 1e6
    return LOADER_WINDOWS * to_mtokens / statistics.median(ours), LISTS_WINDOWS * to_mtokens / statistics.median(lists)


def seconds_to_read(windows: Iterator[object], count: int) -> float:
    """Time that the next `count` of the windows take."""
    start = time.perf_counter()
    for _ in islice(windows, count):
        pass
    return time.perf_counter() - start


def first_batch_seconds(recordings: Recordings, index: RecordingIndex) -> dict[int, list[float]]:
    """Quartiles of the time from an index to the first batch, by the window to resume at.

    The two are taken in turn, and each time one window further on: where a window lies in its recordings, and whether
    the processor's caches hold it, matters more than what is measured here.
    """
    seconds: dict[int, list[float]] = {0: [], RESUME_AT: []}
    for repeat in range(FIRST_BATCH_REPEATS):
        for cursor, times in seconds.items():
            start = time.perf_counter()
            source = RecordedWindows(recordings, index, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE)
            next(batches(source, cursor + repeat))
            times.append(time.perf_counter() - start)
    return {cursor: statistics.quantiles(times, n=4) for cursor, times in seconds.items()}


def repeat(index: RecordingIndex, num_windows: int) -> RecordingIndex:
    """An index of at least that many windows, whose recordings are those of `index` again and again."""
    times = -(-num_windows * SEQ_LEN // index.num_tokens) + 1
    rows, neurons, bins = (np.tile(column, times) for column in (index.rows, index.neurons, index.bins))
    return RecordingIndex(rows, neurons, bins, index.malformed, fingerprint="repeated")


def cpu_name() -> str:
    """The processor's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Runs all, prints a table, and writes the figures as one JSON object where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder + "/huggingface"  # read when the library is first imported, below
        os.environ.pop("HF_DATASETS_CACHE", None)
        write_dataset(Path(folder, "recordings"))
        training = Training(dataset_path=folder + "/recordings", seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE)
        recordings = open_recordings(training)
        start = time.perf_counter()
        index = load_index(recordings, "error")
        index_seconds = time.perf_counter() - start
        source = RecordedWindows(recordings, index, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE)
        fast, slow = compare(source, recordings)
        large = repeat(index, LARGE_INDEX_WINDOWS)
        quartiles = first_batch_seconds(recordings, large)
        first_batch = {cursor: median for cursor, (_, median, _) in quartiles.items()}

    figures = {
        "mtokens_per_second": fast,
        "mtokens_per_second_lists": slow,
        "ratio_to_lists": fast / slow,
        "first_batch_seconds_at_0": first_batch[0],
        f"first_batch_seconds_at_{RESUME_AT}": first_batch[RESUME_AT],
        "first_batch_seconds_quartiles": list(quartiles.values()),
        "index_seconds": index_seconds,
        "rounds": ROUNDS,
        "windows_a_round": LOADER_WINDOWS,
        "windows_a_round_lists": LISTS_WINDOWS,
        "windows_of_large_index": (large.num_tokens - 1) // SEQ_LEN,
        "first_batch_repeats": FIRST_BATCH_REPEATS,
        "rows": NUM_ROWS,
        "neurons": NUM_NEURONS,
        "bins": NUM_BINS,
        "seq_len": SEQ_LEN,
        "cpu": cpu_name(),
        "cores_used": 1,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "datasets", "pyarrow", "numpy")},
    }
    rows = [
        ["this loader", f"{fast:,.0f} Mtokens/s"],
        ["rows as Python lists", f"{slow:,.2f} Mtokens/s"],
        ["ratio", f"{fast / slow:,.0f} ×"],
        ["index, built", f"{index_seconds * 1e3:.1f} ms"],
        *(
            [f"first batch at window {cursor:,}", f"{median * 1e3:.2f} ms ({low * 1e3:.2f} to {high * 1e3:.2f})"]
            for cursor, (low, median, high) in quartiles.items()
        ),
    ]
    print(f"One core of {figures['cpu']}; windows of {SEQ_LEN:,} tokens, rows of {NUM_NEURONS} × {NUM_BINS:,}")
    print(tabulate(rows, colalign=("left", "right")))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
