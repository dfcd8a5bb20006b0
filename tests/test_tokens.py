"""The layout of the tokens, clipping, and the way back."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tests.helpers import expected_tokens
from torchtitan.data.tokens import bos_token, decode, encode, largest_count, write_tokens

matrices = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=12))
# Few spikes in most bins, as in recordings, besides the uniform counts.
sparse_matrices = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 4))
vocab_sizes = st.integers(3, 256)


def test_layout_of_a_recording_written_out() -> None:
    counts = np.array([[0, 1, 2], [3, 0, 255]], np.uint8)
    assert encode(counts).tolist() == [255, 0, 3, 255, 1, 0, 255, 2, 254]
    assert encode(counts, vocab_size=4).tolist() == [3, 0, 2, 3, 1, 0, 3, 2, 2]


@given(counts=matrices | sparse_matrices, vocab_size=vocab_sizes)
def test_encode_writes_bos_and_the_counts_of_each_bin(counts: np.ndarray, vocab_size: int) -> None:
    tokens = encode(counts, vocab_size)
    assert tokens.dtype == np.uint8
    assert tokens.tolist() == expected_tokens([counts], vocab_size).tolist()
    # BOS means BOS: it stands at the beginning of each bin and nowhere else.
    bins = np.flatnonzero(tokens == vocab_size - 1)
    assert bins.tolist() == list(range(0, len(tokens), counts.shape[0] + 1))


@given(counts=matrices | sparse_matrices, vocab_size=vocab_sizes)
def test_decode_is_the_inverse_but_for_clipping(counts: np.ndarray, vocab_size: int) -> None:
    decoded = decode(encode(counts, vocab_size), counts.shape[0], vocab_size)
    assert decoded.dtype == np.uint8
    assert decoded.tolist() == np.minimum(counts, vocab_size - 2).tolist()


@given(counts=matrices | sparse_matrices, vocab_size=vocab_sizes, data=st.data())
def test_any_piece_is_that_slice_of_the_whole(counts: np.ndarray, vocab_size: int, data: st.DataObject) -> None:
    whole = expected_tokens([counts], vocab_size)
    is_clipped = np.concatenate([np.r_[False, one_bin > vocab_size - 2] for one_bin in counts.T])
    start = data.draw(st.integers(0, len(whole) - 1), label="start")
    stop = data.draw(st.integers(start + 1, len(whole)), label="stop")
    room = np.full(len(whole) + 2, 77, np.uint8)
    clipped = write_tokens(counts, start, room[1 : 1 + stop - start], vocab_size)
    assert room.tolist() == [77, *whole[start:stop].tolist(), *[77] * (len(room) - 1 - (stop - start))]
    assert clipped == is_clipped[start:stop].sum()


@pytest.mark.parametrize("layout", ["transposed", "strided", "broadcast", "read-only"])
def test_counts_may_lie_in_memory_in_any_way(layout: str) -> None:
    counts = np.random.default_rng(0).integers(0, 256, (6, 10), dtype=np.uint8)
    views = {
        "transposed": np.asfortranarray(counts),
        "strided": np.repeat(np.repeat(counts, 2, 0), 3, 1)[::2, ::3],
        "broadcast": np.broadcast_to(counts[:, :1], counts.shape),
        "read-only": np.frombuffer(counts.tobytes(), np.uint8).reshape(counts.shape),
    }
    view = views[layout]
    before = view.tolist()
    assert encode(view, 20).tolist() == expected_tokens([np.array(before, np.uint8)], 20).tolist()
    assert view.tolist() == before


def test_the_largest_count_that_is_kept_is_next_to_bos() -> None:
    counts = np.array([[253, 254, 255]], np.uint8)
    out = np.empty(6, np.uint8)
    assert write_tokens(counts, 0, out, 256) == 1
    assert (bos_token(256), largest_count(256)) == (255, 254)
    assert out.tolist() == [255, 253, 255, 254, 255, 254]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([9, 1, 2, 9, 1], "5 tokens are not whole bins of 2 neurons"),
        ([9, 1, 2, 9, 1, 9], "BOS does not stand"),
        ([1, 2, 9, 1, 2, 9], "BOS does not stand"),
        ([9, 1, 2, 8, 1, 2], "BOS does not stand"),
    ],
)
def test_decode_refuses_what_encode_never_writes(tokens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(np.array(tokens, np.uint8), num_neurons=2, vocab_size=10)


@pytest.mark.parametrize(("file", "num_counts"), [("nelpy", 8_434_384), ("aplysia", 1_429_602)])
def test_real_recordings(real_recordings: Path, file: str, num_counts: int) -> None:
    rows = pq.read_table(real_recordings / f"{file}.parquet").column("spike_counts")
    total = 0
    for row in rows:
        counts = np.stack([neuron.values.to_numpy() for neuron in row.values])
        for vocab_size in (256, 4):
            tokens = encode(counts, vocab_size)
            limit = vocab_size - 2
            with_bos = np.vstack([np.full((1, counts.shape[1]), vocab_size - 1), np.clip(counts, 0, limit)])
            assert np.array_equal(tokens, with_bos.T.reshape(-1))
            assert write_tokens(counts, 0, tokens, vocab_size) == np.count_nonzero(counts > limit)
            assert np.array_equal(decode(tokens, len(counts), vocab_size), np.clip(counts, 0, limit))
        total += counts.size
    assert total == num_counts
