"""Activations on the host: what goes there, what comes back, and that it changes no number."""

import pytest
import torch
from torch import nn

from torchtitan.distributed.offload import HostOffload, OffloadedBlock
from torchtitan.distributed.recompute import apply_recompute
from torchtitan.models.llama.attention import BACKENDS, Attention
from torchtitan.models.llama.model import Transformer, token_losses
from torchtitan.models.llama.shape import ModelShape

SHAPE = ModelShape(dim=64, n_layers=5, n_heads=4, n_kv_heads=2, ffn_dim=96)
LENGTH = 80
CPU = torch.device("cpu")
ALL = ("attention", "projections", "gate_up")


def build(kept: frozenset[str] | None, *, compiled: bool = False) -> Transformer:
    # What other tests have compiled counts against the limit beyond which nothing is compiled any more.
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Transformer(SHAPE, Attention(BACKENDS["sdpa"], ""), max_length=LENGTH)
    for index, block in enumerate(model.layers):
        model.layers[index] = block = apply_recompute(block, kept)
        if compiled:
            block.compile()
    return model


def offloaded(model: Transformer, num_parking: int) -> HostOffload:
    """Wraps the blocks of the model; the first `num_parking` park what they keep."""
    offload = HostOffload(CPU)
    for index, block in enumerate(model.layers):
        model.layers[index] = OffloadedBlock(block, offload, index, parks=index < num_parking)
    return offload


def train(model: nn.Module, steps: int, micro_batches: int = 1) -> list[torch.Tensor]:
    """Losses, all gradients, and the weights at the end, of some steps of SGD."""
    seen = []
    for step in range(steps):
        for part in range(micro_batches):
            generator = torch.Generator().manual_seed(10 * step + part)
            tokens = torch.randint(256, (2, LENGTH + 1), generator=generator)
            loss = token_losses(model(tokens[:, :-1]), tokens[:, 1:]).mean()
            loss.backward()
            seen.append(loss.detach())
        for weight in model.parameters():
            assert weight.grad is not None
            seen.append(weight.grad)
            weight.data -= 0.1 * weight.grad
            weight.grad = None
    return [*seen, *model.parameters()]


@pytest.mark.parametrize("num_parking", [1, 3, 5])
@pytest.mark.parametrize(
    ("kept", "compiled"),
    [
        (None, False),
        (None, True),
        (frozenset(), False),
        (frozenset(), True),
        (frozenset(ALL[:1]), True),
        (frozenset(ALL), True),
    ],
    ids=["none", "compiled none", "full", "compiled full", "compiled attention", "compiled all"],
)
def test_training_is_bit_for_bit_that_without_it(kept: frozenset[str] | None, compiled: bool, num_parking: int) -> None:
    plain = train(build(kept, compiled=compiled), steps=3, micro_batches=2)
    model = build(kept, compiled=compiled)
    offload = offloaded(model, num_parking)
    parked = train(model, steps=3, micro_batches=2)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parked, plain, strict=True))
    assert offload.memory.allocated > 0


def test_buffers_are_used_again() -> None:
    """By the next step, and after a forward pass that was for nothing."""
    model = build(frozenset())
    offload = offloaded(model, 5)
    train(model, steps=1)
    allocated = offload.memory.allocated
    tokens = torch.randint(256, (2, LENGTH))
    for _ in range(3):
        model(tokens)
    train(model, steps=2)
    assert offload.memory.allocated == allocated


def test_nothing_is_parked_without_gradients() -> None:
    model = build(frozenset())
    offload = offloaded(model, 5)
    with torch.no_grad():
        model(torch.randint(256, (2, LENGTH)))
    assert offload.memory.allocated == 0
