"""The index of row lengths: malformed rows, the cache, the fingerprint."""

import itertools
import logging
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import Format, ids, random_recordings, write_recordings, write_rows
from tests.test_recordings import LARGE_LIST, LIST, MALFORMED, opened, read_all, table, training, write_parquet
from torchtitan.data import index as index_module
from torchtitan.data.index import RecordingIndex, load_index
from torchtitan.data.recordings import Recordings, open_recordings


class TestMalformedRows:
    @pytest.mark.parametrize("format", ["parquet", "disk"])
    @pytest.mark.parametrize("kind", MALFORMED)
    def test_are_left_out_by_name(
        self, tmp_path: Path, kind: str, format: Format, warnings_logged: pytest.LogCaptureFixture
    ) -> None:
        rows = [[[1, 2], [3, 4]], MALFORMED[kind], [[5]], MALFORMED[kind]]
        folder = write_rows(tmp_path / "data", {"train": rows}, format)
        recordings, index = opened(folder)
        assert index.rows.tolist() == [0, 2]
        assert index.malformed.tolist() == [1, 3]
        assert read_all(recordings, index) == [rows[0], rows[2]]
        expected = (
            f"{folder}, split train: 2 of 4 rows are ragged, empty or lack counts (null): 1, 3; they are left out"
        )
        assert [record.message for record in warnings_logged.records] == [expected]
        with pytest.raises(ValueError, match=r'2 of 4 rows .* training\.malformed_rows = "skip" leaves them out'):
            load_index(recordings, "error")

    def test_only_the_first_of_many_are_named(self, tmp_path: Path, warnings_logged: pytest.LogCaptureFixture) -> None:
        folder = write_rows(tmp_path / "data", {"train": [[[1]], *[[]] * 30]})
        assert opened(folder)[1].malformed.size == 30
        [record] = warnings_logged.records
        assert "30 of 31 rows are ragged, empty or lack counts (null): 1, 2, " in record.message
        assert ", 20, …; " in record.message

    def test_nothing_else_is_there(self, tmp_path: Path) -> None:
        folder = write_rows(tmp_path / "data", {"train": list(MALFORMED.values())})
        with pytest.raises(ValueError, match=f"^{folder}, split train: no usable rows$"):
            opened(folder)

    def test_a_sound_dataset_passes_without_a_word(
        self, tmp_path: Path, warnings_logged: pytest.LogCaptureFixture
    ) -> None:
        folder = write_recordings(tmp_path / "data", {"train": random_recordings([(1, 1), (2, 3)])})
        assert load_index(open_recordings(training(folder)), "error").rows.tolist() == [0, 1]
        assert not warnings_logged.records

    @settings(max_examples=300)
    @given(st.data())
    def test_any_arrow_array_is_judged_as_its_python_lists_would_be(self, data: st.DataObject) -> None:
        rows = data.draw(arrow_rows())
        expected = rows.to_pylist()
        fake = Recordings.__new__(Recordings)
        fake.dataset = FakeDataset(rows)  # type: ignore[assignment]
        fake._map_columns()
        found = [np.concatenate(column) for column in zip(*fake.row_lengths(), strict=True)] if len(rows) else []
        for i, row in enumerate(expected):
            neurons, fewest, most = (int(column[i]) for column in found)
            well_formed = (
                bool(row)
                and all(row)
                and len({len(neuron) for neuron in row}) == 1
                and all(count is not None for neuron in row for count in neuron)
            )
            assert (neurons > 0 and fewest > 0 and fewest == most) == well_formed
            if well_formed:
                assert (neurons, most) == (len(row), len(row[0]))
                assert fake.spike_counts(i, neurons, most).tolist() == row


