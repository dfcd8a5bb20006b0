"""Batches: the same for any split into ranks and workers, whole again after a resume, and read without copies."""

import os
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.helpers import expected_tokens, ids, random_recordings, write_recordings
from torchtitan.config.schema import Training
from torchtitan.data.index import load_index
from torchtitan.data.loader import Batch, RankSampler, WindowDataset, build_loader, open_windows
from torchtitan.data.recordings import open_recordings
from torchtitan.data.windows import RecordedWindows, WindowOrder

SEQ_LEN = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> RecordedWindows:
    """Twenty windows and a tail of recordings with counts that a vocabulary of 9 clips."""
    rows = random_recordings([(3, 30), (1, 9), (5, 25), (2, 13)], largest=9)
    return open_source(write_recordings(tmp_path_factory.mktemp("data"), {"train": rows}), SEQ_LEN)


@pytest.fixture(scope="module")
def stream() -> list[int]:
    return expected_tokens(random_recordings([(3, 30), (1, 9), (5, 25), (2, 13)], largest=9), vocab_size=9).tolist()


def open_source(folder: Path, seq_len: int, vocab_size: int = 9) -> RecordedWindows:
    training = Training(dataset_path=str(folder), seq_len=seq_len, vocab_size=vocab_size)
    recordings = open_recordings(training)
    windows = open_windows(training, recordings, load_index(recordings, "error"))
    assert isinstance(windows, RecordedWindows)
    return windows


def sampler(order: WindowOrder, cursor: int, **split: int) -> RankSampler:
    return RankSampler(
        order, cursor=cursor, **{"batch_size": 1, "global_batch_size": 1, "rank": 0, "num_ranks": 1, **split}
    )


def global_batches(
    order: WindowOrder, cursor: int, ranks: int, batch_size: int, accumulate: int
) -> Iterator[list[int]]:
    """The windows of each step: what its ranks read, one rank after another, micro-batch after micro-batch."""
    size = ranks * batch_size * accumulate
    samplers = [
        iter(sampler(order, cursor, batch_size=batch_size, global_batch_size=size, rank=rank, num_ranks=ranks))
        for rank in range(ranks)
    ]
    while True:
        read = [[next(one_rank) for _ in range(accumulate)] for one_rank in samplers]
        assert all(len(batch) == batch_size for batches in read for batch in batches)
        yield [window for batches in read for batch in batches for window in batch]


class TestRankSampler:
    @pytest.mark.parametrize("shuffle", [True, False])
    def test_every_split_gives_the_same_global_batches_in_the_same_order(self, shuffle: bool) -> None:
        # 17 windows an epoch: batches of 12 run over the end of several epochs.
        order = WindowOrder(17, seed=4, shuffle=shuffle)
        expected = [[order[12 * step + i] for i in range(12)] for step in range(9)]
        splits = [(r, b, 12 // (r * b)) for r in (1, 2, 3, 4, 6, 12) for b in (1, 2, 3, 4, 6, 12) if 12 % (r * b) == 0]
        assert len(splits) > 15
        for ranks, batch_size, accumulate in splits:
            found = list(islice(global_batches(order, 0, ranks, batch_size, accumulate), 9))
            assert found == expected
        in_a_row = [window for batch in expected for window in batch]
        assert sorted(in_a_row[:17]) == sorted(in_a_row[17:34]) == list(range(17))

    @given(
        num_windows=st.none() | st.integers(1, 40),
        seed=st.integers(0, 2**63 - 1),
        start=st.integers(0, 1000),
        sessions=st.lists(
            st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5)),
            min_size=1,
            max_size=5,
        ),
    )
    def test_resuming_on_other_ranks_goes_on_with_each_window_once(
        self, num_windows: int | None, seed: int, start: int, sessions: list[tuple[int, int, int, int]]
    ) -> None:
        order = WindowOrder(num_windows, seed=seed, shuffle=True)
        cursor, seen = start, []
        for ranks, batch_size, accumulate, steps in sessions:
            for batch in islice(global_batches(order, cursor, ranks, batch_size, accumulate), steps):
                seen += batch
                cursor += len(batch)
        assert seen == [order[i] for i in range(start, cursor)]
        if num_windows is not None:
            first = -start % num_windows  # the first whole epoch
            for epoch in range(first, len(seen) - num_windows + 1, num_windows):
                assert sorted(seen[epoch : epoch + num_windows]) == list(range(num_windows))

    def test_can_be_walked_again_from_its_cursor(self) -> None:
        one = sampler(WindowOrder(10, seed=0, shuffle=True), 3)
        assert list(islice(one, 30)) == list(islice(one, 30))


