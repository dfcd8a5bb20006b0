"""Finding recordings, refusing what has not their columns, and the index of their lengths."""

import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import Format, ids, random_recordings, write_recordings, write_rows
from torchtitan.config.schema import Training
from torchtitan.data.index import RecordingIndex, load_index
from torchtitan.data.recordings import Recordings, open_recordings
from torchtitan.data.windows import RecordedWindows

ROOT = Path(__file__).resolve().parents[1]
LIST = pa.list_(pa.list_(pa.uint8()))
LARGE_LIST = pa.large_list(pa.large_list(pa.uint8()))
MALFORMED = {
    "missing row": None,
    "no neurons": [],
    "neuron without bins": [[]],
    "neurons without bins": [[], []],
    "ragged": [[1], [1, 2]],
    "ragged in the middle": [[1, 2], [1], [1, 2]],
    "same total length": [[1, 2], [1], [1, 2, 3]],
    "missing neuron": [[1, 2], None],
    "missing first neuron": [None, [1]],
    "only a missing neuron": [None],
    "missing count": [[1, None], [3, 4]],
    "missing last count": [[1, 2], [3, None]],
    "only a missing count": [[None]],
}


def training(path: Path, **values: Any) -> Training:
    return Training(dataset_path=str(path), **values)


def opened(path: Path, **values: Any) -> tuple[Recordings, RecordingIndex]:
    recordings = open_recordings(training(path, **values))
    return recordings, load_index(recordings, "skip")


def read_all(recordings: Recordings, index: RecordingIndex) -> list[list[list[int]]]:
    """The recordings of an index as nested lists."""
    sizes = zip(index.rows.tolist(), index.neurons.tolist(), index.bins.tolist(), strict=True)
    return [recordings.spike_counts(row, neurons, bins).tolist() for row, neurons, bins in sizes]


def table(rows: list[Any], arrow_type: pa.DataType = LIST, **other_columns: Any) -> pa.Table:
    columns = {"spike_counts": pa.array(rows, arrow_type), **ids(len(rows)), **other_columns}
    return pa.table({name: column for name, column in columns.items() if column is not None})


def write_parquet(folder: Path, *tables: pa.Table, **options: Any) -> Path:
    folder.mkdir()
    for i, one_table in enumerate(tables):
        pq.write_table(one_table, folder / f"{i}.parquet", **options)
    return folder


