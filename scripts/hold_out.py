#!/usr/bin/env python3
"""Parts recordings in time: `python scripts/hold_out.py RECORDINGS.parquet FOLDER [--share 0.2]`.

Writes a dataset whose training split has the beginning of each row, and whose test split the rest: what a neuron does
there is predicted by a model that has seen the same neuron before, and never this time.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet


def part(rows: pa.Table, share: float) -> dict[str, pa.Table]:
    """The rows in two: their first bins, and the last `share` of them."""
    recordings = rows["spike_counts"].to_pylist()
    cuts = [round(len(recording[0]) * (1 - share)) for recording in recordings]
    pieces = {
        "train": [[neuron[:cut] for neuron in row] for row, cut in zip(recordings, cuts, strict=True)],
        "test": [[neuron[cut:] for neuron in row] for row, cut in zip(recordings, cuts, strict=True)],
    }
    place = rows.schema.get_field_index("spike_counts")
    field = rows.schema.field(place)
    return {split: rows.set_column(place, field, pa.array(counts, field.type)) for split, counts in pieces.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=0.2, help="of each row that is held out, its end (default 0.2)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for split, rows in part(parquet.read_table(arguments.recordings), arguments.share).items():
        parquet.write_table(rows, arguments.folder / f"{split}.parquet")
    print(f"splits train and test written to {arguments.folder}")