class TestBatches:
    def test_hold_what_the_windows_are(self, source: RecordedWindows, stream: list[int]) -> None:
        batch = WindowDataset(source).__getitems__([2, 0, 7])
        assert isinstance(batch, Batch)
        assert batch.tokens.dtype == torch.uint8
        assert batch.tokens.tolist() == [stream[16 * k : 16 * k + 17] for k in (2, 0, 7)]
        assert batch.windows.tolist() == [2, 0, 7]
        assert batch.valid.tolist() == [16, 16, 16]
        # Bins of 4 tokens: windows 2 and 0 begin in the first recording, window 7 in its bin 28 and ends in the next.
        assert batch.origins.tolist() == [[0, 8], [0, 0], [0, 28]]
        assert batch.documents.tolist() == [0, 16, 32, 40]
        assert [column.dtype for column in batch] == [
            torch.uint8,
            torch.int64,
            torch.int32,
            torch.int64,
            torch.int64,
            torch.int64,
        ]
        rows = random_recordings([(3, 30), (1, 9), (5, 25), (2, 13)], largest=9)
        is_clipped = np.concatenate(
            [np.insert((counts.T > 7).astype(int), 0, 0, axis=1).reshape(-1) for counts in rows]
        )
        assert batch.clipped.tolist() == [is_clipped[16 * k : 16 * k + 17].sum() for k in (2, 0, 7)]
        assert batch.clipped.sum() > 0

    def test_of_the_short_last_window(self, source: RecordedWindows, stream: list[int]) -> None:
        assert source.num_windows is not None
        tail = (len(stream) - 1) % 16
        assert 0 < tail == source.tail
        [batch] = build_loader(source, Windows([[source.num_windows]]), num_workers=0, pin_memory=False)
        assert batch.valid.tolist() == [tail]
        assert batch.tokens.tolist() == [stream[-tail - 1 :] + [0] * (16 - tail)]

    @pytest.mark.parametrize("num_workers", [0, 1, 2])
    def test_come_in_the_order_of_the_cursor_whoever_reads_them(
        self, source: RecordedWindows, stream: list[int], num_workers: int
    ) -> None:
        order = WindowOrder(source.num_windows, seed=2, shuffle=True)
        ranks, steps, cursor = 2, 12, 5
        loaders = [
            iter(
                build_loader(
                    source,
                    sampler(order, cursor, batch_size=2, global_batch_size=4, rank=rank, num_ranks=ranks),
                    num_workers=num_workers,
                    pin_memory=False,
                )
            )
            for rank in range(ranks)
        ]
        windows, tokens = [], []
        for _ in range(steps):
            for loader in loaders:
                batch = next(loader)
                assert isinstance(batch, Batch)
                windows += batch.windows.tolist()
                tokens += batch.tokens.tolist()
        assert windows == [order[cursor + i] for i in range(4 * steps)]
        assert tokens == [stream[16 * k : 16 * k + 17] for k in windows]

    def test_of_synthetic_data_are_those_of_the_cursor(self) -> None:
        windows = open_windows(Training(dataset="synthetic", seq_len=50, seed=3))
        order = WindowOrder(windows.num_windows, seed=3, shuffle=True)
        loader = build_loader(windows, sampler(order, 10**6), num_workers=1, pin_memory=False)
        found = [batch.tokens[0].numpy() for batch in islice(loader, 3)]
        for k, tokens in enumerate(found):
            expected = np.empty(51, np.uint8)
            windows.read(10**6 + k, expected)
            assert np.array_equal(tokens, expected)


class Windows(torch.utils.data.Sampler[list[int]]):
    """The batches of this list."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


@pytest.fixture(scope="module")
def large_source(tmp_path_factory: pytest.TempPathFactory) -> RecordedWindows:
    """48 MB of counts, in windows of 131,072 tokens."""
    neurons, bins, rows = 200, 10_000, 24
    counts = pa.array(np.random.default_rng(0).integers(0, 9, neurons * bins * rows, dtype=np.uint8))
    per_neuron = pa.ListArray.from_arrays(pa.array(np.arange(0, len(counts) + 1, bins, dtype=np.int32)), counts)
    per_row = pa.ListArray.from_arrays(pa.array(np.arange(0, len(per_neuron) + 1, neurons, dtype=np.int32)), per_neuron)
    folder = tmp_path_factory.mktemp("large")
    pq.write_table(pa.table({"spike_counts": per_row, **ids(rows)}), folder / "train.parquet", row_group_size=5)
    return open_source(folder, 131_072, vocab_size=256)


class TestMemory:
    def test_a_dataset_pickles_without_its_data(self, large_source: RecordedWindows) -> None:
        pickled = pickle.dumps(WindowDataset(large_source))
        assert len(pickled) < 50_000
        copy = pickle.loads(pickled)
        assert torch.equal(copy[7].tokens, WindowDataset(large_source)[7].tokens)

    @pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc to read memory use from")
    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_stays_flat_over_an_epoch(self, large_source: RecordedWindows, num_workers: int) -> None:
        assert large_source.num_windows == 368
        order = WindowOrder(large_source.num_windows, seed=0, shuffle=True)
        loader: DataLoader[Any] = build_loader(
            large_source, sampler(order, 0), num_workers=num_workers, pin_memory=False
        )
        batches = iter(loader)
        processes = [worker.pid for worker in getattr(batches, "_workers", [])] or [os.getpid()]
        assert len(processes) == max(1, num_workers)
        first = [next(batches).windows.item() for _ in range(40)]
        before = anonymous_megabytes(processes[0])
        rest = [next(batches).windows.item() for _ in range(368 - 40)]
        # Copies of what was read would be 43 MB more.
        assert anonymous_megabytes(processes[0]) - before < 5
        assert sorted(first + rest) == list(range(368))


def anonymous_megabytes(process: int) -> float:
    """Memory that a process holds for itself: not the pages of the files that it maps."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no RssAnon")
