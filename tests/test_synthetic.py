"""Synthetic windows: functions of seed and window alone, of recordings of the sizes and activity that are promised."""

import numpy as np
import pytest

from torchtitan.config.schema import Training
from torchtitan.data.loader import open_windows
from torchtitan.data.synthetic import Kind, SyntheticWindows, latent_dynamics, spike_counts
from torchtitan.data.windows import Window

KINDS: list[Kind] = ["regular", "poisson"]


def source(
    kind: Kind, *, split: str = "train", seed: int = 0, seq_len: int = 4096, vocab_size: int = 256
) -> SyntheticWindows:
    return SyntheticWindows(kind=kind, split=split, seed=seed, seq_len=seq_len, vocab_size=vocab_size)


def read(windows: SyntheticWindows, window: int) -> tuple[np.ndarray, Window]:
    out = np.full(windows.seq_len + 1, 99, np.uint8)
    return out, windows.read(window, out)


def recordings_of(tokens: np.ndarray, window: Window) -> list[np.ndarray]:
    """The stretches of the window that belong to one recording each; the last one's end is the window's."""
    return np.split(tokens, window.documents[1:])


@pytest.mark.parametrize("kind", KINDS)
class TestWindows:
    def test_are_a_function_of_seed_and_window(self, kind: Kind) -> None:
        windows = source(kind)
        first = {k: read(windows, k) for k in (0, 1, 5, 10**7)}
        for k in (10**7, 5, 0, 1):
            tokens, window = read(source(kind), k)
            assert np.array_equal(tokens, first[k][0])
            assert window == first[k][1]

    def test_differ_by_window_seed_split_and_kind(self, kind: Kind) -> None:
        other_kind: Kind = "poisson" if kind == "regular" else "regular"
        found = [read(source(kind), k)[0] for k in (0, 1, 2, 2**33)]
        found += [read(source(kind, seed=seed), 0)[0] for seed in (1, 2, 2**63 - 1)]
        found += [read(source(kind, split="test"), 0)[0], read(source(other_kind), 0)[0]]
        assert len({tokens.tobytes() for tokens in found}) == len(found)

    def test_are_whole_bins_of_each_recording(self, kind: Kind) -> None:
        windows = source(kind, seq_len=2_000_000)
        whole = 0
        for k in range(4):
            tokens, window = read(windows, k)
            assert window.valid == 2_000_000
            assert window.documents[0] == 0
            parts = recordings_of(tokens, window)
            for i, part in enumerate(parts):
                bos = np.flatnonzero(part == 255)
                if i > 0:
                    assert bos[0] == 0
                if len(bos) < 2:  # a part too short to show its recording's width
                    continue
                assert len(set(np.diff(bos))) == 1
                width = int(bos[1] - bos[0])
                assert 11 <= width <= 1000
                assert bos[0] < width
                assert len(part) - bos[-1] <= width
                if 0 < i < len(parts) - 1:
                    assert len(part) % width == 0
                    assert 100 <= len(part) // width <= 1999
                    whole += 1
        assert whole > 5

    def test_of_another_length_begin_alike(self, kind: Kind) -> None:
        tokens, window = read(source(kind, seq_len=1_500_000), 3)
        next_recording = window.documents[1]
        # So long that it ends with the first token of the next recording, which is then a label and no document.
        shorter_tokens, shorter = read(source(kind, seq_len=next_recording), 3)
        assert shorter == Window(next_recording, [0], window.origin, clipped=0)
        assert shorter_tokens.tolist() == tokens[: next_recording + 1].tolist()
        assert window.origin[1] > 0

    def test_begin_anywhere_in_recordings_of_all_sizes(self, kind: Kind) -> None:
        windows = source(kind, seq_len=2000)
        widths, offsets, bins = [], [], []
        for k in range(400):
            tokens, window = read(windows, k)
            bos = np.flatnonzero(recordings_of(tokens, window)[0] == 255)
            if len(bos) > 1:
                widths.append(int(bos[1] - bos[0]))
                offsets.append(bos[0] / widths[-1])
            assert window.origin[0] == k
            bins.append(window.origin[1])
        # Uniform from 10 to 999 neurons, and uniform within a bin: means within five standard errors.
        assert min(widths) < 60
        assert max(widths) > 950
        assert abs(np.mean(widths) - 505.5) < 5 * 286 / 18
        assert abs(np.mean(offsets) - 0.5) < 5 * 0.29 / 18
        # A bin drawn evenly out of T, where T is 100 to 1,999 evenly, is 525 on average.
        assert abs(np.mean(bins) - 525) < 5 * 420 / 20
        assert max(bins) < 1999


