"""The schedule of the learning rate."""

import pytest

from torchtitan.config.schema import Optimizer, Training
from torchtitan.optimizer import learning_rate


def rates(steps: int, warmup: int) -> list[float]:
    training = Training(steps=steps, warmup_steps=warmup)
    return [learning_rate(step, Optimizer(lr=1.0), training) for step in range(1, steps + 2)]


def test_warms_up_and_decays_linearly_to_zero() -> None:
    assert rates(steps=8, warmup=3) == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0])


def test_without_warmup_it_begins_at_the_peak() -> None:
    assert rates(steps=4, warmup=0) == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4, 0])


def test_a_run_shorter_than_its_warmup_only_warms_up() -> None:
    assert rates(steps=3, warmup=9)[:3] == pytest.approx([0.1, 0.2, 0.3])
