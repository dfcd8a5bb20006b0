"""Recordings parted in time: nothing is lost, and the end of each row is held out."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet

from scripts.hold_out import part
from tests.helpers import random_recordings, write_recordings


def test_parts_are_the_beginning_and_the_end_of_each_row(tmp_path: Path) -> None:
    rows = random_recordings([(3, 50), (2, 21)])
    write_recordings(tmp_path, {"train": rows})
    table = parquet.read_table(tmp_path / "train.parquet")
    parts = part(table, 0.2)
    for split in parts.values():
        assert split.schema.types == table.schema.types
        assert split["session_id"] == table["session_id"]
    for row, counts in enumerate(rows):
        train, test = (np.array(parts[split]["spike_counts"][row].as_py()) for split in ("train", "test"))
        assert train.shape[1] == round(0.8 * counts.shape[1])
        assert np.array_equal(np.concatenate([train, test], axis=1), counts)
