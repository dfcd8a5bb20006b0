"""Scoring held-out windows while training: the run goes on as without it, and the figures are evaluate.py's."""

import json
import re
from pathlib import Path

import pytest

from tests.checkpoints import assert_same_checkpoint
from tests.helpers import random_recordings, write_recordings
from tests.models import small_model
from tests.processes import run, train, train_command
from tests.test_train import CONFIG, reports
from torchtitan.distributed.watchdog import Watchdog
from torchtitan.distributed.world import World
from torchtitan.evaluation.validation import Validation

STEPS = 6
VALIDATION = ("--validation.enable", "--validation.interval", "2", "--validation.max_windows", "5")
FIGURES = ("validation_nats_per_token", "validation_bits_per_spike")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    splits = {"train": random_recordings([(6, 100), (4, 80)], largest=3), "test": random_recordings([(5, 90)], seed=1)}
    write_recordings(folder / "recordings", splits)
    path = folder / "run.toml"
    path.write_text(CONFIG.format(data=folder / "recordings", steps=STEPS).replace("interval = 5", "interval = 3"))
    return str(path)


@pytest.fixture(scope="module")
def validated(config_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump folder of a run on two processes that is validated every second step."""
    folder = tmp_path_factory.mktemp("validated")
    output = train(*arguments(config_file, folder, *VALIDATION), processes=2)
    assert "validation every 2 steps on" in output
    assert len(re.findall(r"step +[246]  loss [\d.]+  validation [\d.]+ \([+-][\d.]+ bits/spike\)", output)) == 3
    return folder


def arguments(config_file: str, dump_folder: Path, *more: str) -> list[str]:
    return ["--job.config_file", config_file, "--job.dump_folder", str(dump_folder), *more]


def figures(dump_folder: Path) -> dict[int, tuple[float, ...]]:
    """What `metrics.jsonl` has of validations, by step."""
    lines = [json.loads(line) for line in (dump_folder / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: tuple(line[key] for key in FIGURES) for line in lines if line[FIGURES[0]] is not None}


def test_training_goes_on_as_without_it(config_file: str, validated: Path, tmp_path: Path) -> None:
    train(*arguments(config_file, tmp_path), processes=2)
    assert reports(tmp_path) == reports(validated)
    assert figures(tmp_path) == {}
    assert_same_checkpoint(tmp_path / f"checkpoint/step-{STEPS}", validated / f"checkpoint/step-{STEPS}")


def test_resumed_it_has_each_validation_once(config_file: str, validated: Path, tmp_path: Path) -> None:
    train(*arguments(config_file, tmp_path, *VALIDATION, "--training.stop_after_step", "3"), processes=2)
    assert list(figures(tmp_path)) == [2]
    train(*arguments(config_file, tmp_path, *VALIDATION), processes=2)
    assert list(figures(validated)) == [2, 4, 6]
    assert figures(tmp_path) == figures(validated)


def test_the_figures_are_those_of_an_evaluation(config_file: str, validated: Path, tmp_path: Path) -> None:
    checkpoint = ("--checkpoint", str(validated / "checkpoint"), "--max_windows", "5")
    command = train_command(*arguments(config_file, tmp_path, *checkpoint))
    done = run([command[0], "evaluate.py", *command[2:]])
    assert done.returncode == 0, done.stdout
    overall = json.loads((tmp_path / f"evaluation/step-{STEPS}.max_windows-5.json").read_text())["overall"]
    assert (overall["nats_per_token"], overall["bits_per_spike"]) == figures(validated)[STEPS]


def test_it_stands_in_tensorboard_and_counts_into_no_step(config_file: str, tmp_path: Path) -> None:
    """Steps of one window, validations of nine: most of the time is in no step's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ("--training.batch_size", "1", "--training.global_batch_size", "1", "--validation.max_windows", "1000")
    train(*arguments(config_file, tmp_path, *VALIDATION, *more, "--metrics.enable_tensorboard", "true"))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    for name in FIGURES:
        assert [event.step for event in events.Scalars(name)] == [2, 4, 6]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    elapsed = lines[-1]["time"] - lines[1]["time"]
    assert sum(line["seconds_per_step"] for line in lines[2:]) < 0.8 * elapsed


def test_the_watchdog_hears_of_every_round(world: World) -> None:
    class Listener(Watchdog):
        def __init__(self) -> None:
            self.allowed: list[float] = []

        def allow(self, seconds: float) -> None:
            self.allowed.append(seconds)

    config, model, _ = small_model(world, "--validation.max_windows", "5", "--training.batch_size", "2")
    validation, listener = Validation(config, world), Listener()
    first, later = config.comm.init_timeout_seconds, config.comm.train_timeout_seconds
    scores = validation.score(model, listener)
    assert listener.allowed == [first, later, later, later]
    assert validation.score(model, listener) == scores
    assert listener.allowed[4:] == [later] * 4


def test_synthetic_data_have_recordings_of_their_own(tmp_path: Path) -> None:
    argv = ("--training.dataset", "synthetic", "--training.seq_len", "64", "--training.steps", "2")
    train(*argv, *VALIDATION, "--job.dump_folder", str(tmp_path), "--metrics.log_freq", "1", "--model.dim", "32")
    assert list(figures(tmp_path)) == [2]


def test_a_split_that_is_not_there(config_file: str, tmp_path: Path) -> None:
    done = run(train_command(*arguments(config_file, tmp_path, *VALIDATION, "--validation.split", "tset")))
    assert done.returncode == 1
    assert 'error: validation.split = "tset":' in done.stdout
    assert "has only train, test; validation.enable = false trains without it" in done.stdout
    assert "Traceback" not in done.stdout
