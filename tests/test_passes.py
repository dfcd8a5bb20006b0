"""Which tokens a pass scores: each once, and in rounds that leave no rank alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import in_memory, random_recordings
from torchtitan.config.schema import Training
from torchtitan.distributed.world import World
from torchtitan.evaluation.passes import Pass, Rounds, of_sources, open_held_out

sizes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 8)), min_size=1, max_size=6)


def scored_tokens(over: Pass) -> list[int]:
    """Places in the stream of all tokens that are scored."""
    return [place for window in over.chosen for place in range(*over.scored(window))]


@given(sizes=sizes, seq_len=st.integers(1, 60))
def test_each_token_but_the_first_is_scored_exactly_once(sizes: list[tuple[int, int]], seq_len: int) -> None:
    over = Pass(*in_memory(random_recordings(sizes)), seq_len=seq_len, vocab_size=256)
    assert scored_tokens(over) == list(range(1, over.windows.num_tokens))
    assert over.num_scored == over.windows.num_tokens - 1


@given(sizes=sizes, seq_len=st.integers(1, 60), share=st.floats(0, 1), overlap=st.booleans())
def test_min_context(sizes: list[tuple[int, int]], seq_len: int, share: float, overlap: bool) -> None:
    min_context = round(share * seq_len)
    recordings, index = in_memory(random_recordings(sizes))
    options = {"seq_len": seq_len, "vocab_size": 256, "min_context": min_context, "overlap": overlap}
    if index.num_tokens - 1 < min_context:
        with pytest.raises(ValueError, match=f"--min_context {min_context}: no token of in memory has that much"):
            Pass(recordings, index, **options)
        return
    over = Pass(recordings, index, **options)
    for window in over.chosen:
        start, stop = over.scored(window)
        assert start < stop
        assert start - window * over.windows.stride >= min_context
        assert stop - 1 - window * over.windows.stride <= seq_len
    first = max(min_context, 1)
    if overlap:
        expected = list(range(first, index.num_tokens))
    else:
        expected = [place for place in range(1, index.num_tokens) if (place - 1) % seq_len + 1 >= first]
    assert scored_tokens(over) == expected


def test_more_context_than_a_window_has() -> None:
    with pytest.raises(ValueError, match=r"--min_context 11: no token has that much .* training\.seq_len = 10 tokens"):
        Pass(*in_memory(random_recordings([(3, 50)])), seq_len=10, vocab_size=256, min_context=11)


def test_some_windows_are_spread_evenly() -> None:
    recordings = in_memory(random_recordings([(9, 101)]))  # 100 whole windows and a tail
    assert Pass(*recordings, seq_len=10, vocab_size=256, max_windows=5).chosen == [10, 30, 50, 70, 90]
    assert Pass(*recordings, seq_len=10, vocab_size=256, max_windows=1).chosen == [50]
    assert Pass(*recordings, seq_len=10, vocab_size=256, max_windows=1000).chosen == list(range(101))


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 5))
def test_rounds(num_windows: int, batch_size: int, num_ranks: int) -> None:
    """Every window once, in order; on each rank as many batches, all of one size."""
    chosen = list(range(100, 100 + num_windows))
    of_ranks = [Rounds(chosen, batch_size=batch_size, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    batches = [list(rounds) for rounds in of_ranks]
    assert {len(mine) for mine in batches} == {len(of_ranks[0])}
    assert {len(batch) for mine in batches for batch in mine} == {batch_size}
    kept = []
    for number in range(len(of_ranks[0])):
        scored = [window for mine in batches for window in mine[number]]
        windows = list(of_ranks[0].windows(number))
        assert scored[: len(windows)] == windows
        kept += windows
    assert kept == chosen
    # No more is repeated than fills the last round.
    repeated = sum(Counter(window for mine in batches for batch in mine for window in batch).values()) - num_windows
    assert repeated < batch_size * num_ranks


def test_synthetic_data_has_two_splits(world: World) -> None:
    training = Training(dataset="synthetic")
    train, test = (open_held_out(training, world, split, "--split")[1] for split in ("train", "test"))
    assert train.fingerprint != test.fingerprint
    with pytest.raises(ValueError, match=r'validation\.split = "tset": synthetic data has only train, test'):
        open_held_out(training, world, "tset", "validation.split")


class TestSources:
    rows = random_recordings([(2, 3), (3, 4), (4, 5), (1, 2)])
    sources = ("churchland", "allen", "churchland", "steinmetz")

    def test_the_rows_of_some_make_a_stream_of_their_own(self) -> None:
        recordings, index = in_memory(self.rows, self.sources)
        index = of_sources(recordings, index, ["churchland", "steinmetz"])
        assert index.rows.tolist() == [0, 2, 3]
        over = Pass(recordings, index, seq_len=1000, vocab_size=256)
        out = np.zeros(1001, np.uint8)
        over.windows.read(0, out)
        alone = Pass(*in_memory([self.rows[i] for i in (0, 2, 3)]), seq_len=1000, vocab_size=256)
        expected = np.zeros(1001, np.uint8)
        alone.windows.read(0, expected)
        assert np.array_equal(out, expected)

    def test_one_that_is_not_there(self) -> None:
        recordings, index = in_memory(self.rows, self.sources)
        with pytest.raises(ValueError, match=r"--source_dataset churchlnd: .* did you mean churchland\?"):
            of_sources(recordings, index, ["allen", "churchlnd"])
        with pytest.raises(ValueError, match="there are allen, churchland, steinmetz"):
            of_sources(recordings, index, ["xyz"])
