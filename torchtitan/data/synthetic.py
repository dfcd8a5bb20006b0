"""Synthetic recordings, made on the fly: each window is a pure function of (seed, window)."""

from itertools import count
from typing import Literal

import numpy as np

from torchtitan.data.index import RecordingIndex
from torchtitan.data.tokens import Counts, Tokens, write_tokens
from torchtitan.data.windows import Window

NEURONS, BINS = (10, 1000), (100, 2000)
"""Range of a recording's size: from the first number up to, but not including, the second."""
NUM_LATENTS, LATENT_DECAY = 3, 0.97

Kind = Literal["regular", "poisson"]


class SyntheticWindows:
    """Endlessly many windows of recordings with 10 to 999 neurons and 100 to 1,999 bins.

    `regular`: a tenth of the neurons fires once in every bin, the rest never. `poisson`: Poisson neurons whose log
    rates are linear in a few smooth latent processes that they share.

    A window opens somewhere inside its first recording, as a window of the pile does, and goes on with new ones.
    """

    num_windows: int | None = None

    def __init__(self, *, kind: Kind, split: str, seed: int, seq_len: int, vocab_size: int) -> None:
        self.kind: Kind = kind
        self.split, self.seed = split, seed
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self.fingerprint = f"synthetic-{kind}-1"

    def read(self, window: int, out: Tokens) -> Window:
        """See `WindowSource.read`. The origin's row is the window itself, its bin that of its first recording."""
        random = np.random.default_rng([self.seed, *self.split.encode(), window])
        documents, clipped, written, first_bin = [], 0, 0, 0
        for recording in count():
            num_neurons, num_bins = int(random.integers(*NEURONS)), int(random.integers(*BINS))
            start = int(random.integers((num_neurons + 1) * num_bins)) if recording == 0 else 0
            skipped_bins, offset = divmod(start, num_neurons + 1)
            first_bin = first_bin or skipped_bins
            length = min((num_neurons + 1) * num_bins - start, len(out) - written)
            if written < self.seq_len:
                documents.append(written)
            # Only the bins that are seen are made; the processes are stationary, so they may begin anywhere.
            seen_bins = -(-(offset + length) // (num_neurons + 1))
            counts = spike_counts(self.kind, num_neurons, seen_bins, random)
            clipped += write_tokens(counts, offset, out[written : written + length], self.vocab_size)
            written += length
            if written == len(out):
                return Window(self.seq_len, documents, (window, first_bin), clipped)
        raise AssertionError("unreachable")

    def describe(self) -> str:
        """See `WindowSource.describe`."""
        return f"synthetic ({self.kind}), made on the fly from seed {self.seed}, fingerprint {self.fingerprint}"


class SyntheticRecordings:
    """A split of whole synthetic recordings, as many as a pile's split has rows: a function of (seed, split) alone.

    Training sees windows without end and never one of these; they are what there is to evaluate a model on.
    """

    location = "memory"

    def __init__(self, *, kind: Kind, split: str, seed: int, num_rows: int = 48) -> None:
        random = np.random.default_rng([seed, *split.encode(), *b"recordings"])
        sizes = [(int(random.integers(*NEURONS)), int(random.integers(*BINS))) for _ in range(num_rows)]
        self.rows = [spike_counts(kind, neurons, bins, random) for neurons, bins in sizes]
        self.description = f"synthetic ({kind}), split {split}, made from seed {seed}"
        self.index = RecordingIndex(
            rows=np.arange(num_rows),
            neurons=np.array([neurons for neurons, _ in sizes]),
            bins=np.array([bins for _, bins in sizes]),
            malformed=np.empty(0, np.int64),
            fingerprint=f"synthetic-{kind}-recordings-1-{seed}-{split}",
        )

    def spike_counts(self, row: int, num_neurons: int, num_bins: int) -> Counts:
        """See `Rows.spike_counts`."""
        assert self.rows[row].shape == (num_neurons, num_bins)
        return self.rows[row]

    def ids(self) -> dict[str, list[str]]:
        """See `Rows.ids`: each recording is a session."""
        names = [f"recording-{row}" for row in range(len(self.rows))]
        constant = {"subject_id": "none", "segment_id": "0", "source_dataset": "synthetic"}
        return {"session_id": names, **{column: [value] * len(names) for column, value in constant.items()}}


def spike_counts(kind: Kind, num_neurons: int, num_bins: int, random: np.random.Generator) -> Counts:
    """A recording: uint8 [neurons, bins]."""
    if kind == "regular":
        fires = np.zeros(num_neurons, np.uint8)
        fires[random.choice(num_neurons, num_neurons // 10, replace=False)] = 1
        return np.broadcast_to(fires[:, None], (num_neurons, num_bins))
    log_rates = random.normal(-2.5, 1.0, (num_neurons, 1)) + random.normal(
        0.0, 0.6, (num_neurons, NUM_LATENTS)
    ) @ latent_dynamics(num_bins, random)
    return np.minimum(random.poisson(np.exp(np.minimum(log_rates, 3.0))), 255).astype(np.uint8)


def latent_dynamics(num_bins: int, random: np.random.Generator) -> np.ndarray:
    """Smooth stationary Gaussian processes of unit variance (first-order autoregressive), float64 [latents, bins]."""
    noise = random.normal(0.0, 1.0, (NUM_LATENTS, num_bins))
    latents = np.empty_like(noise)
    state = noise[:, 0]
    for t in range(num_bins):
        state = noise[:, t] if t == 0 else LATENT_DECAY * state + np.sqrt(1 - LATENT_DECAY**2) * noise[:, t]
        latents[:, t] = state
    return latents
