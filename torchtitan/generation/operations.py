"""What a token passes on its way through a block, in PyTorch's own operations: they run everywhere.

`kernels.py` has the same functions for GPUs. Shape suffixes as in `cache.py`; M width of the model, H query heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from torchtitan.generation.cache import Cache, LayerCache
from torchtitan.models.llama.rope import apply_rope


@dataclass(frozen=True)
class Operations:
    """The functions that a decoding step is made of; this module's and those of `kernels.py` have these signatures.

    Attributes:
        normed_product: (x [N, M], norm [M], weight [O, M], eps) -> RMS norm of x, times the weight [N, O].
        gated_product: (x [N, M], norm [M], gate and up [2F, M], eps) -> SwiGLU of the normed x [N, F].
        added_product: (x [N, F], weight [M, F], residual [N, M]) -> residual + x times the weight [N, M].
        append: (qkv [N, (H + 2K)·D], rope [N, 2, D / 2], layer, cache) -> rotated queries [N, H, D]; puts the rotated
            keys, and the values, into the cache at its step.
        attend: (q [N, H, D], layer, cache) -> attention to prompt and continuation, the newest token included
            [N, H·D].
    """

    normed_product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
    gated_product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
    added_product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    append: Callable[[torch.Tensor, torch.Tensor, LayerCache, Cache], torch.Tensor]
    attend: Callable[[torch.Tensor, LayerCache, Cache], torch.Tensor]


def normed_product(x_NM: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `Operations`."""
    return F.linear(F.rms_norm(x_NM, norm.shape, norm, eps), weight)


def gated_product(x_NM: torch.Tensor, norm: torch.Tensor, gate_up: torch.Tensor, eps: float) -> torch.Tensor:
    """See `Operations`."""
    gate, up = normed_product(x_NM, norm, gate_up, eps).chunk(2, dim=-1)
    return F.silu(gate) * up


def added_product(x_NF: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """See `Operations`."""
    return residual + F.linear(x_NF, weight)


def append(qkv: torch.Tensor, rope: torch.Tensor, layer: LayerCache, cache: Cache) -> torch.Tensor:
    """See `Operations`."""
    kv_heads, head_dim = layer.own_k.shape[1], layer.own_k.shape[3]
    qkv_NHD = qkv.unflatten(-1, (-1, head_dim))
    heads = qkv_NHD.shape[1] - 2 * kv_heads
    turned = apply_rope(qkv_NHD[:, None, : heads + kv_heads], rope[:, None])[:, 0]
    layer.own_k.index_copy_(2, cache.step, turned[:, heads:, None])
    layer.own_v.index_copy_(2, cache.step, qkv_NHD[:, heads + kv_heads :, None])
    return turned[:, :heads]


def attend(q_NHD: torch.Tensor, layer: LayerCache, cache: Cache) -> torch.Tensor:
    """See `Operations`. One softmax over the scores of prompt and continuation; the cache is read where it lies.

    `scaled_dot_product_attention` would not do: its `is_causal` is aligned top left, so that a single query would see
    the first key alone.
    """
    (prompts, kv_heads, longest, head_dim), sequences = layer.prompt_k.shape, q_NHD.shape[0]
    samples, shared = cache.samples, q_NHD.shape[1] // kv_heads
    end = layer.own_k.shape[2] if cache.steps_known is None else cache.steps_known + 1
    own_k, own_v = (x[:, :, :end].flatten(0, 1) for x in (layer.own_k, layer.own_v))
    q = (q_NHD * head_dim**-0.5).view(prompts, samples, kv_heads, shared, head_dim)

    prompt_scores = _scores(q.transpose(1, 2).reshape(prompts * kv_heads, -1, head_dim), layer.prompt_k.flatten(0, 1))
    prompt_scores = prompt_scores.view(prompts, kv_heads, samples, shared, longest).transpose(1, 2)
    own_scores = _scores(q.reshape(-1, shared, head_dim), own_k).view(sequences, kv_heads, shared, end)
    scores = torch.cat((prompt_scores.reshape(sequences, kv_heads, shared, longest), own_scores), dim=-1)
    hidden = _hidden(end, cache)
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)

    prompt_weights = weights[..., :longest].view(prompts, samples, kv_heads, shared, longest).transpose(1, 2)
    seen = prompt_weights.reshape(prompts * kv_heads, -1, longest).bmm(layer.prompt_v.flatten(0, 1))
    seen = seen.view(prompts, kv_heads, samples, shared, head_dim).transpose(1, 2)
    own = weights[..., longest:].reshape(-1, shared, end).bmm(own_v)
    return (seen.reshape(sequences, -1, head_dim) + own.view(sequences, -1, head_dim)).flatten(1)


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Products of queries and keys, [heads, queries, D] and [heads, tokens, D]; in float32 where the GPU gives them."""
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32)
    return q.bmm(k.transpose(1, 2))


def _hidden(end: int, cache: Cache) -> torch.Tensor | None:
    """Which places of the cache hold no token yet, bool [N or 1, 1, 1, C + end]; None where all do."""
    behind = cache.behind_prompts()
    if cache.steps_known is not None and behind is None:
        return None
    places = torch.arange(end, device=cache.step.device)
    ahead = (places > cache.step).view(1, 1, 1, end)
    if behind is None:
        behind = ahead.new_zeros(1, 1, 1, max(cache.lengths))
    return torch.cat((behind, ahead.expand(behind.shape[0], 1, 1, end)), dim=-1)


PYTORCH = Operations(normed_product, gated_product, added_product, append, attend)
"""Every operation by PyTorch."""
