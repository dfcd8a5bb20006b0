"""The Llama 3.1 transformer. Weight names are Meta's.

Shape suffixes: B batch, L length, D model width, F feed-forward width, H heads, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan.models.llama.attention import Attention, Documents
from torchtitan.models.llama.rope import apply_rope, rope_cache
from torchtitan.models.llama.shape import ModelShape


class SelfAttention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, shape: ModelShape, attention: Attention) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.attention = attention
        self.wq = nn.Linear(shape.dim, shape.n_heads * shape.head_dim, bias=False)
        self.wk = nn.Linear(shape.dim, shape.n_kv_heads * shape.head_dim, bias=False)
        self.wv = nn.Linear(shape.dim, shape.n_kv_heads * shape.head_dim, bias=False)
        self.wo = nn.Linear(shape.n_heads * shape.head_dim, shape.dim, bias=False)

    def forward(self, x_BLD: torch.Tensor, rope: torch.Tensor, documents: Documents | None) -> torch.Tensor:
        q, k, v = (w(x_BLD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        return self.wo(self.attention(apply_rope(q, rope), apply_rope(k, rope), v, documents).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, GLU Variants Improve Transformer, 2020)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.w2 = nn.Linear(shape.ffn_dim, shape.dim, bias=False)
        self.w3 = nn.Linear(shape.dim, shape.ffn_dim, bias=False)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x_BLD)) * self.w3(x_BLD))


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each on the normed residual stream and added to it."""

    def __init__(self, shape: ModelShape, attention: Attention) -> None:
        super().__init__()
        self.attention = SelfAttention(shape, attention)
        self.feed_forward = FeedForward(shape)
        self.attention_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.ffn_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)

    def forward(self, x_BLD: torch.Tensor, rope: torch.Tensor, documents: Documents | None) -> torch.Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rope, documents)
        return x_BLD + self.feed_forward(self.ffn_norm(x_BLD))


class Transformer(nn.Module):
    """Logits of the next token.

    Built on the meta device, its weights and buffers get their values from `init_parameter` and `init_buffers`.
    """

    rope_cache: torch.Tensor

    def __init__(self, shape: ModelShape, attention: Attention, *, max_length: int) -> None:
        """`max_length`: largest position, plus one, that the model will be given."""
        super().__init__()
        self.shape, self.attention, self.max_length = shape, attention, max_length
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(TransformerBlock(shape, attention) for _ in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        self.register_buffer("rope_cache", rope_cache(shape, max_length), persistent=False)

    def forward(
        self, tokens_BL: torch.Tensor, documents: Documents | None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the token after each, [B, L, V] in the precision of the weights.

        Args:
            tokens_BL: int64 [B, L].
            documents: keeps attention within them; None: each sequence is one.
            positions: of the tokens, int64 [L] or [B, L]; None: 0 … L - 1. Only differences matter to attention, so
                documents need no positions of their own.
        """
        rope = self.rope_cache[: tokens_BL.shape[1]] if positions is None else self.rope_cache[positions]
        x_BLD = self.tok_embeddings(tokens_BL)
        for layer in self.layers:
            x_BLD = layer(x_BLD, rope, documents)
        return self.output(self.norm(x_BLD))

    def init_buffers(self) -> None:
        """Fills the rotary table, which `to_empty` leaves undefined."""
        self.rope_cache.copy_(rope_cache(self.shape, self.max_length, self.rope_cache.device))

    def init_parameter(self, name: str, weight: torch.Tensor, generator: torch.Generator) -> None:
        """Gives a whole weight its random initial values.

        Embeddings N(0, 1); projections normal with deviation 0.02, those that write to the residual stream
        0.02 / sqrt(2 · (layer + 1)); the output layer dim^-0.5. All but the embeddings truncated at three deviations.
        """
        if name.endswith("norm.weight"):
            nn.init.ones_(weight)
        elif name == "tok_embeddings.weight":
            nn.init.normal_(weight, generator=generator)
        else:
            deviation = 0.02
            if name == "output.weight":
                deviation = self.shape.dim**-0.5
            elif name.endswith(("wo.weight", "w2.weight")):
                deviation /= math.sqrt(2 * (int(name.split(".")[1]) + 1))
            nn.init.trunc_normal_(weight, std=deviation, a=-3 * deviation, b=3 * deviation, generator=generator)


def token_losses(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each label in nats, float32 [B, L]."""
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), labels_BL.flatten(), reduction="none").view_as(labels_BL)
