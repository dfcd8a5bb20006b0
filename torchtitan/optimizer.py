"""AdamW and the schedule of its learning rate."""

import torch
from torch import nn

from torchtitan.config.schema import Optimizer, Training


def build_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019) over all parameters."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(step: int, config: Optimizer, training: Training) -> float:
    """The rate of the step with this number, the first being 1: linear warm-up to `lr`, then linear decay to 0.

    A function of the step and the configuration alone, so there is no state of it to save.
    """
    warmup, steps = training.warmup_steps, training.steps
    if step <= warmup:
        return config.lr * step / (warmup + 1)
    return config.lr * (steps + 1 - step) / max(1, steps - warmup)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def step_unless(skip: torch.Tensor, optimizer: torch.optim.AdamW) -> None:
    """Updates the parameters, or leaves them, and the optimizer's state, where `skip`, a float32 scalar, is 1.

    The device decides: this is how PyTorch's fused optimizers are told of a gradient scaler's overflow.
    """
    vars(optimizer)["found_inf"] = skip
    optimizer.step()