class TestRegular:
    def test_a_tenth_fires_once_in_every_bin_and_the_rest_never(self) -> None:
        for num_neurons in (10, 19, 99, 999):
            counts = spike_counts("regular", num_neurons, 150, np.random.default_rng(num_neurons))
            assert counts.shape == (num_neurons, 150)
            assert counts.dtype == np.uint8
            assert (counts == counts[:, :1]).all()
            assert counts[:, 0].sum() == num_neurons // 10
            assert set(counts[:, 0].tolist()) == {0, 1}

    def test_which_neurons_fire_is_drawn_anew(self) -> None:
        random = np.random.default_rng(0)
        fires = np.array([spike_counts("regular", 100, 1, random)[:, 0] for _ in range(2000)]).sum(0, dtype=int)
        assert abs(fires - 200).max() < 5 * 200**0.5

    def test_windows_repeat_one_bin_through_a_recording(self) -> None:
        windows, seen = source("regular", seq_len=60_000), 0
        for k in range(5):
            tokens, window = read(windows, k)
            for part in recordings_of(tokens, window):
                bos = np.flatnonzero(part == 255)
                if len(bos) > 2:
                    bins = part[bos[0] : bos[-1]].reshape(len(bos) - 1, -1)
                    assert (bins == bins[0]).all()
                    assert bins[0, 1:].sum() == (bins.shape[1] - 1) // 10
                    assert bins[0, 1:].max() == 1
                    seen += 1
            assert window.clipped == 0
        assert seen > 5


class TestPoisson:
    def test_latent_dynamics_are_smooth_and_of_unit_variance(self) -> None:
        latents = latent_dynamics(100_000, np.random.default_rng(0))
        assert latents.shape == (3, 100_000)
        assert np.allclose(latents.mean(1), 0, atol=0.15)
        assert np.allclose(latents.var(1), 1, atol=0.15)
        for lag in (1, 10, 50):
            assert np.allclose((latents[:, lag:] * latents[:, :-lag]).mean(1), 0.97**lag, atol=0.15)
        assert np.allclose(np.corrcoef(latents), np.eye(3), atol=0.15)

    def test_are_stationary_from_the_first_bin(self) -> None:
        random = np.random.default_rng(0)
        first = np.array([latent_dynamics(2, random) for _ in range(3000)])
        assert np.allclose(first.var(0), 1, atol=0.15)

    def test_neurons_share_their_dynamics(self) -> None:
        counts = spike_counts("poisson", 60, 20_000, np.random.default_rng(1)).astype(float)
        busy = counts[counts.mean(1) > 0.05]
        assert len(busy) > 20
        together = np.corrcoef(busy)[np.triu_indices(len(busy), 1)]
        shuffled = np.random.default_rng(1).permuted(busy, axis=1)
        apart = np.corrcoef(shuffled)[np.triu_indices(len(busy), 1)]
        assert np.abs(together).mean() > 3 * np.abs(apart).mean()

    def test_rates_and_dispersion_are_those_of_poisson_neurons_of_varying_rate(self) -> None:
        counts = spike_counts("poisson", 500, 2000, np.random.default_rng(2))
        assert counts.dtype == np.uint8
        assert 0.05 < counts.mean() < 1
        assert 0.6 < (counts == 0).mean() < 0.97
        assert (counts.var(1) >= counts.mean(1) * 0.8).mean() > 0.9

    def test_clipped_counts_are_counted(self) -> None:
        for k in range(5):
            tokens, unclipped = read(source("poisson"), k)
            clipped_tokens, clipped = read(source("poisson", vocab_size=3), k)
            is_bos = tokens == 255
            assert clipped_tokens.tolist() == np.where(is_bos, 2, np.minimum(tokens, 1)).tolist()
            assert unclipped.clipped == 0
            assert clipped.clipped == np.count_nonzero(~is_bos & (tokens > 1)) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_chooses_them(kind: Kind) -> None:
    training = Training(dataset="synthetic", synthetic_kind=kind, split="test", seed=5, seq_len=300, vocab_size=128)
    windows = open_windows(training)
    assert windows.num_windows is None
    out, expected = np.empty(301, np.uint8), np.empty(301, np.uint8)
    window = windows.read(3, out)
    same = source(kind, split="test", seed=5, seq_len=300, vocab_size=128)
    assert window == same.read(3, expected)
    assert out.tolist() == expected.tolist()
    for part in (kind, "seed 5", windows.fingerprint):
        assert part in windows.describe()
    assert kind in windows.fingerprint
