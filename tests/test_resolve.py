"""What `auto` comes to on a machine."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from torchtitan.config import JobConfig, load_config
from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.distributed.degrees import Degrees
from torchtitan.distributed.world import World
from torchtitan.plan import resolve
from torchtitan.plan.resolve import free_host_memory, resolve_recompute

ARGUMENTS = ["--job.config_file", "train_configs/primate_8b_131k.toml", "--model.n_layers", "8"]
GIB = 2**30


def configured(*argv: str) -> tuple[JobConfig, Degrees]:
    config = load_config([*ARGUMENTS, *argv])
    return config, Degrees.of(config.training, 1)


@pytest.fixture
def on_h200(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The only process of a run, which takes its CPU for an H200 with 120 GiB of free host memory."""
    h200 = SimpleNamespace(name="NVIDIA H200", total_memory=139.8 * GIB)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: h200)
    monkeypatch.setattr(resolve, "free_host_memory", lambda: 120.0 * GIB)
    return replace(world, device=torch.device("cuda"))


def test_a_named_mode_stays(on_h200: World) -> None:
    recompute, reason = resolve_recompute(*configured("--activation_checkpoint.mode", "full"), on_h200)
    assert (recompute, reason) == (ActivationCheckpoint(mode="full"), "as configured")


def test_a_cpu_recomputes_nothing(world: World) -> None:
    assert resolve_recompute(*configured(), world)[0] == ActivationCheckpoint(mode="none")


def test_all_of_the_memory_is_used(on_h200: World) -> None:
    recompute, reason = resolve_recompute(*configured(), on_h200)
    assert (recompute.mode, recompute.projections_layers) == ("attention", 8)
    assert recompute.gate_up_layers >= 7
    assert "of 125.8 GiB of the GPU" in reason
    assert "of 72.0 GiB of the host" in reason


def test_configured_limits_count(on_h200: World) -> None:
    limits = ["--activation_checkpoint.device_memory_gib", "63", "--activation_checkpoint.host_memory_gib", "0"]
    recompute, _ = resolve_recompute(*configured(*limits), on_h200)
    assert recompute == ActivationCheckpoint(mode="full")


def test_too_little_memory_is_warned_of(on_h200: World, warnings_logged: pytest.LogCaptureFixture) -> None:
    resolve_recompute(*configured("--activation_checkpoint.device_memory_gib", "20"), on_h200)
    assert "nothing fits" in warnings_logged.text


def test_free_host_memory_is_some_of_this_machines() -> None:
    assert 2**28 < free_host_memory() < 2**44
