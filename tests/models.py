"""A small sharded model with its optimizer, after some training."""

import torch

from torchtitan.config import JobConfig, load_config
from torchtitan.distributed.parallelize import init_weights, parallelize
from torchtitan.distributed.world import World, build_mesh
from torchtitan.models.llama.attention import choose_attention
from torchtitan.models.llama.model import Transformer, token_losses
from torchtitan.models.llama.shape import ModelShape
from torchtitan.optimizer import build_optimizer

SMALL = ["--training.dataset", "synthetic", "--training.mixed_precision_param", "float32"]
SMALL += ["--model.dim", "32", "--model.n_layers", "2", "--model.ffn_dim", "48"]


def small_model(world: World, *argv: str, seed: int = 0) -> tuple[JobConfig, Transformer, torch.optim.Optimizer]:
    """Configuration, freshly initialised model and optimizer; `argv` overrides keys."""
    config = load_config([*SMALL, *argv])
    attention = choose_attention("auto", world.device, torch.float32)
    with torch.device("meta"):
        model = Transformer(ModelShape.from_config(config), attention, max_length=32)
    parallelize(model, build_mesh(config.training, world), config)
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
