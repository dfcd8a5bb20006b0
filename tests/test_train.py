"""Whole runs of `train.py`: the same numbers however a run is interrupted, resumed and spread over processes."""

import json
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.checkpoints import assert_same_checkpoint, read_checkpoint
from tests.helpers import random_recordings, write_recordings
from tests.processes import NO_GPU, ROOT, train, train_command

STEPS, WINDOWS = 10, 17
CONFIG = """
[training]
dataset_path = "{data}"
seq_len = 64
batch_size = 2
global_batch_size = 12
steps = {steps}
warmup_steps = 3
mixed_precision_param = "float32"

[model]
n_layers = 2
rope_scaling = "llama3.1"

[metrics]
log_freq = 1
enable_tensorboard = false

[checkpoint]
interval = 5
"""
SAME = ("step", "loss", "grad_norm", "lr", "tokens_seen", "epoch")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small run over 17 windows, of which each step takes 12: the epoch ends inside steps again and again."""
    folder = tmp_path_factory.mktemp("data")
    write_recordings(folder / "recordings", {"train": random_recordings([(6, 100), (4, 80)], largest=3)})
    path = folder / "run.toml"
    path.write_text(CONFIG.format(data=folder / "recordings", steps=STEPS))
    return str(path)


@pytest.fixture(scope="module")
def uninterrupted(config_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump folder of a run on two processes from the first step to the last."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    output = train(*arguments(config_file, folder), processes=2)
    assert f"{WINDOWS} windows an epoch" in output
    return folder


def arguments(config_file: str, dump_folder: Path, *more: str) -> list[str]:
    return ["--job.config_file", config_file, "--job.dump_folder", str(dump_folder), *more]


def reports(dump_folder: Path) -> list[dict[str, float]]:
    """What `metrics.jsonl` says of each step that does not depend on the clock."""
    lines = [json.loads(line) for line in (dump_folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in SAME} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    assert [report["step"] for report in reports(one)] == list(range(1, STEPS + 1))
    assert reports(one) == reports(other)
    assert_same_checkpoint(one / f"checkpoint/step-{STEPS}", other / f"checkpoint/step-{STEPS}")


def test_the_loss_falls_and_the_outputs_are_there(uninterrupted: Path) -> None:
    lines = reports(uninterrupted)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["tokens_seen"] == STEPS * 12 * 64
    assert lines[-1]["epoch"] == STEPS * 12 / WINDOWS
    assert sorted(path.name for path in (uninterrupted / "checkpoint").iterdir()) == ["step-10", "step-5"]
    assert "seq_len = 64" in (uninterrupted / "config.toml").read_text()


def test_resumed_in_fresh_processes_it_is_the_same_run(config_file: str, uninterrupted: Path, tmp_path: Path) -> None:
    train(*arguments(config_file, tmp_path, "--training.stop_after_step", "5"), processes=2)
    assert [report["step"] for report in reports(tmp_path)] == [1, 2, 3, 4, 5]
    output = train(*arguments(config_file, tmp_path), processes=2)
    assert "resuming from" in output
    assert_same_run(tmp_path, uninterrupted)
    assert "nothing to do" in train(*arguments(config_file, tmp_path), processes=2)
    assert_same_run(tmp_path, uninterrupted)
    fewer = train(*arguments(config_file, tmp_path, "--training.steps", "7"), processes=2)
    assert f"nothing to do: the newest checkpoint is of step {STEPS}, and training.steps = 7" in fewer
    assert f"step {STEPS} is done" in fewer
    assert_same_run(tmp_path, uninterrupted)


def test_killed_between_checkpoints_it_is_the_same_run(config_file: str, uninterrupted: Path, tmp_path: Path) -> None:
    run = arguments(config_file, tmp_path)
    command = train_command(*run, processes=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **NO_GPU}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "metrics.jsonl").exists() or len(reports_so_far(tmp_path)) < 6:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()  # torchrun alone: its workers have to end with it
    while processes_of(tmp_path):
        assert time.monotonic() < deadline, "the workers outlive torchrun"
        time.sleep(0.05)
    assert not (tmp_path / f"checkpoint/step-{STEPS}").exists(), "the run ended before it was killed"
    assert "resuming from" in train(*run, processes=2)
    assert_same_run(tmp_path, uninterrupted)


def processes_of(dump_folder: Path) -> list[str]:
    """The processes whose command line names this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it may end while it is looked at
            if str(dump_folder).encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def reports_so_far(dump_folder: Path) -> list[str]:
    return (dump_folder / "metrics.jsonl").read_text().splitlines()


def test_saved_asynchronously_it_is_the_same_run(config_file: str, uninterrupted: Path, tmp_path: Path) -> None:
    more = ("--checkpoint.async_mode", "async", "--checkpoint.interval", "1")
    train(*arguments(config_file, tmp_path, *more, "--checkpoint.keep_latest_k", "6"), processes=2)
    assert_same_run(tmp_path, uninterrupted)
    assert_same_checkpoint(tmp_path / "checkpoint/step-5", uninterrupted / "checkpoint/step-5")
    kept = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoint").iterdir())
    assert kept == [5, 6, 7, 8, 9, 10]


def test_continued_on_other_numbers_of_processes(config_file: str, uninterrupted: Path, tmp_path: Path) -> None:
    """The same windows in the same steps; only the order of summation differs."""
    for processes, stop in ((1, 3), (3, 6), (2, STEPS)):
        run = arguments(config_file, tmp_path, "--training.stop_after_step", str(stop))
        train(*run, processes=processes)
    for ours, theirs in zip(reports(tmp_path), reports(uninterrupted), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    weights, expected = (read_checkpoint(folder / f"checkpoint/step-{STEPS}") for folder in (tmp_path, uninterrupted))
    for name in (name for name in expected if name.startswith("model.")):
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_one_process_without_torchrun(config_file: str, uninterrupted: Path, tmp_path: Path) -> None:
    more = ("--training.stop_after_step", "2", "--checkpoint.enable_checkpoint", "false")
    train(*arguments(config_file, tmp_path, *more))
    assert reports(tmp_path)[1] == pytest.approx(reports(uninterrupted)[1], rel=1e-4)
    assert not (tmp_path / "checkpoint").exists()
