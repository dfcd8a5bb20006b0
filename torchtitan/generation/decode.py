"""Runs a model one token at a time: reads a prompt in once, then only what is new.

The weights are the model's own: nothing of them is copied or widened. Shape suffixes as in `cache.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan.generation import operations
from torchtitan.generation.cache import Cache
from torchtitan.generation.operations import Operations
from torchtitan.models.llama.model import Transformer, TransformerBlock
from torchtitan.models.llama.rope import apply_rope, rope_cache

PIECE = 8192
"""Tokens of a prompt that pass the products at once: what they take in between stays small beside the cache."""


@dataclass(frozen=True)
class Layer:
    """The weights of a block, those with the same input in one tensor.

    Attributes:
        attention_norm, ffn_norm: of the RMS norms, [M].
        qkv: query, key and value projections, [(H + 2K)·D, M].
        wo: output projection, [M, H·D].
        gate_up: gate and up projections, [2F, M].
        down: down projection, [M, F].
    """

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    wo: torch.Tensor
    ffn_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Decoder:
    """A model, to be run one token at a time."""

    def __init__(self, model: Transformer) -> None:
        """The model goes on working: its weights become parts of those that are joined here."""
        self.model = model
        self.shape, self.attention, self.eps = model.shape, model.attention, model.shape.norm_eps
        self.embeddings, self.norm, self.output = model.tok_embeddings.weight, model.norm.weight, model.output.weight
        self.layers = [_joined(block) for block in model.layers if isinstance(block, TransformerBlock)]
        self.device, self.dtype = self.embeddings.device, self.embeddings.dtype

    def rope(self, length: int) -> torch.Tensor:
        """The rotary table up to that many tokens: it may reach beyond what the model was made for."""
        if length <= self.model.rope_cache.shape[0]:
            return self.model.rope_cache
        return rope_cache(self.shape, length, self.device)

    def prefill(self, tokens_L: torch.Tensor, rope: torch.Tensor, cache: Cache, prompt: int) -> None:
        """Puts keys and values of a prompt's tokens, int64 [L], into its place in the cache.

        One pass of the model over all of it, but for what no one will ask: the last block beyond its keys and values,
        and the logits, as the token behind whole bins is known to be BOS.
        """
        length, kv_heads, head_dim = len(tokens_L), self.shape.n_kv_heads, self.shape.head_dim
        x_LM = F.embedding(tokens_L, self.embeddings)
        q = x_LM.new_empty(1, length, self.shape.n_heads, head_dim)
        for layer, kept in zip(self.layers, cache.layers, strict=True):
            k, v = (x[prompt : prompt + 1, :, :length].transpose(1, 2) for x in (kept.prompt_k, kept.prompt_v))
            for piece in _pieces(length):
                qkv = operations.normed_product(x_LM[piece], layer.attention_norm, layer.qkv, self.eps)
                turned, v[0, piece] = qkv.unflatten(-1, (-1, head_dim)).tensor_split([-kv_heads], dim=1)
                turned = apply_rope(turned, rope[:length][piece])
                q[0, piece], k[0, piece] = turned.tensor_split([-kv_heads], dim=1)
            if layer is self.layers[-1]:
                return
            attended = self.attention(q, k, v)[0]
            for piece in _pieces(length):
                x = operations.added_product(attended[piece].flatten(1), layer.wo, x_LM[piece])
                hidden = operations.gated_product(x, layer.ffn_norm, layer.gate_up, self.eps)
                x_LM[piece] = operations.added_product(hidden, layer.down, x)
            del attended

    def step(self, tokens_N: torch.Tensor, rope: torch.Tensor, cache: Cache, ops: Operations) -> torch.Tensor:
        """Logits after one more token of each sequence, [N, V]; its keys and values are put into the cache.

        The cache's step is left as it is.
        """
        x_NM = F.embedding(tokens_N, self.embeddings)
        turns = rope[cache.first_positions + cache.step]
        for layer, kept in zip(self.layers, cache.layers, strict=True):
            qkv = ops.normed_product(x_NM, layer.attention_norm, layer.qkv, self.eps)
            q_NHD = ops.append(qkv, turns, kept, cache)
            x_NM = ops.added_product(ops.attend(q_NHD, kept, cache), layer.wo, x_NM)
            hidden = ops.gated_product(x_NM, layer.ffn_norm, layer.gate_up, self.eps)
            x_NM = ops.added_product(hidden, layer.down, x_NM)
        return ops.normed_product(x_NM, self.norm, self.output, self.eps)


def _pieces(length: int) -> Iterator[slice]:
    return (slice(start, start + PIECE) for start in range(0, length, PIECE))


def _joined(block: TransformerBlock) -> Layer:
    attention, ffn = block.attention, block.feed_forward
    return Layer(
        attention_norm=block.attention_norm.weight,
        qkv=_join(attention.wq, attention.wk, attention.wv),
        wo=attention.wo.weight,
        ffn_norm=block.ffn_norm.weight,
        gate_up=_join(ffn.w1, ffn.w3),
        down=ffn.w2.weight,
    )


def _join(*linears: nn.Linear) -> torch.Tensor:
    """Their weights below each other in one tensor, parts of which become their weights."""
    rows = [linear.out_features for linear in linears]
    joined = torch.cat([linear.weight.data for linear in linears])
    for linear, part in zip(linears, joined.split(rows), strict=True):
        linear.weight.data = part
    return joined
