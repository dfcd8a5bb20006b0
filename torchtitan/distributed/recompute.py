"""Which activations of a block are kept for the backward pass, and which are computed again there."""

from collections import Counter
from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # registers torch_attn._varlen_attn
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from torchtitan.config.schema import ActivationCheckpoint

ATTENTION_OPS = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
}
"""What attention runs, by the operator's name; FlashAttention-3 and 4 stand behind the first and the last."""

PRODUCT_OPS = {torch.ops.aten.mm.default, torch.ops.aten._scaled_mm.default}
"""What a linear layer runs, in bf16 or fp32 and in float8."""

PRODUCTS = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")
"""The linear layers of a block, in the order in which it runs them."""

KEEPABLE = {"attention": (), "projections": ("wq", "wk", "wv", "wo"), "gate_up": ("w1", "w3")}
"""What a block can keep beside its input, by the products whose results these are. The last one, w2, is never
computed again: nothing in the backward pass needs its result."""


def kept_by_layer(config: ActivationCheckpoint, n_layers: int) -> list[frozenset[str] | None]:
    """For each block which of `KEEPABLE` it keeps; None: everything, also where `auto` was not resolved.

    `projections_layers` and `gate_up_layers` count from the last block, whose backward pass comes first.
    """
    if config.mode in ("none", "auto"):
        return [None] * n_layers
    if config.mode == "full":
        return [frozenset()] * n_layers
    layers_with = {"attention": n_layers, "projections": config.projections_layers, "gate_up": config.gate_up_layers}
    return [frozenset(name for name, n in layers_with.items() if i >= n_layers - n) for i in range(n_layers)]


def apply_recompute(block: nn.Module, kept: frozenset[str] | None) -> nn.Module:
    """The block, keeping its input and what is named, and computing the rest again in its backward pass.

    The recomputation stops where the last tensor that is needed has been made.
    """
    if kept is None:
        return block
    contexts: dict[str, Any] = {"context_fn": partial(_contexts, kept)} if kept else {}
    # Nothing in the model is random, so there is no random state to restore.
    return checkpoint_wrapper(block, preserve_rng_state=False, **contexts)


def _contexts(kept: frozenset[str]) -> Any:
    """Contexts for one forward pass of a block: products have no names in them, so they are counted."""
    products = {name for group in kept for name in KEEPABLE[group]}
    runs: Counter[bool] = Counter()

    def policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        keep = operator in ATTENTION_OPS and "attention" in kept
        if operator in PRODUCT_OPS:
            keep = PRODUCTS[runs[context.is_recompute]] in products
            runs[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
