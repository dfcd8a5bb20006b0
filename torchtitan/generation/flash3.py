"""FlashAttention-3 on a cache: its own splitting of long caches, instead of that of `kernels.py`."""

import torch

from torchtitan.generation.cache import Cache, LayerCache


def attend(q: torch.Tensor, layer: LayerCache, cache: Cache) -> torch.Tensor:
    """See `Operations`. A prompt's samples are queries of one sequence that see all of it; then each sees its own."""
    heads, head_dim = q.shape[1:]
    grouped = q.view(-1, cache.samples, heads, head_dim)
    filled = min(cache.lengths) == max(cache.lengths)
    seen, sums = _forward(grouped, layer.prompt_k, layer.prompt_v, None if filled else cache.prompt_lengths)
    own, own_sums = _forward(q[:, None], layer.own_k, layer.own_v, cache.own_lengths)
    weight = torch.sigmoid(sums.transpose(1, 2).reshape(-1, heads) - own_sums[..., 0])
    return own[:, 0].lerp(seen.view_as(q), weight[..., None].to(q.dtype)).flatten(1)


def _forward(
    q_BLHD: torch.Tensor, k_BKCD: torch.Tensor, v_BKCD: torch.Tensor, lengths: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without a mask, and the logarithms of its sums [B, H, L].

    The operator as FlashAttention-3's library registers it: not all versions of PyTorch's wrappers take `lengths`.
    """
    key, value, scale = k_BKCD.transpose(1, 2), v_BKCD.transpose(1, 2), q_BLHD.shape[-1] ** -0.5
    out, sums, *_ = torch.ops.flash_attn_3.fwd(q_BLHD, key, value, seqused_k=lengths, softmax_scale=scale)
    return out, sums
