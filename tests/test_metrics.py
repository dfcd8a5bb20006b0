"""What a step reports, on the console and in `metrics.jsonl`."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.test_interrupts import handlers_restored
from torchtitan.config.schema import Metrics
from torchtitan.distributed.world import World
from torchtitan.metrics import MetricsWriter, StepMetrics, read_metrics


def metrics(step: int) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=1 / 3,
        grad_norm=0.5,
        skipped_updates=0,
        lr=1e-3,
        tokens_seen=100 * step,
        epoch=None,
        tokens_per_second_per_gpu=1234.5,
        seconds_per_step=0.1,
        mfu=None,
        data_wait_share=0.01,
        peak_reserved_gib=None,
        clipped_counts=3,
        seconds_left=65.4,
        time=0.0,
    )


def write(folder: Path, steps: range, first_step: int = 1, enable_tensorboard: bool = True) -> None:
    config = Metrics(enable_tensorboard=enable_tensorboard)
    writer = MetricsWriter(config, folder, rank=0, first_step=first_step)
    for step in steps:
        writer.write(metrics(step))
    writer.close()


def test_metrics_are_written_at_full_precision(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), enable_tensorboard=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [asdict(metrics(step)) for step in (1, 2, 3)]
    assert lines[0]["loss"] == 1 / 3


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8), enable_tensorboard=False)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # a kill in the middle of a line
    write(tmp_path, range(6, 10), 6, enable_tensorboard=False)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 10))


def test_a_fresh_start_in_an_old_folder_begins_anew(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8), enable_tensorboard=False)
    write(tmp_path, range(1, 3), enable_tensorboard=False)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, warnings_logged: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(Metrics(enable_tensorboard=False), tmp_path, rank=0, first_step=1)
    assert writer.file is not None
    writer.file.close()
    writer.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    for step in (1, 2):
        writer.write(metrics(step))
    writer.close()
    said = [record.message for record in warnings_logged.records if record.levelname == "WARNING"]
    assert said == ["metrics.jsonl cannot be written (No space left on device); the run goes on"]


def test_what_was_reported_is_on_disk_before_the_step_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    """A machine that goes down takes with it what was only written, and a checkpoint is synced."""
    from torchtitan.checkpoint import folders
    from torchtitan.config import load_config
    from torchtitan.trainer import Trainer

    order: list[str] = []
    sync, commit = MetricsWriter.sync, folders.commit
    monkeypatch.setattr(MetricsWriter, "sync", lambda writer: order.append("sync") or sync(writer))
    monkeypatch.setattr(folders, "commit", lambda *arguments: order.append("commit") or commit(*arguments))
    argv = ["--training.dataset", "synthetic", "--training.seq_len", "32", "--training.steps", "1"]
    argv += ["--model.n_layers", "1", "--training.num_workers", "0", "--metrics.enable_tensorboard", "false"]
    with handlers_restored():
        Trainer(load_config([*argv, "--job.dump_folder", str(tmp_path)]), world).train()
    assert order == ["sync", "commit"]


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    writer = MetricsWriter(Metrics(), tmp_path, rank=1, first_step=1)
    writer.write(metrics(1))
    writer.close()
    assert not list(tmp_path.iterdir())


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(1, 4))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert "mfu" not in events.Tags()["scalars"]


def test_the_console_line_says_what_is_not_known() -> None:
    line = str(metrics(7))
    assert "MFU peak unknown" in line
    assert "left 0:01:05" in line
    assert "clipped 3" in line
    assert "memory" not in line
