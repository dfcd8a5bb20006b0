"""Every bad input, by running the command: it fails with one clear message, without a trace."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import random_recordings, write_recordings, write_rows
from tests.processes import run, train_command

SYNTHETIC = ("--training.dataset", "synthetic", "--training.seq_len", "64", "--training.steps", "2")


def fails(*arguments: str, status: int, processes: int | None = None, **environment: str) -> str:
    """Runs `train.py`, which has to fail with this status, and returns its message."""
    done = run(train_command(*arguments, processes=processes), **environment)
    assert done.returncode == status, done.stdout
    assert done.stdout.count("error:") == 1, done.stdout
    if processes is None:
        assert "Traceback" not in done.stdout
    return done.stdout[done.stdout.index("error:") :]


@pytest.fixture
def recordings(tmp_path: Path) -> str:
    return str(write_recordings(tmp_path / "recordings", {"train": random_recordings([(5, 100), (7, 60)])}))


def on(recordings: str, folder: Path, *more: str) -> tuple[str, ...]:
    """The arguments of a short run on these recordings."""
    run_length = ("--training.seq_len", "64", "--training.steps", "2", "--metrics.enable_tensorboard", "false")
    return ("--training.dataset_path", recordings, "--job.dump_folder", str(folder / "out"), *run_length, *more)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("folder", "Is a directory"),
        (b"[training\nsteps = 1", "not valid TOML"),
        (b"[training]\ndataset = '\xff'", "not UTF-8"),
        (b"[training]\nsteps = 1\nsteps = 2", "not valid TOML: Cannot overwrite a value"),
        (b"[trainign]\nsteps = 1", "trainign.steps = 1: unknown key; did you mean training.steps?"),
        (b"[training]\nstep = 1", "training.step = 1: unknown key; did you mean training.steps?"),
        (b"[training]\nsteps = '1'", "valid integer"),
        (b"[optimizer]\nlr = nan", "finite number"),
        (b"[optimizer]\nlr = inf", "finite number"),
        (b"[training]\nbatch_size = 0", "greater than 0"),
        (b"[training]\nseq_len = -5", "greater than 0"),
        (b"[training]\ntensor_parallel_degree = 2", "FSDP alone"),
        (b"[checkpoint]\nfolder = '/elsewhere'", "inside job.dump_folder"),
        (b"[checkpoint]\nfolder = '../elsewhere'", "inside job.dump_folder"),
        (b"[model]\nn_heads = 3", "does not divide model.dim"),
    ],
    ids=str,
)
def test_configuration(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert message in fails("--job.config_file", str(path), "--training.dataset", "synthetic", status=2)


def test_one_process_of_several_speaks_for_all() -> None:
    message = fails("--training.stps", "3", *SYNTHETIC, status=1, processes=2)
    assert "did you mean training.steps?" in message


def test_parallel_degrees(tmp_path: Path) -> None:
    argv = (*SYNTHETIC, "--job.dump_folder", str(tmp_path), "--training.data_parallel_shard_degree", "3")
    assert "= 1 is 3, but the run has 2 processes" in fails(*argv, status=1, processes=2)


def test_dataset_that_is_not_cached(tmp_path: Path) -> None:
    argv = ("--training.dataset", "primate", "--job.dump_folder", str(tmp_path / "out"))
    message = fails(*argv, status=1, HF_HOME=str(tmp_path / "hf"), HF_DATASETS_CACHE=str(tmp_path / "hf/datasets"))
    assert f"not in the cache {tmp_path / 'hf/datasets'}" in message
    assert "load_dataset('eminorhan/neural-pile-primate')" in message


def test_path_without_data(tmp_path: Path) -> None:
    assert "no such file or folder" in fails(*on(str(tmp_path / "absent"), tmp_path), status=1)
    (tmp_path / "empty").mkdir()
    assert "neither parquet files nor a save_to_disk dataset" in fails(*on(str(tmp_path / "empty"), tmp_path), status=1)


def test_split_that_does_not_exist(recordings: str, tmp_path: Path) -> None:
    assert "has only train" in fails(*on(recordings, tmp_path, "--training.split", "test"), status=1)


def test_columns(tmp_path: Path) -> None:
    from datasets import Dataset

    folder = tmp_path / "columns"
    folder.mkdir()
    Dataset.from_dict({"spike_counts": [[[1, 2]]], "subject_id": ["a"], "session_id": [3]}).to_parquet(
        folder / "train.parquet"
    )
    message = fails(*on(str(folder), tmp_path), status=1)
    assert "column spike_counts has type" in message
    assert "column session_id has type int64, not string" in message
    assert "columns segment_id, source_dataset are missing" in message


def test_empty_dataset(tmp_path: Path) -> None:
    parquet = write_rows(tmp_path / "parquet", {"train": []}, "parquet")
    assert "parquet/train.parquet has no rows" in fails(*on(str(parquet), tmp_path), status=1)
    disk = write_rows(tmp_path / "disk", {"train": []}, "disk")
    assert "has no rows" in fails(*on(str(disk), tmp_path), status=1)


def test_fewer_windows_than_the_batch(recordings: str, tmp_path: Path) -> None:
    message = fails(*on(recordings, tmp_path, "--training.batch_size", "20"), status=1)
    assert "16 windows of training.seq_len = 64 tokens are fewer than the 20 sequences of one step" in message


@pytest.mark.parametrize("where", ["a_file/out", "/proc/out"])
def test_dump_folder_that_cannot_be_written(where: str, tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    folder = where if where.startswith("/") else str(tmp_path / where)
    assert "cannot be written" in fails(*SYNTHETIC, "--job.dump_folder", folder, status=1)


def test_checkpoint_of_another_model_or_other_data(recordings: str, tmp_path: Path) -> None:
    done = run(train_command(*on(recordings, tmp_path)))
    assert done.returncode == 0, done.stdout
    for argv, message in (
        (("--training.vocab_size", "99"), "vocab_size is 256 there and 99 here"),
        (("--model.dim", "64"), "dim is 128 there and 64 here"),
        (("--model.rope_scaling", "llama3.1"), "rope_scaling is none there and llama3.1 here"),
        (("--training.seed", "5"), "seed is 0 there and 5 here"),
        (("--training.seq_len", "32"), "seq_len is 64 there and 32 here"),
        (("--checkpoint.load_step", "1"), "no complete checkpoint of it"),
    ):
        assert message in fails(*on(recordings, tmp_path, *argv), status=1)
        assert not (tmp_path / "out/owner.json").exists()  # whatever is wrong, the next try finds the folder free
    others = write_recordings(tmp_path / "others", {"train": random_recordings([(5, 100), (7, 60)], seed=1)})
    assert "fingerprint is" in fails(*on(str(others), tmp_path), status=1)


def test_malformed_rows(tmp_path: Path) -> None:
    rows = [[[1] * 300] * 3, [[1, 2], [3]], [], np.ones((2, 200), int).tolist(), [[], []]]
    folder = str(write_rows(tmp_path / "rows", {"train": rows}))
    done = run(train_command(*on(folder, tmp_path)))
    assert done.returncode == 0, done.stdout
    warning = "3 of 5 rows are ragged, empty or lack counts (null): 1, 2, 4"
    assert done.stdout.count(warning) == 1
    assert warning in fails(*on(folder, tmp_path, "--training.malformed_rows", "error"), status=1)


def test_attention_that_cannot_run(tmp_path: Path) -> None:
    argv = (*SYNTHETIC, "--job.dump_folder", str(tmp_path), "--model.attention", "fa3")
    assert "flash-attention/hopper" in fails(*argv, status=1)


def test_weights_that_are_lost(tmp_path: Path) -> None:
    """No update is made from what is not finite, and the run ends where nothing else comes."""
    argv = (*SYNTHETIC, "--optimizer.lr", "1e30", "--training.steps", "9", "--training.warmup_steps", "0")
    more = ("--job.dump_folder", str(tmp_path), "--training.max_bad_steps", "3", "--model.dim", "32")
    message = fails(*argv, *more, "--metrics.log_freq", "100", status=1)
    assert "3 updates in a row were skipped" in message
    assert not (tmp_path / "checkpoint/step-9").exists()
    assert json.loads((tmp_path / "outcome.json").read_text())["outcome"] == "broken"