def files_below(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


class TestOpening:
    @pytest.mark.parametrize("format", ["parquet", "disk"])
    def test_each_split_is_read_back(self, tmp_path: Path, format: Format) -> None:
        splits = {
            "train": random_recordings([(3, 5), (1, 1), (2, 7)], largest=255),
            "test": random_recordings([(4, 2)], seed=1),
        }
        folder = write_recordings(tmp_path / "data", splits, format)
        for split, expected in splits.items():
            recordings, index = opened(folder, split=split)
            assert read_all(recordings, index) == [counts.tolist() for counts in expected]
            assert len(recordings) == len(expected)
            assert index.num_tokens == sum(counts.size + counts.shape[1] for counts in expected)
            assert recordings.ids() == ids(len(expected))
            assert recordings.description == f"{folder}, split {split}"

    def test_one_file_one_saved_split_and_a_folder_without_splits_are_all_train(self, tmp_path: Path) -> None:
        rows = random_recordings([(3, 5), (2, 7)])
        write_recordings(tmp_path / "parquet", {"test": rows})
        write_recordings(tmp_path / "disk", {"test": rows}, "disk")
        (tmp_path / "plain").mkdir()
        shutil.copy(tmp_path / "parquet/test.parquet", tmp_path / "plain/mouse.parquet")
        for path in ("parquet/test.parquet", "disk/test", "plain"):
            recordings, index = opened(tmp_path / path)
            assert read_all(recordings, index) == [counts.tolist() for counts in rows]

    def test_a_folder_of_files_is_read_in_their_order_whatever_else_lies_there(self, tmp_path: Path) -> None:
        rows = [[[[i]] for i in range(start, start + 3)] for start in (0, 3)]
        folder = write_parquet(tmp_path / "data", *(table(part) for part in rows))
        (folder / "README.md").write_text("# About")
        (folder / "notes.txt").write_text("some notes")
        (folder / ".hidden.parquet").write_text("not parquet")
        assert read_all(*opened(folder)) == rows[0] + rows[1]

    def test_rows_in_many_arrow_chunks(self, tmp_path: Path) -> None:
        rows = [counts.tolist() for counts in random_recordings([(1 + i % 5, 1 + i % 7) for i in range(60)])]
        rows[20] = [[1], [1, 2]]
        folder = write_parquet(tmp_path / "data", table(rows), row_group_size=7)
        recordings, index = opened(folder)
        assert recordings.dataset.data.column("spike_counts").num_chunks > 5
        assert index.malformed.tolist() == [20]
        assert read_all(recordings, index) == rows[:20] + rows[21:]

    @pytest.mark.parametrize(
        "arrow_type",
        [LARGE_LIST, pa.list_(pa.large_list(pa.uint8())), pa.large_list(pa.list_(pa.uint8()))],
        ids=["large lists", "lists of large lists", "large lists of lists"],
    )
    def test_lists_with_64_bit_offsets(self, tmp_path: Path, arrow_type: pa.DataType) -> None:
        rows = [[[1, 2], [3, 4]], [[1], []], [[5]]]
        recordings, index = opened(write_parquet(tmp_path / "data", table(rows, arrow_type)))
        assert recordings.dataset.data.schema.field("spike_counts").type == arrow_type
        assert index.malformed.tolist() == [1]
        assert read_all(recordings, index) == [rows[0], rows[2]]

    def test_a_slice_of_a_dataset(self, tmp_path: Path) -> None:
        rows = [counts.tolist() for counts in random_recordings([(1 + i % 3, 1 + i % 4) for i in range(20)])]
        rows[8], rows[2] = [[1], [1, None]], [[None]]
        recordings, _ = opened(write_parquet(tmp_path / "data", table(rows), row_group_size=6))
        part = Recordings(recordings.dataset.select(range(3, 15)), "part")
        index = load_index(part, "skip")
        assert index.malformed.tolist() == [5]
        assert read_all(part, index) == [*rows[3:8], *rows[9:15]]

    def test_spike_counts_are_a_view_that_cannot_be_written(self, tmp_path: Path) -> None:
        recordings, _ = opened(write_recordings(tmp_path / "data", {"train": random_recordings([(3, 5)])}))
        counts = recordings.spike_counts(0, 3, 5)
        assert counts.dtype == np.uint8
        assert not counts.flags.owndata
        assert not counts.flags.writeable
        assert np.shares_memory(counts, recordings.spike_counts(0, 3, 5))

    def test_nothing_is_written_beside_the_data(self, tmp_path: Path) -> None:
        for format in ("parquet", "disk"):
            folder = write_recordings(tmp_path / format, {"train": random_recordings([(3, 5)])}, format)
            for path in folder.rglob("*"):
                path.chmod(0o555 if path.is_dir() else 0o444)
            folder.chmod(0o555)
            before = files_below(folder)
            opened(folder)
            assert files_below(folder) == before

    def test_a_pickle_holds_the_path_and_not_the_data(self, tmp_path: Path) -> None:
        rows = random_recordings([(20, 5000)] * 5, largest=255)
        for format in ("parquet", "disk"):
            recordings, index = opened(write_recordings(tmp_path / format, {"train": rows}, format))
            pickled = pickle.dumps(recordings)
            assert len(pickled) < 20_000
            copy = pickle.loads(pickled)
            assert copy.description == recordings.description
            assert read_all(copy, index) == [counts.tolist() for counts in rows]

    def test_splits_that_are_not_trained_on_are_named(
        self, tmp_path: Path, warnings_logged: pytest.LogCaptureFixture
    ) -> None:
        """A file's name may have put it into another split than its owner meant."""
        pieces = {"mouse_train_01": random_recordings([(2, 3)]), "mouse_test_02": random_recordings([(2, 3), (4, 5)])}
        folder = write_recordings(tmp_path / "named", pieces)
        with warnings_logged.at_level(logging.INFO):
            recordings, _ = opened(folder)
        assert len(recordings) == 1
        assert "further splits, which are not used here: test (2 rows)" in warnings_logged.text
        assert str(recordings.location) in RecordedWindows(*opened(folder), seq_len=4, vocab_size=256).describe()


class TestRealRecordings:
    def test_are_read_as_they_stand_in_their_files(self, real_recordings: Path) -> None:
        before = files_below(real_recordings)
        recordings, index = opened(real_recordings)
        assert files_below(real_recordings) == before
        rows = [
            np.stack([neuron.values.to_numpy() for neuron in row.values])
            for file in sorted(real_recordings.glob("*.parquet"))
            for row in pq.read_table(file).column("spike_counts")
        ]
        assert index.malformed.size == 0
        assert len(index.rows) == len(rows) == 5
        for i, expected in enumerate(rows):
            counts = recordings.spike_counts(i, int(index.neurons[i]), int(index.bins[i]))
            assert np.array_equal(counts, expected)
        assert int((index.neurons * index.bins).sum()) == 8_434_384 + 1_429_602
        assert index.num_tokens == 8_434_384 + 1_429_602 + int(index.bins.sum())

    def test_have_one_fingerprint_wherever_they_lie(self, real_recordings: Path, tmp_path: Path) -> None:
        (tmp_path / "copy").mkdir()
        for file in real_recordings.glob("*.parquet"):
            shutil.copyfile(file, tmp_path / "copy" / file.name)
        assert opened(real_recordings)[1].fingerprint == opened(tmp_path / "copy")[1].fingerprint


CAST = 'dataset.cast_column("spike_counts", List(List(Value("uint8")))) converts it'


class TestBadData:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "no such file or folder"),
            ({}, "holds neither parquet files nor a save_to_disk dataset"),
            ({"notes.txt": b"x"}, "holds neither parquet files nor a save_to_disk dataset"),
            ({"train.parquet": b""}, r"data/train.parquet is not a parquet file, .* size is 0 bytes"),
            (
                {"train.parquet": b"something else"},
                r"data/train.parquet is not a parquet file, .* write or copy it again",
            ),
            ({"state.json": b"{}"}, "is neither a `Dataset` directory nor"),
            ({"dataset_dict.json": b'{"splits": ["train"]}'}, "No such files"),
        ],
        ids=["absent", "empty", "other files", "empty file", "not parquet", "half a split", "half a dataset"],
    )
    def test_no_dataset_there(self, tmp_path: Path, content: dict[str, bytes] | None, message: str) -> None:
        path = tmp_path / "data"
        if content is not None:
            path.mkdir()
            for name, data in content.items():
                (path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as caught:
            open_recordings(training(path))
        assert str(caught.value).startswith(f'training.dataset_path = "{path}": ')
        assert len(str(caught.value).splitlines()) == 1

    def test_of_several_files_the_broken_one_is_named(self, tmp_path: Path) -> None:
        rows = table([[[1, 2], [3, 4]], [[5]]])
        folder = write_parquet(tmp_path / "data", *[rows] * 3)
        whole = (folder / "1.parquet").read_bytes()
        for content, message in (
            (whole[: len(whole) // 2], "1.parquet is not a parquet file, or not all of one"),
            (whole[:4] + bytes(30) + whole[34:], "1.parquet is damaged; write or copy it again"),
            (rows.slice(0, 0), "1.parquet has no rows"),
            (pa.table({"a": [1]}), "1.parquet has columns a, the files before it spike_counts, subject_id"),
        ):
            if isinstance(content, bytes):
                (folder / "1.parquet").write_bytes(content)
            else:
                pq.write_table(content, folder / "1.parquet")
            with pytest.raises(ValueError, match=message) as caught:
                open_recordings(training(folder))
            assert str(caught.value).startswith(f'training.dataset_path = "{folder}": {folder}/1.parquet ')

    def test_no_such_split(self, tmp_path: Path) -> None:
        rows = random_recordings([(2, 2)])
        folder = write_recordings(tmp_path / "data", {"train": rows, "test": rows})
        with pytest.raises(ValueError, match=r'^training\.split = "valid": .* has only train, test$'):
            open_recordings(training(folder, split="valid"))
        folder = write_recordings(tmp_path / "whole", {"train": rows})
        parted = r"has only train; scripts/hold_out\.py parts recordings into train and test"
        with pytest.raises(ValueError, match=f'^--split = "test": .* {parted}$'):
            open_recordings(training(folder), "test", "--split")

    @pytest.mark.parametrize(
        ("columns", "messages"),
        [
            ({"spike_counts": None}, ["column spike_counts is missing (found: subject_id, session_id"]),
            ({"spike_counts": ["a"]}, ["column spike_counts has type string, not lists (neurons) of lists (bins) of"]),
            ({"spike_counts": [[1]]}, ["list<item: int64>, not lists (neurons) of lists (bins) of uint8"]),
            ({"spike_counts": pa.array([[[1]]], pa.list_(pa.list_(pa.int8())))}, ["int8>>, not lists (neurons)"]),
            ({"spike_counts": pa.array([[[1.0]]])}, ["double>>, not lists (neurons)", CAST]),
            ({"spike_counts": [[[[1]]]]}, ["column spike_counts has type list<"]),
            ({"spike_counts": pa.array([[[1]]], pa.list_(pa.list_(pa.uint8(), 1)))}, ["fixed_size_list", CAST]),
            ({"subject_id": None}, ["column subject_id is missing"]),
            ({"subject_id": None, "spike_counts": None}, ["columns spike_counts, subject_id are missing (found: sess"]),
            ({"source_dataset": [3]}, ["column source_dataset has type int64, not string; dataset.cast_column("]),
            (
                {"spike_counts": [0.5], "session_id": [1], "segment_id": None},
                ["column spike_counts has type double", "session_id has type int64", "segment_id is missing"],
            ),
        ],
    )
    def test_a_column_is_missing_or_of_another_type(
        self, tmp_path: Path, columns: dict[str, Any], messages: list[str]
    ) -> None:
        folder = write_parquet(tmp_path / "data", table([[[1]]], **columns))
        with pytest.raises(ValueError, match=r"columns? ") as caught:
            open_recordings(training(folder))
        assert str(caught.value).startswith(f"{folder}: column")
        for message in messages:
            assert message in str(caught.value)

    def test_a_row_without_an_identity(self, tmp_path: Path) -> None:
        folder = write_parquet(tmp_path / "data", table([[[1]]] * 3, session_id=["a", None, None]))
        with pytest.raises(ValueError, match=r"data: column session_id has 2 nulls; give each row one, .*unknown"):
            open_recordings(training(folder))

    def test_counts_that_fit_no_byte_are_not_wrapped(self, tmp_path: Path) -> None:
        more = table([[[300]]], pa.list_(pa.list_(pa.int64())))
        folder = write_parquet(tmp_path / "data", table([[[1]]]), more)
        with pytest.raises(ValueError, match="300 not in range: 0 to 255"):
            open_recordings(training(folder))

    @pytest.mark.parametrize("format", ["parquet", "disk"])
    def test_a_dataset_without_rows(self, tmp_path: Path, format: Format) -> None:
        folder = write_rows(tmp_path / "data", {"train": []}, format)
        with pytest.raises(ValueError, match=r"\bno rows$") as caught:
            open_recordings(training(folder))
        assert str(caught.value).startswith(f'training.dataset_path = "{folder}": ')

    def test_an_empty_selection_has_no_usable_rows(self, tmp_path: Path) -> None:
        recordings, _ = opened(write_rows(tmp_path / "data", {"train": [[[1]]]}))
        with pytest.raises(ValueError, match=r"^nothing: no usable rows$"):
            load_index(Recordings(recordings.dataset.select([]), "nothing"), "skip")


class TestHub:
    """`primate` and `rodent`, in processes of their own: the library reads where its cache is when it is imported."""

    PROGRAM = """
import sys
from torchtitan.config.schema import Training
from torchtitan.data.index import load_index
from torchtitan.data.recordings import open_recordings
try:
    for dataset, split in [argument.split("/") for argument in sys.argv[1:]]:
        recordings = open_recordings(Training(dataset=dataset, split=split))
        index = load_index(recordings, "skip")
        print(recordings.description, index.fingerprint, index.num_tokens, sep="|")
except ValueError as error:
    print("ValueError", error, sep="|")
"""

    def run(self, home: Path, *datasets: str) -> list[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", self.PROGRAM, *datasets],
            cwd=ROOT,
            env={**environment, "HF_HOME": str(home)},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()

    def fill_cache(self, home: Path, folder: Path) -> None:
        """The cache as `load_dataset("eminorhan/neural-pile-primate")` leaves it, from parquet in several shards."""
        from datasets.packaged_modules.parquet.parquet import Parquet

        files = {split: [str(folder / f"{split}.parquet")] for split in ("train", "test")}
        builder = Parquet(
            cache_dir=str(home / "made"), dataset_name="neural-pile-primate", hash="0123abcd", data_files=files
        )
        builder.download_and_prepare(max_shard_size="2KB")
        shards = home / "datasets/eminorhan___neural-pile-primate/default/0.0.0/0123abcd"
        shards.parent.mkdir(parents=True)
        shutil.move(str(builder.cache_dir), shards)

    def test_a_cached_pile_is_found_without_network(self, tmp_path: Path) -> None:
        splits = {"train": random_recordings([(4, 100)] * 10), "test": random_recordings([(3, 6)], seed=1)}
        folder = write_recordings(tmp_path / "data", splits)
        self.fill_cache(tmp_path / "home", folder)
        expected = [
            f"eminorhan/neural-pile-primate, split {split}|{opened(folder, split=split)[1].fingerprint}|{tokens}"
            for split, tokens in (("train", 5000), ("test", 24))
        ]
        assert self.run(tmp_path / "home", "primate/train", "primate/test") == expected
        assert len(list((tmp_path / "home/datasets/torchtitan").iterdir())) == 2  # the two indexes

    @pytest.mark.parametrize("dataset", ["primate", "rodent"])
    def test_a_pile_that_is_not_cached_names_the_folder_and_the_command(self, tmp_path: Path, dataset: str) -> None:
        message = "\n".join(self.run(tmp_path, f"{dataset}/train"))
        repository = f"eminorhan/neural-pile-{dataset}"
        assert message.startswith(f'ValueError|training.dataset = "{dataset}": {repository} is not in the cache ')
        assert str(tmp_path / "datasets") in message
        assert f"HF_HUB_OFFLINE=0 python -c \"import datasets; datasets.load_dataset('{repository}')\"" in message
        assert "OfflineModeIsEnabled" in message  # and not: the network could not be reached
