"""A small sharded model with its optimizer, after some training."""

import torch

from torchtitan.config import JobConfig, load_config
from torchtitan.distributed.degrees import Degrees
from torchtitan.distributed.parallelize import build_model, init_weights
from torchtitan.distributed.world import World, build_mesh
from torchtitan.models.llama.model import Transformer, token_losses
from torchtitan.optimizer import build_optimizer

SMALL = ["--training.dataset", "synthetic", "--training.mixed_precision_param", "float32"]
SMALL += ["--training.seq_len", "32", "--model.dim", "32", "--model.n_layers", "2", "--model.ffn_dim", "48"]


def small_model(world: World, *argv: str, seed: int = 0) -> tuple[JobConfig, Transformer, torch.optim.Optimizer]:
    """Configuration, freshly initialised model and optimizer; `argv` overrides keys."""
    config = load_config([*SMALL, *argv])
    model = build_model(config, build_mesh(Degrees.of(config.training, world.size), world.device), world.device)
    init_weights(model, world.device, seed)
    return config, model, build_optimizer(model, config.optimizer)


def train_a_little(model: Transformer, optimizer: torch.optim.Optimizer, steps: int = 2) -> float:
    """A few steps on random tokens; returns the last loss."""
    loss = torch.zeros(())
    for step in range(steps):
        tokens = torch.randint(model.shape.vocab_size, (2, 17), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = token_losses(model(tokens[:, :-1]), tokens[:, 1:]).mean()
        loss.backward()
        optimizer.step()
    return loss.item()
