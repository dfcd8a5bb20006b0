"""How the ranks divide the model and the batch."""

import pytest

from torchtitan.config import ConfigError, JobConfig, load_config
from torchtitan.distributed.degrees import Degrees, check_degrees

SYNTHETIC = ["--training.dataset", "synthetic"]


def load(monkeypatch: pytest.MonkeyPatch, num_ranks: int, *argv: str) -> JobConfig:
    monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
    return load_config([*SYNTHETIC, *argv], checks=[check_degrees])


@pytest.mark.parametrize(
    ("num_ranks", "argv", "expected"),
    [
        (8, (), Degrees(1, 8, 8, 1)),
        (8, ("--training.data_parallel_replicate_degree", "2"), Degrees(2, 4, 8, 1)),
        (8, ("--training.data_parallel_shard_degree", "8"), Degrees(1, 8, 8, 1)),
        (4, ("--training.batch_size", "3"), Degrees(1, 4, 12, 1)),
        (4, ("--training.batch_size", "3", "--training.global_batch_size", "36"), Degrees(1, 4, 36, 3)),
    ],
)
def test_what_is_left_open_is_chosen(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int, argv: tuple[str, ...], expected: Degrees
) -> None:
    assert Degrees.of(load(monkeypatch, num_ranks, *argv).training, num_ranks) == expected


def test_what_does_not_fit_the_processes_is_said_in_one_list(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("--training.data_parallel_shard_degree", "3", "--training.data_parallel_replicate_degree", "2")
    with pytest.raises(ConfigError) as caught:
        load(monkeypatch, 4, *argv, "--training.batch_size", "2", "--training.global_batch_size", "6", "--a.b", "1")
    text = str(caught.value)
    assert "3 times training.data_parallel_replicate_degree = 2 is 6, but the run has 4 processes" in text
    assert "training.global_batch_size: 6 is not a multiple of 8" in text
    assert "--a.b: unknown key" in text


def test_more_copies_than_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="is 4, but the run has 2 processes"):
        load(monkeypatch, 2, "--training.data_parallel_replicate_degree", "4")
