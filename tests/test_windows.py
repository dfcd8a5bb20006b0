"""Windows over the stream of recordings, and the order in which they are visited."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import expected_tokens, in_memory, random_recordings, write_rows
from torchtitan.config.schema import Training
from torchtitan.data.index import load_index
from torchtitan.data.recordings import open_recordings
from torchtitan.data.windows import RecordedWindows, Window, WindowOrder, permute

sizes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 8)), min_size=1, max_size=6)


def windows_of(
    rows: list[np.ndarray], *, seq_len: int, vocab_size: int = 256, stride: int | None = None
) -> RecordedWindows:
    """The windows of recordings that are held in memory."""
    return RecordedWindows(*in_memory(rows), seq_len=seq_len, vocab_size=vocab_size, stride=stride)


def read(source: RecordedWindows, window: int) -> tuple[np.ndarray, Window]:
    out = np.full(source.seq_len + 1, 99, np.uint8)
    return out, source.read(window, out)


class TestWindows:
    def test_written_out(self) -> None:
        # The stream: 255 1 3 | 255 2 4 || 255 5 | 255 6 | 255 7, where || parts the recordings.
        rows = [np.array([[1, 2], [3, 4]], np.uint8), np.array([[5, 6, 7]], np.uint8)]
        source = windows_of(rows, seq_len=5)
        assert (source.num_tokens, source.num_windows, source.tail) == (12, 2, 1)
        tokens, window = read(source, 0)
        assert tokens.tolist() == [255, 1, 3, 255, 2, 4]
        assert window == Window(valid=5, documents=[0], origin=(0, 0), clipped=0)
        tokens, window = read(source, 1)
        assert tokens.tolist() == [4, 255, 5, 255, 6, 255]
        assert window == Window(valid=5, documents=[0, 1], origin=(0, 1), clipped=0)
        tokens, window = read(source, 2)
        assert tokens.tolist() == [255, 7, 0, 0, 0, 0]
        assert window == Window(valid=1, documents=[0], origin=(1, 2), clipped=0)

    @given(sizes=sizes, seq_len=st.integers(1, 60), vocab_size=st.sampled_from([3, 8, 256]))
    def test_each_token_but_the_first_is_a_label_exactly_once(
        self, sizes: list[tuple[int, int]], seq_len: int, vocab_size: int
    ) -> None:
        rows = random_recordings(sizes)
        stream = expected_tokens(rows, vocab_size)
        source = windows_of(rows, seq_len=seq_len, vocab_size=vocab_size)
        assert source.num_windows is not None
        labels: list[int] = []
        for k in range(source.num_windows):
            tokens, window = read(source, k)
            assert window.valid == seq_len
            assert tokens.tolist() == stream[k * seq_len : (k + 1) * seq_len + 1].tolist()
            labels += tokens[1:].tolist()
        # What fills no window is dropped from the end of the stream, and is less than a window.
        assert labels == stream[1 : 1 + len(labels)].tolist()
        left = len(stream) - 1 - len(labels)
        assert left == source.tail < seq_len
        if left:
            tokens, window = read(source, source.num_windows)
            assert window.valid == left
            assert tokens[: left + 1].tolist() == stream[-left - 1 :].tolist()
            assert not tokens[left + 1 :].any()

    @given(sizes=sizes, seq_len=st.integers(2, 60), overlap=st.integers(1, 59))
    def test_may_overlap(self, sizes: list[tuple[int, int]], seq_len: int, overlap: int) -> None:
        rows, stride = random_recordings(sizes), max(seq_len - overlap, 1)
        stream = expected_tokens(rows)
        source = windows_of(rows, seq_len=seq_len, stride=stride)
        whole = [k for k in range(len(stream)) if k * stride + seq_len < len(stream)]
        assert source.num_windows == len(whole)
        for k in whole:
            tokens, window = read(source, k)
            assert window.valid == seq_len
            assert tokens.tolist() == stream[k * stride : k * stride + seq_len + 1].tolist()
        seen = whole[-1] * stride + seq_len + 1 if whole else 1
        assert source.tail == len(stream) - seen
        if source.tail:
            tokens, window = read(source, len(whole))
            assert tokens[: window.valid + 1].tolist() == stream[len(whole) * stride :].tolist()

    @given(sizes=sizes, seq_len=st.integers(1, 60), vocab_size=st.sampled_from([3, 8, 256]))
    def test_say_where_they_and_their_recordings_begin_and_what_was_clipped(
        self, sizes: list[tuple[int, int]], seq_len: int, vocab_size: int
    ) -> None:
        rows = random_recordings(sizes)
        source = windows_of(rows, seq_len=seq_len, vocab_size=vocab_size)
        assert source.num_windows is not None
        # For each token of the stream: its recording, its bin, and whether it is a clipped count.
        recording = np.concatenate([np.full((n + 1) * t, i) for i, (n, t) in enumerate(sizes)])
        bins = np.concatenate([np.repeat(np.arange(t), n + 1) for n, t in sizes])
        limit = vocab_size - 2
        too_large = [(counts > limit).T for counts in rows]
        is_clipped = np.concatenate([np.insert(one_row, 0, False, axis=1).reshape(-1) for one_row in too_large])
        for k in range(source.num_windows + (source.tail > 0)):
            _, window = read(source, k)
            seen = slice(k * seq_len, k * seq_len + window.valid + 1)
            inputs = recording[seen][:-1]
            assert window.documents == [i for i in range(len(inputs)) if i == 0 or inputs[i] != inputs[i - 1]]
            assert window.origin == (recording[k * seq_len], bins[k * seq_len])
            assert window.clipped == is_clipped[seen].sum()

    @pytest.mark.parametrize(("seq_len", "windows", "tail"), [(9, 1, 0), (10, 0, 9), (3, 3, 0), (4, 2, 1), (1, 9, 0)])
    def test_the_tail_is_what_fills_no_window(self, seq_len: int, windows: int, tail: int) -> None:
        source = windows_of(random_recordings([(4, 2)]), seq_len=seq_len)
        assert (source.num_tokens, source.num_windows, source.tail) == (10, windows, tail)
        with pytest.raises(AssertionError, match=f"window {windows + (tail > 0)} lies behind the end"):
            read(source, windows + (tail > 0))

    def test_malformed_rows_take_no_part_and_origins_still_name_the_row(self, tmp_path: Path) -> None:
        good = random_recordings([(2, 3), (3, 4)])
        folder = write_rows(tmp_path / "data", {"train": [[], good[0].tolist(), [[1], []], good[1].tolist()]})
        training = Training(dataset_path=str(folder))
        recordings = open_recordings(training)
        source = RecordedWindows(recordings, load_index(recordings, "skip"), seq_len=9, vocab_size=256)
        stream = expected_tokens(good)
        found = [read(source, k) for k in range(3)]
        assert [window.origin for _, window in found] == [(1, 0), (3, 0), (3, 2)]
        assert [tokens[: window.valid + 1].tolist() for tokens, window in found] == [
            stream[0:10].tolist(),
            stream[9:19].tolist(),
            stream[18:].tolist(),
        ]

    def test_real_recordings(self, real_recordings: Path) -> None:
        training = Training(dataset_path=str(real_recordings))
        recordings = open_recordings(training)
        index = load_index(recordings, "error")
        source = RecordedWindows(recordings, index, seq_len=131_072, vocab_size=256)
        lengths = zip(index.neurons.tolist(), index.bins.tolist(), strict=True)
        stream = np.concatenate(
            [
                np.insert(recordings.spike_counts(row, n, t).T, 0, 255, axis=1).reshape(-1)
                for row, (n, t) in enumerate(lengths)
            ]
        )
        assert (source.num_tokens, source.num_windows) == (len(stream), (len(stream) - 1) // 131_072)
        for k in range((len(stream) - 1) // 131_072):
            assert np.array_equal(read(source, k)[0], stream[k * 131_072 : (k + 1) * 131_072 + 1])

    def test_description_for_the_log(self) -> None:
        source = windows_of(random_recordings([(3, 1000), (1, 6)]), seq_len=100)
        assert source.describe() == (
            "in memory: 2 recordings, 4,012 tokens, 40 windows an epoch, 11 tokens in the dropped tail, "
            "fingerprint in memory, in no folder"
        )


class TestPermutation:
    def test_is_one_for_every_length(self) -> None:
        for length in [*range(1, 70), 127, 128, 129, 255, 256, 257, 1000, 1023, 1024, 1025, 4095, 4097]:
            assert sorted(permute(i, length, key=length) for i in range(length)) == list(range(length))

    @pytest.mark.parametrize("length", [10**6, 2**20, 2**20 + 1, 3 * 10**9, 10**15])
    def test_of_a_large_length_puts_no_two_positions_at_one_place(self, length: int) -> None:
        # A mere function into 10⁶ places would, of 8,000 values, put about 30 where another one already is.
        ends = [*range(4000), *range(length - 4000, length)]
        places = {permute(i, length, key=5) for i in ends}
        assert len(places) == len(ends)
        assert min(places) >= 0
        assert max(places) < length

    def test_order_depends_on_seed_and_epoch_and_on_nothing_else(self) -> None:
        def epoch(seed: int, number: int, num_windows: int = 50) -> tuple[int, ...]:
            order = WindowOrder(num_windows, seed=seed, shuffle=True)
            return tuple(order[number * num_windows + i] for i in range(num_windows))

        seeds_and_epochs = [(seed, number) for seed in (0, 1, 2, 2**62) for number in (0, 1, 2, 1000)]
        assert len({epoch(*both) for both in seeds_and_epochs}) == len(seeds_and_epochs)
        assert epoch(3, 4) == epoch(3, 4)
        # Written down: another order would break the resuming of runs that began before it.
        assert epoch(0, 0, 10) == (0, 1, 2, 9, 8, 3, 4, 7, 6, 5)
        assert epoch(7, 3, 10) == (9, 4, 2, 7, 3, 6, 0, 5, 8, 1)

    def test_each_epoch_has_every_window_once_and_runs_into_the_next(self) -> None:
        order = WindowOrder(37, seed=1, shuffle=True)
        windows = [order[cursor] for cursor in range(37 * 5)]
        epochs = [windows[i * 37 : (i + 1) * 37] for i in range(5)]
        assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) == 5

    def test_without_shuffling_windows_come_in_order(self) -> None:
        order = WindowOrder(4, seed=1, shuffle=False)
        assert [order[cursor] for cursor in range(10)] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]

    @pytest.mark.parametrize("shuffle", [True, False])
    def test_an_endless_source_has_no_epochs(self, shuffle: bool) -> None:
        order = WindowOrder(None, seed=1, shuffle=shuffle)
        assert [order[cursor] for cursor in (0, 1, 2, 10**9)] == [0, 1, 2, 10**9]

    @pytest.mark.parametrize("length", [2, 5, 8, 12])
    def test_any_window_may_come_at_any_place_of_an_epoch(self, length: int) -> None:
        order = WindowOrder(length, seed=0, shuffle=True)
        epochs = 1500
        counts = np.zeros((length, length))
        for cursor in range(epochs * length):
            counts[cursor % length, order[cursor]] += 1
        # Pearson's statistic has (length - 1)² degrees of freedom; five standard deviations above is one in a million.
        freedom = (length - 1) ** 2
        statistic = ((counts - epochs / length) ** 2 / (epochs / length)).sum()
        assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5

    def test_all_orders_of_a_few_windows_occur_equally_often(self) -> None:
        order = WindowOrder(4, seed=0, shuffle=True)
        epochs = 4800
        seen = Counter(tuple(order[4 * epoch + i] for i in range(4)) for epoch in range(epochs))
        assert len(seen) == 24
        assert sum((count - epochs / 24) ** 2 / (epochs / 24) for count in seen.values()) < 23 + 5 * 46**0.5

    def test_neighbours_are_torn_apart(self) -> None:
        length = 10_000
        places = np.array([permute(i, length, key=11) for i in range(length)])
        # Of a random order: place and position do not correlate, nor do the places of neighbours, and two
        # neighbours stay neighbours twice in all.
        assert abs(np.corrcoef(np.arange(length), places)[0, 1]) < 5 / length**0.5
        assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 5 / length**0.5
        assert np.count_nonzero(np.abs(np.diff(places)) == 1) < 12
        # Each tenth of the epoch draws alike from each tenth of the windows.
        table = np.histogram2d(np.arange(length), places, bins=10)[0]
        assert ((table - 100) ** 2 / 100).sum() < 81 + 5 * 162**0.5
