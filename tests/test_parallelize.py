"""FSDP2 on several processes gives what one process gives, and what a plain model gives."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.processes import run_ranks
from torchtitan.config import JobConfig, load_config
from torchtitan.distributed.degrees import Degrees
from torchtitan.distributed.parallelize import build_model, init_weights
from torchtitan.distributed.world import World, build_mesh, init_world
from torchtitan.models.llama.attention import BACKENDS, Attention
from torchtitan.models.llama.model import Transformer, token_losses
from torchtitan.models.llama.shape import ModelShape

LENGTH = 48
ARGUMENTS = ["--training.dataset", "synthetic", "--model.n_layers", "2", "--training.mixed_precision_param", "float32"]
ARGUMENTS += ["--training.seq_len", str(LENGTH)]


KEEP_ALL = ["--activation_checkpoint.mode", "attention", "--activation_checkpoint.projections_layers", "2"]
KEEP_ALL += ["--activation_checkpoint.gate_up_layers", "2"]


def build(config: JobConfig, world: World) -> Transformer:
    """The sharded model with its initial weights."""
    model = build_model(config, build_mesh(Degrees.of(config.training, world.size), world.device), world.device)
    init_weights(model, world.device, seed=3)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(256, (4, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def write_loss_and_gradients(folder: str, argv: list[str]) -> None:
    """On each rank: a step on its share of four sequences; rank 0 writes the whole loss and gradients."""
    config = load_config([*ARGUMENTS, *argv])
    world = init_world(60)
    model = build(config, world)
    mine = tokens().chunk(world.size)[world.rank]
    loss = token_losses(model(mine[:, :-1]), mine[:, 1:]).mean()
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    result = {"loss": total / world.size}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        result[name.replace("_checkpoint_wrapped_module.", "")] = parameter.grad.full_tensor()
    if world.rank == 0:
        torch.save(result, f"{folder}/result.pt")
    dist.destroy_process_group()


def write_weights(folder: str) -> None:
    """On each rank: the initial weights; rank 0 writes them whole."""
    config = load_config(ARGUMENTS)
    world = init_world(60)
    model = build(config, world)
    weights = {name: p.full_tensor() for name, p in model.named_parameters() if isinstance(p, DTensor)}
    if world.rank == 0:
        torch.save(weights, f"{folder}/weights-{world.size}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def initial_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("weights")
    run_ranks(write_weights, 1, str(folder))
    return torch.load(folder / "weights-1.pt")


@pytest.fixture(scope="module")
def expected(initial_weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss and gradients of a plain model, without FSDP and without processes."""
    shape = ModelShape.from_config(load_config(ARGUMENTS))
    model = Transformer(shape, Attention(BACKENDS["sdpa"], ""), max_length=LENGTH)
    model.load_state_dict(initial_weights)
    loss = token_losses(model(tokens()[:, :-1]), tokens()[:, 1:]).mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach(), **gradients}


def test_initial_weights_do_not_depend_on_the_number_of_ranks(
    initial_weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    run_ranks(write_weights, 3, str(tmp_path))
    sharded = torch.load(tmp_path / "weights-3.pt")
    assert sharded.keys() == initial_weights.keys()
    assert all(torch.equal(sharded[name], initial_weights[name]) for name in sharded)


@pytest.mark.parametrize(
    ("ranks", "argv"),
    [
        (1, []),
        (2, []),
        (2, ["--activation_checkpoint.mode", "full"]),
        (2, ["--activation_checkpoint.mode", "attention"]),
        (2, ["--training.data_parallel_replicate_degree", "2"]),
        (2, ["--activation_checkpoint.mode", "full", "--activation_checkpoint.offload_layers", "2"]),
        (2, ["--training.reshard_after_forward", "false"]),
        (1, ["--training.compile", "--activation_checkpoint.mode", "full"]),
        (1, ["--training.compile", "--activation_checkpoint.mode", "attention"]),
        (2, ["--training.compile", *KEEP_ALL, "--activation_checkpoint.offload_layers", "2"]),
    ],
    ids=[
        *("one", "FSDP", "full", "attention", "HSDP", "full, offloaded", "gathered once"),
        *("compiled full", "compiled attention", "compiled, all kept and offloaded"),
    ],
)
def test_loss_and_gradients_are_the_plain_models(
    expected: dict[str, torch.Tensor], ranks: int, argv: list[str], tmp_path: Path
) -> None:
    run_ranks(write_loss_and_gradients, ranks, str(tmp_path), argv)
    found = torch.load(tmp_path / "result.pt")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def compute_in_bfloat16() -> None:
    config = load_config(["--training.dataset", "synthetic", "--model.n_layers", "1", "--training.seq_len", "48"])
    world = init_world(60)
    model = build(config, world)
    logits = model(tokens()[:, :-1])
    token_losses(logits, tokens()[:, 1:]).mean().backward()
    assert logits.dtype == torch.bfloat16
    assert model.rope_cache.dtype == torch.float32
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    dist.destroy_process_group()


def test_bfloat16_is_for_computing_alone() -> None:
    run_ranks(compute_in_bfloat16, 1)
