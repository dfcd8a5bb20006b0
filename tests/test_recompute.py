"""What is recomputed in the backward pass, and that it changes no number."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.distributed.recompute import apply_recompute
from torchtitan.models.llama.attention import BACKENDS, Attention, Documents
from torchtitan.models.llama.model import Transformer, token_losses
from torchtitan.models.llama.shape import ModelShape

SHAPE = ModelShape(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=48)
DOCUMENTS = Documents.from_starts(torch.tensor([0, 9, 24], dtype=torch.int32), 48, torch.device("cpu"))


class CountedOperators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def loss_and_gradients(mode: str, documents: Documents | None) -> tuple[list[torch.Tensor], Counter[str]]:
    torch.manual_seed(0)
    model = Transformer(SHAPE, Attention(BACKENDS["sdpa"], ""), max_length=24)
    for index, block in enumerate(model.layers):
        model.layers[index] = apply_recompute(block, mode)
    tokens = torch.randint(256, (2, 25))
    with CountedOperators() as operators:
        loss = token_losses(model(tokens[:, :-1], documents), tokens[:, 1:]).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [loss, *gradients], operators.counts


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("mode", ["full", "attention"])
def test_loss_and_gradients_are_bit_for_bit_those_without_it(mode: str, documents: Documents | None) -> None:
    plain, _ = loss_and_gradients("none", documents)
    recomputed, _ = loss_and_gradients(mode, documents)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(recomputed, plain, strict=True))


@pytest.mark.parametrize(
    ("mode", "attentions", "products"),
    # A block's forward pass has seven products; full recomputes all but the last one, attention the same.
    [("none", 3, 0), ("attention", 3, 6), ("full", 6, 6)],
)
def test_what_is_computed_again(mode: str, attentions: int, products: int) -> None:
    _, counts = loss_and_gradients(mode, None)
    _, plain = loss_and_gradients("none", None)
    assert counts["aten._scaled_dot_product_flash_attention_for_cpu.default"] == attentions
    assert counts["aten.mm.default"] - plain["aten.mm.default"] == SHAPE.n_layers * products
