"""Which activations of a block are kept for the backward pass, and which are computed again there."""

from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # registers torch_attn._varlen_attn
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

ATTENTION_OPS = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
}
"""What attention runs, by the operator's name; FlashAttention-3 and 4 stand behind the first and the last."""


def apply_recompute(block: nn.Module, mode: str) -> nn.Module:
    """The block with the recomputation of `activation_checkpoint.mode`.

    `none` keeps everything, `full` only the block's input, `attention` also each attention's output and log-sum-exp:
    its forward pass, the dearest at long sequences, then runs once. The recomputation stops where the last tensor
    that is needed has been made.
    """
    if mode == "none":
        return block
    contexts: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _keep_attention)}
    # Nothing in the model is random, so there is no random state to restore.
    return checkpoint_wrapper(block, preserve_rng_state=False, **(contexts if mode == "attention" else {}))


def _keep_attention(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE
