"""Updates that are not made: what is not finite, on whichever rank, and spikes."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpoints import whole
from tests.models import small_model, train_a_little
from tests.processes import run_ranks
from torchtitan.checkpoint import folders
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors
from torchtitan.config.schema import Training
from torchtitan.distributed.world import World, init_world
from torchtitan.health import ENOUGH, WINDOW, Health
from torchtitan.optimizer import step_unless

CPU = torch.device("cpu")


def judge(health: Health, step: int, loss: float, norm: float) -> float:
    return float(health.judge(step, torch.tensor(loss), torch.tensor(norm), windows=lambda: [4, 9]))


def healthy(recent: list[float] | None = None, **config: float) -> Health:
    return Health(Training.model_validate(config), CPU, recent or [])


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, -math.inf)])
def test_what_is_not_finite_is_skipped(loss: float, norm: float) -> None:
    health = healthy()
    assert judge(health, 1, 2.0, 3.0) == 0
    assert judge(health, 2, loss, norm) == 1


def test_the_host_learns_of_it_a_step_later_and_names_the_windows(warnings_logged: pytest.LogCaptureFixture) -> None:
    health = healthy()
    judge(health, 1, math.nan, 1.0)
    health.learn()
    assert health.skipped == 0
    judge(health, 2, 1.0, 1.0)
    health.learn()
    assert (health.skipped, health.in_a_row) == (1, 1)
    assert "step 1: loss nan, gradient norm 1: the update is skipped, 1 in a row; its windows: 4, 9" in (
        warnings_logged.text
    )
    health.learn(all_of_them=True)
    assert (health.skipped, health.in_a_row) == (1, 0)


def test_too_many_in_a_row_end_the_run() -> None:
    health = healthy(max_bad_steps=3)
    for step, loss in enumerate((math.nan, math.nan, 1.0, math.nan, math.nan), 1):
        judge(health, step, loss, 1.0)
        health.learn(all_of_them=True)
    judge(health, 6, math.nan, 1.0)
    with pytest.raises(FloatingPointError, match=r"3 updates in a row were skipped, up to step 6"):
        health.learn(all_of_them=True)


def test_a_spike_is_measured_by_the_median_and_does_not_count_into_it() -> None:
    health = healthy(spike_factor=4.0)
    assert [judge(health, step, 1.0, 1.0 + step % 3) for step in range(ENOUGH)] == [0.0] * ENOUGH
    assert judge(health, 40, 1.0, 7.9) == 0  # the median is 2
    assert [judge(health, 41 + n, 1.0, 8.1) for n in range(2 * WINDOW)] == [1.0] * 2 * WINDOW
    assert judge(health, 400, 1.0, 2.0) == 0


def test_without_the_policy_there_are_no_spikes() -> None:
    health = healthy()
    assert [judge(health, step, 1.0, 10.0**step) for step in range(2 * ENOUGH - 40)] == [0.0] * (2 * ENOUGH - 40)


def test_what_a_checkpoint_keeps_goes_on_the_same() -> None:
    norms = [float(torch.rand((), generator=torch.Generator().manual_seed(n))) for n in range(200)]
    one = healthy(spike_factor=1.5)
    expected = [judge(one, step, 1.0, norm) for step, norm in enumerate(norms)]
    other = healthy(spike_factor=1.5)
    found = [judge(other, step, 1.0, norm) for step, norm in enumerate(norms[:150])]
    other = healthy(other.norms(), spike_factor=1.5)
    found += [judge(other, step, 1.0, norm) for step, norm in enumerate(norms[150:], 150)]
    assert found == expected
    assert {0.0, 1.0} == set(expected)


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_a_skipped_update_leaves_weights_and_optimizer_as_they_are(world: World, skip: float) -> None:
    """And one that is made is bit for bit the optimizer's own."""
    results = []
    for told in (True, False):
        _, model, optimizer = small_model(world)
        train_a_little(model, optimizer)
        before = whole(model_tensors(model) | optimizer_tensors(model, optimizer))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) * (math.nan if skip else 0.5)
        if told:
            assert isinstance(optimizer, torch.optim.AdamW)
            step_unless(torch.tensor(skip), optimizer)
        elif not skip:
            optimizer.step()
        after = whole(model_tensors(model) | optimizer_tensors(model, optimizer))
        assert all(torch.equal(before[name], after[name]) for name in before) == bool(skip)
        results.append(after)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def nan_on_one_rank(folder: str) -> None:
    """On each rank: a run whose rank 1 has a NaN in its loss at step 3."""
    from torchtitan import trainer
    from torchtitan.config import load_config

    world = init_world(60)
    argv = ["--training.dataset", "synthetic", "--training.seq_len", "32", "--training.steps", "6"]
    argv += ["--model.n_layers", "1", "--job.dump_folder", folder, "--metrics.log_freq", "1"]
    run = trainer.Trainer(load_config([*argv, "--training.mixed_precision_param", "float32"]), world)
    losses, calls = trainer.token_losses, []

    def poisoned(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        factor = math.nan if world.rank == 1 and len(calls) == 3 else 1.0
        return losses(logits, labels) * factor

    trainer.token_losses = poisoned
    run.train()
    assert run.health.skipped == 1
    assert run.cursor == 6 * 2
    state = whole(model_tensors(run.model) | optimizer_tensors(run.model, run.optimizer))
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert {float(tensor) for name, tensor in state.items() if name.endswith(".step")} == {5.0}
    dist.destroy_process_group()


@pytest.mark.fault("NaN", "loss of one of two ranks", 1, "update skipped on both, weights clean")
def test_a_nan_on_one_rank_skips_the_update_on_all(tmp_path: Path) -> None:
    from torchtitan.metrics import read_metrics

    run_ranks(nan_on_one_rank, 2, str(tmp_path))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["skipped_updates"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert lines[2]["loss"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def run_into_nan(folder: str) -> None:
    """A run whose losses are NaN from step 4 on, and which saves every second step in the background, slowly."""
    from torchtitan import trainer
    from torchtitan.config import load_config

    argv = ["--training.dataset", "synthetic", "--training.seq_len", "32", "--training.steps", "20"]
    argv += ["--training.num_workers", "0", "--training.max_bad_steps", "4", "--job.dump_folder", folder]
    argv += ["--checkpoint.interval", "2", "--checkpoint.async_mode", "async", "--metrics.log_freq", "100"]
    argv += ["--model.n_layers", "1"]
    run = trainer.Trainer(load_config([*argv, "--training.mixed_precision_param", "float32"]), init_world(60))
    losses, commit = trainer.token_losses, folders.commit

    def poisoned(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return losses(logits, labels) * (math.nan if run.step >= 4 else 1.0)

    def slow_commit(*arguments: Any) -> None:
        time.sleep(1)
        commit(*arguments)

    trainer.token_losses, folders.commit = poisoned, slow_commit
    with pytest.raises(FloatingPointError, match="4 updates in a row were skipped, up to step 7"):
        run.train()
    run.give_up()
    assert folders.complete_steps(run.checkpointer.root) == [2, 4, 6]
    dist.destroy_process_group()


def test_a_run_that_is_started_again_does_not_count_from_anew(tmp_path: Path) -> None:
    """Else a chain of jobs would go through all data, gaining steps and making no update; and no save is lost."""
    for _ in range(2):
        run_ranks(run_into_nan, 1, str(tmp_path))
        assert json.loads((tmp_path / "outcome.json").read_text())["outcome"] == "broken"
