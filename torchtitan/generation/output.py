"""What is kept of a generation: samples as data, a summary, pictures."""

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchtitan.data.recordings import ID_COLUMNS
from torchtitan.data.tokens import Counts
from torchtitan.generation.prompt import Prompt

SAMPLES, SUMMARY, PLOTS = "samples.parquet", "generation.json", "plots"
SHOWN = 3
"""Samples in a picture that shows single spikes."""


@dataclass(frozen=True)
class Continued:
    """A recording and what it was continued with.

    Attributes:
        prompt: the recording.
        context_bins: how many of its bins were read.
        samples: the continuations, uint8 [neurons, bins] each.
    """

    prompt: Prompt
    context_bins: int
    samples: list[Counts]

    @property
    def real(self) -> Counts:
        """How the recording itself goes on, up to as many bins as were generated, uint8 [neurons, bins]."""
        return self.prompt.counts[:, self.context_bins :][:, : self.samples[0].shape[1]]


@contextmanager
def output_folder(given: str | None, checkpoint: Path, prompts: Sequence[Prompt]) -> Iterator[Path]:
    """A new folder for the results: the given one, or one in the folder of the run that the checkpoint is of.

    It goes where nothing came of it.

    Raises:
        ValueError: where the given one is in use, or cannot be made.
    """
    try:
        if given is None:
            run = next((f for f in checkpoint.parents if (f / "config.toml").is_file()), checkpoint.parent)
            folder = _make_new(run / "generation" / checkpoint.name, "+".join(labels(prompts))[:100])
        else:
            folder = Path(given).expanduser()
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ValueError(f"--output {given}: it exists already, and is no empty folder; give a new one")
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {error.filename}: it cannot be made: {error.strerror}") from error
    try:
        yield folder
    finally:
        with suppress(OSError):  # of a folder that is not empty
            folder.rmdir()


def labels(prompts: Sequence[Prompt]) -> list[str]:
    """A name for each prompt that files can have: dataset and row, and a number where another has these too."""
    names: list[str] = []
    for prompt in prompts:
        name = f"{Path(prompt.given.rpartition(':')[0]).stem}-{prompt.row}"
        names.append(next(free for free in _numbered(name) if free not in names))
    return names


def _make_new(parent: Path, name: str) -> Path:
    """Makes a folder of that name, or with a number behind it where there is one, also one made just now."""
    parent.mkdir(parents=True, exist_ok=True)
    names = _numbered(name)
    while True:
        folder = parent / next(names)
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def _numbered(name: str) -> Iterator[str]:
    """The name, then the name with a number, from 2 on."""
    return itertools.chain([name], (f"{name}.{number}" for number in itertools.count(2)))


def write_samples(path: Path, continued: Sequence[Continued]) -> None:
    """Writes the continuations, without the prompts, as rows with the Neural Pile's columns.

    They are told from recordings by their source, `generated:…`, and from each other by `…/sample-N` behind the
    segment.
    """
    counts, ids = [], {name: [] for name in ID_COLUMNS}
    for one in continued:
        for number, sample in enumerate(one.samples):
            counts.append(sample)
            for name in ID_COLUMNS:
                ids[name].append(one.prompt.ids[name])
            ids["segment_id"][-1] += f"/sample-{number}"
            ids["source_dataset"][-1] = f"generated:{ids['source_dataset'][-1]}"
    rows = [list(np.ascontiguousarray(sample)) for sample in counts]
    columns = {"spike_counts": pa.array(rows, pa.list_(pa.list_(pa.uint8())))}
    columns |= {name: pa.array(values, pa.string()) for name, values in ids.items()}
    pq.write_table(pa.table(columns), path)


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Writes the summary, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def draw(folder: Path, continued: Sequence[Continued], checkpoint: Path, step: int) -> None:
    """Draws each prompt's raster and population rate, and its statistics where the recording goes on as long.

    As PNG in `folder`, and for TensorBoard in the folder `tb` beside it.
    """
    from torchtitan.plots.activity import Activity, population_rate, raster, statistics
    from torchtitan.plots.board import to_tensorboard
    from torchtitan.plots.style import save

    figures = {}
    for label, one in zip(labels([one.prompt for one in continued]), continued, strict=True):
        bins = one.samples[0].shape[1]
        # Of a long prompt, what is nearest: else the continuation would be a sliver at its end.
        before = one.prompt.counts[:, max(0, one.context_bins - 2 * bins) : one.context_bins]
        shown = [Activity(f"sample {number}", sample) for number, sample in enumerate(one.samples[:SHOWN])]
        if one.real.shape[1]:
            shown.insert(0, Activity("recorded", one.real))
        title = f"{one.prompt.given}; model: {checkpoint}"
        figures[f"{label}-raster"] = raster(before, shown, title=title)
        figures[f"{label}-population_rate"] = population_rate(before, shown, title=title)
        if one.real.shape[1] == bins:
            figures[f"{label}-statistics"] = statistics(one.real, one.samples, title=title)
    for name, figure in figures.items():
        save(figure, folder / f"{name}.png")
    to_tensorboard(folder.parent / "tb", {f"generation/{name}": figure for name, figure in figures.items()}, step)
