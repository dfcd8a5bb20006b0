#!/usr/bin/env python3
"""Writes a small dataset with the Neural Pile's columns: `python scripts/demo_data.py FOLDER`.

Made-up sessions of several subjects: Poisson neurons, different in number and in mean rate, whose log rates follow a
few smooth latent processes that the session's neurons share. The last rows of each session are the test split.
"""

import argparse
from pathlib import Path

import datasets
import numpy as np

SESSIONS = {"subject-a": (12, 20), "subject-b": (16, 24), "subject-c": (28,)}
"""Neurons of each session, by subject."""
TRAIN_ROWS, TEST_ROWS, BINS = 8, 1, 1500
NUM_LATENTS, SMOOTHING_BINS = 3, 25
BIN_SECONDS = 0.02

FEATURES = datasets.Features(
    {
        "spike_counts": datasets.List(datasets.List(datasets.Value("uint8"))),
        "subject_id": datasets.Value("string"),
        "session_id": datasets.Value("string"),
        "segment_id": datasets.Value("string"),
        "source_dataset": datasets.Value("string"),
    }
)


def smooth_latents(num_bins: int, random: np.random.Generator) -> np.ndarray:
    """White noise under a Gaussian kernel, scaled to unit variance, float64 [latents, bins]."""
    reach = 4 * SMOOTHING_BINS
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SMOOTHING_BINS) ** 2)
    kernel /= np.sqrt((kernel**2).sum())
    noise = random.normal(size=(NUM_LATENTS, num_bins + 2 * reach))
    return np.stack([np.convolve(row, kernel, mode="valid") for row in noise])


def session(num_neurons: int, num_bins: int, random: np.random.Generator) -> np.ndarray:
    """One long recording, uint8 [neurons, bins]: mean rates around 8 spikes a second, swinging with the latents."""
    mean_rates = np.exp(random.normal(np.log(8.0), 1.0, (num_neurons, 1))) * BIN_SECONDS
    loadings = random.normal(0.3, 0.3, (num_neurons, NUM_LATENTS))
    rates = mean_rates * np.exp(loadings @ smooth_latents(num_bins, random))
    return np.minimum(random.poisson(rates), 254).astype(np.uint8)


def write(folder: Path, seed: int = 0) -> None:
    """Writes one parquet file a split into `folder`."""
    random = np.random.default_rng(seed)
    rows: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    for subject, sizes in SESSIONS.items():
        for number, num_neurons in enumerate(sizes):
            counts = session(num_neurons, (TRAIN_ROWS + TEST_ROWS) * BINS, random)
            for segment, piece in enumerate(np.split(counts, TRAIN_ROWS + TEST_ROWS, axis=1)):
                rows["train" if segment < TRAIN_ROWS else "test"].append(
                    {
                        "spike_counts": list(piece),
                        "subject_id": subject,
                        "session_id": f"{subject}-session-{number}",
                        "segment_id": f"segment-{segment}",
                        "source_dataset": "demo",
                    }
                )
    folder.mkdir(parents=True, exist_ok=True)
    for split, content in rows.items():
        dataset = datasets.Dataset.from_list(content, features=FEATURES)
        dataset.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    write(arguments.folder, arguments.seed)
    print(f"recordings written to {arguments.folder}")