class FakeDataset:
    """A dataset whose one column is this array."""

    def __init__(self, rows: pa.Array) -> None:
        self.data = pa.table({"spike_counts": pa.chunked_array([rows[: len(rows) // 2], rows[len(rows) // 2 :]])})


@st.composite
def arrow_rows(draw: st.DrawFn) -> pa.Array:
    """Lists of lists of uint8 in every way that Arrow may lay them out: sliced, masked, with unreferenced values."""

    def lists(values: pa.Array) -> pa.Array:
        # Most lists that are drawn at random are ragged; even ones make well-formed rows.
        even = st.tuples(st.integers(0, min(3, len(values))), st.integers(1, 4)).map(
            lambda drawn: list(range(drawn[0], len(values) + 1, drawn[1]))
        )
        uneven = st.lists(st.integers(0, len(values)), min_size=1, max_size=7).map(sorted)
        offsets = draw(even | uneven, label="offsets")
        kind, offset_type = draw(
            st.sampled_from([(pa.ListArray, pa.int32()), (pa.LargeListArray, pa.int64())]), label="lists"
        )
        missing = draw(st.none() | st.lists(st.booleans(), min_size=len(offsets) - 1, max_size=len(offsets) - 1))
        mask = pa.array(missing, pa.bool_()) if missing else None
        return kind.from_arrays(pa.array(offsets, offset_type), values, mask=mask)

    def sliced(array: pa.Array) -> pa.Array:
        start = draw(st.integers(0, len(array)))
        return array[start : draw(st.integers(start, len(array)))] if draw(st.booleans()) else array

    counts = sliced(pa.array(draw(st.lists(st.none() | st.integers(0, 255), max_size=12)), pa.uint8()))
    return sliced(lists(sliced(lists(counts))))


class TestIndexCache:
    @pytest.fixture
    def folder(self, tmp_path: Path, empty_cache: Path) -> Path:
        rows = [[[1, 2], [3, 4]], [], [[5]]]
        return write_rows(tmp_path / "data", {"train": rows})

    def built(self, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
        """Counts how often an index is built."""
        times: Counter[str] = Counter()
        build = index_module._build

        def counting(recordings: Recordings) -> RecordingIndex:
            times["built"] += 1
            return build(recordings)

        monkeypatch.setattr(index_module, "_build", counting)
        return times

    def same(self, first: RecordingIndex, second: RecordingIndex) -> bool:
        return {k: np.asarray(v).tolist() for k, v in vars(first).items()} == {
            k: np.asarray(v).tolist() for k, v in vars(second).items()
        }

    def test_is_built_once(self, folder: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        times = self.built(monkeypatch)
        first, second = opened(folder)[1], opened(folder)[1]
        assert times["built"] == 1
        assert self.same(first, second)
        assert second.rows.dtype == second.neurons.dtype == second.bins.dtype == second.malformed.dtype == np.int64
        [file] = (empty_cache / "torchtitan").iterdir()  # and no temporary file is left
        assert file.suffix == ".npz"

    def test_malformed_rows_are_refused_out_of_the_cache_too(self, folder: Path) -> None:
        recordings, _ = opened(folder)
        with pytest.raises(ValueError, match=r"1 of 3 rows are ragged, empty or lack counts \(null\): 1; "):
            load_index(recordings, "error")

    def test_is_built_again_for_other_data_at_the_same_path(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = opened(folder)[1]
        write_rows(folder, {"train": [[[1, 2], [3, 4]], [[7]], [[5]]]})
        os.utime(folder / "train.parquet", (0, 0))
        times = self.built(monkeypatch)
        second = opened(folder)[1]
        assert times["built"] == 1
        assert second.rows.tolist() == [0, 1, 2]
        assert first.fingerprint != second.fingerprint

    @pytest.mark.parametrize("damage", ["emptied", "halved", "flipped", "other content", "another index"])
    def test_a_damaged_file_is_built_again_and_replaced(
        self,
        folder: Path,
        empty_cache: Path,
        damage: str,
        monkeypatch: pytest.MonkeyPatch,
        warnings_logged: pytest.LogCaptureFixture,
    ) -> None:
        first = opened(folder)[1]
        warnings_logged.clear()
        [file] = (empty_cache / "torchtitan").iterdir()
        content = file.read_bytes()
        if damage == "another index":
            np.savez(file, **{**vars(first), "rows": first.rows[:1]})
        else:
            half = len(content) // 2
            file.write_bytes(
                {
                    "emptied": b"",
                    "halved": content[:half],
                    "flipped": bytes([byte ^ 255 if 100 < i < 400 else byte for i, byte in enumerate(content)]),
                    "other content": b"something else",
                }[damage]
            )
        times = self.built(monkeypatch)
        assert self.same(opened(folder)[1], first)
        assert times["built"] == 1
        said = [record.message for record in warnings_logged.records if "they are left out" not in record.message]
        assert len(said) == (damage != "another index")
        assert all(str(file) in message and "is built again" in message for message in said)
        assert self.same(opened(folder)[1], first)
        assert times["built"] == 1

    def test_whatever_byte_is_flipped_no_wrong_index_comes_back(
        self, folder: Path, empty_cache: Path, warnings_logged: pytest.LogCaptureFixture
    ) -> None:
        first = opened(folder)[1]
        [file] = (empty_cache / "torchtitan").iterdir()
        content = file.read_bytes()
        warnings_logged.set_level(logging.CRITICAL, "torchtitan")
        for position, mask in itertools.product(range(len(content)), (1, 255)):
            file.write_bytes(content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :])
            read = index_module._read(file)
            assert read is None or self.same(read, first)

    def test_a_cache_that_cannot_be_written_is_done_without(
        self,
        folder: Path,
        empty_cache: Path,
        monkeypatch: pytest.MonkeyPatch,
        warnings_logged: pytest.LogCaptureFixture,
    ) -> None:
        empty_cache.mkdir()
        (empty_cache / "torchtitan").write_text("a file where the folder should be")
        times = self.built(monkeypatch)
        for _ in range(2):
            assert opened(folder)[1].rows.tolist() == [0, 2]
        assert times["built"] == 2
        said = [record.message for record in warnings_logged.records if "cannot be cached" in record.message]
        assert len(said) == 2
        assert str(empty_cache / "torchtitan") in said[0]


class TestFingerprint:
    ROWS = random_recordings([(3, 50), (2, 7), (4, 3000)], largest=255)

    def fingerprint(self, path: Path, rows: list[np.ndarray] | None = None, format: Format = "parquet") -> str:
        return opened(write_recordings(path, {"train": rows or self.ROWS}, format))[1].fingerprint

    def test_is_equal_for_equal_data(self, tmp_path: Path) -> None:
        first = self.fingerprint(tmp_path / "a")
        assert self.fingerprint(tmp_path / "b") == first
        assert self.fingerprint(tmp_path / "c", format="disk") == first
        shutil.copytree(tmp_path / "a", tmp_path / "d")
        shutil.copytree(tmp_path / "c", tmp_path / "e")
        assert opened(tmp_path / "d")[1].fingerprint == opened(tmp_path / "e")[1].fingerprint == first
        rows = [counts.tolist() for counts in self.ROWS]
        for name, group, arrow_type in (("f", 1, LIST), ("g", 3, LARGE_LIST)):
            folder = write_parquet(tmp_path / name, table(rows, arrow_type), row_group_size=group)
            assert opened(folder)[1].fingerprint == first

    def test_differs_for_other_data(self, tmp_path: Path) -> None:
        rows = self.ROWS
        one_count = [counts.copy() for counts in rows]
        one_count[1][0, 3] ^= 1
        other = {
            "one count": one_count,
            "a row less": rows[:-1],
            "another order": [rows[1], rows[0], rows[2]],
            "transposed": [rows[0].T, rows[1], rows[2]],
            "same bytes, other shape": [rows[0].reshape(2, 75), rows[1], rows[2]],
        }
        found = {name: self.fingerprint(tmp_path / name, rows) for name, rows in other.items()}
        found["unchanged"] = self.fingerprint(tmp_path / "unchanged")
        lists = [counts.tolist() for counts in rows]
        for name in ids(0):
            changed = {name: [f"{name}-{i}" for i in range(3)]}
            found[name] = opened(write_parquet(tmp_path / name, table(lists, **changed)))[1].fingerprint
        malformed = write_rows(tmp_path / "malformed", {"train": [*lists, []]})
        found["a malformed row more"] = opened(malformed)[1].fingerprint
        assert len(set(found.values())) == len(found)

    def test_does_not_depend_on_the_session(self, tmp_path: Path) -> None:
        # A value that is written down: what it digests must not change unnoticed, or no run could be resumed.
        rows = [np.arange(12, dtype=np.uint8).reshape(3, 4), np.full((1, 2), 255, np.uint8)]
        assert self.fingerprint(tmp_path / "data", rows) == "dcac4f134f68e9fb"
