"""What is recomputed in the backward pass, and that it changes no number."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.distributed.recompute import apply_recompute, kept_by_layer
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


def loss_and_gradients(
    kept: frozenset[str] | None, documents: Documents | None
) -> tuple[list[torch.Tensor], Counter[str]]:
    torch.manual_seed(0)
    model = Transformer(SHAPE, Attention(BACKENDS["sdpa"], ""), max_length=24)
    for index, block in enumerate(model.layers):
        model.layers[index] = apply_recompute(block, kept)
    tokens = torch.randint(256, (2, 25))
    with CountedOperators() as operators:
        loss = token_losses(model(tokens[:, :-1], documents), tokens[:, 1:]).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [loss, *gradients], operators.counts


KEPT = {
    "none": None,
    "full": frozenset[str](),
    "attention": frozenset({"attention"}),
    "projections": frozenset({"attention", "projections"}),
    "gate_up": frozenset({"attention", "gate_up"}),
    "both": frozenset({"attention", "projections", "gate_up"}),
}


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("kept", [name for name in KEPT if name != "none"])
def test_loss_and_gradients_are_bit_for_bit_those_without_it(kept: str, documents: Documents | None) -> None:
    plain, _ = loss_and_gradients(None, documents)
    recomputed, _ = loss_and_gradients(KEPT[kept], documents)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(recomputed, plain, strict=True))


@pytest.mark.parametrize(
    ("kept", "attentions", "products"),
    # A block's forward pass has seven products, the last of which nothing in the backward pass needs.
    [("none", 3, 0), ("full", 6, 6), ("attention", 3, 6), ("projections", 3, 2), ("gate_up", 3, 4), ("both", 3, 0)],
)
def test_what_is_computed_again(kept: str, attentions: int, products: int) -> None:
    _, counts = loss_and_gradients(KEPT[kept], None)
    _, plain = loss_and_gradients(None, None)
    assert counts["aten._scaled_dot_product_flash_attention_for_cpu.default"] == attentions
    assert counts["aten.mm.default"] - plain["aten.mm.default"] == SHAPE.n_layers * products


@pytest.mark.parametrize("kept", ["full", "attention", "projections", "both"])
def test_compiled_blocks_keep_what_they_should(kept: str) -> None:
    """By the sizes of what autograd is given: the block's input, what is named, and nothing else of that size."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Transformer(SHAPE, Attention(BACKENDS["sdpa"], ""), max_length=24)
    block = apply_recompute(model.layers[0], KEPT[kept])
    block.compile()
    x = torch.randn(2, 24, SHAPE.dim, requires_grad=True)
    weights = {weight.data_ptr() for weight in model.parameters()}
    saved: Counter[int] = Counter()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        others = {*weights, model.rope_cache.data_ptr()}
        if tensor.is_floating_point() and tensor.data_ptr() not in others:
            saved[tensor.numel()] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, model.rope_cache, None).sum().backward()
    tokens, kv_dim = 2 * 24, SHAPE.n_kv_heads * SHAPE.head_dim
    expected = Counter({tokens * SHAPE.dim: 1})
    if kept != "full":
        expected.update({tokens * SHAPE.dim: 1, tokens * SHAPE.n_heads: 1})
    if kept in ("projections", "both"):
        expected.update({tokens * SHAPE.dim: 2, tokens * kv_dim: 2})
    if kept == "both":
        expected.update({tokens * SHAPE.ffn_dim: 2})
    assert saved == expected


def test_the_last_blocks_keep_more() -> None:
    config = ActivationCheckpoint(mode="attention", projections_layers=2, gate_up_layers=1)
    assert kept_by_layer(config, 3) == [KEPT["attention"], KEPT["projections"], KEPT["both"]]
    assert kept_by_layer(ActivationCheckpoint(mode="full"), 2) == [frozenset()] * 2
    assert kept_by_layer(ActivationCheckpoint(mode="none"), 2) == [None, None]
