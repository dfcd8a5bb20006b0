"""What ranks do together, and what one of them does for all."""

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.processes import run_ranks
from torchtitan.distributed import launcher
from torchtitan.distributed.world import from_rank_zero, init_world, report_once
from torchtitan.logging import logger


def raise_together() -> None:
    """What rank 0 finds, whatever it is, is raised by all."""
    world = init_world(60)

    def fail() -> None:
        raise KeyError("found by rank 0")

    with pytest.raises(KeyError, match="found by rank 0"):
        from_rank_zero(fail)
    assert from_rank_zero(lambda: world.rank + 7) == 7
    dist.destroy_process_group()


def test_ranks_fail_together() -> None:
    run_ranks(raise_together, 2)


def report_slowly(said: Path) -> None:
    """Whoever finds the error first says it; no rank goes on, and perhaps ends, before that."""
    init_world(60)

    def say(message: str) -> None:
        time.sleep(1)
        with open(said, "a") as file:
            file.write(f"{message}\n")

    logger.error = say  # type: ignore[assignment]
    report_once("no such data")
    assert said.read_text() == "error: no such data\n"
    dist.destroy_process_group()


def test_an_error_of_all_is_said_once(tmp_path: Path) -> None:
    run_ranks(report_slowly, 2, tmp_path / "said")


@pytest.mark.parametrize(("rank", "waited", "said"), [("0", [], ["error: wrong"]), ("1", [launcher.PATIENCE], [])])
def test_an_error_before_the_ranks_know_of_each_other(
    rank: str, waited: list[int], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen_waiting: list[float] = []
    seen_said: list[str] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(launcher.time, "sleep", seen_waiting.append)
    monkeypatch.setattr(logger, "error", seen_said.append)
    launcher.report("wrong")
    assert (seen_waiting, seen_said) == (waited, said)
