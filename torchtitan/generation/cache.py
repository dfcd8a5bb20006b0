"""Keys and values of the tokens so far, in tensors that keep their shape.

Samples of one prompt share its keys and values: they stand there once, and one read of them serves all samples
(Juravsky et al., Hydragen, 2024). What each sequence goes on with is its own.

Shape suffixes: P prompts, S samples of each, N = P·S sequences (all samples of a prompt beside each other), K key and
value heads, C tokens of the longest prompt, T tokens of a continuation, D width of a head.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from torchtitan.models.llama.shape import ModelShape


@dataclass(frozen=True)
class LayerCache:
    """Rotated keys, and values, of one layer.

    Attributes:
        prompt_k, prompt_v: of the prompts, [P, K, C, D]; zeros behind a prompt that is shorter than the longest.
        own_k, own_v: of the continuations, [N, K, T, D]; zeros behind the newest token.
    """

    prompt_k: torch.Tensor
    prompt_v: torch.Tensor
    own_k: torch.Tensor
    own_v: torch.Tensor


@dataclass
class Cache:
    """Keys and values of all layers.

    Attributes:
        layers: of each layer.
        lengths: tokens of each prompt.
        samples: sequences of each prompt.
        prompt_lengths: `lengths` on the device, int32 [P].
        step: tokens of each continuation before this step, int64 [1] on the device: where new keys are put.
        own_lengths: the same with the new one, int32 [N].
        steps_known: `step` on the host; None where a recorded graph goes on without telling the host.
    """

    layers: list[LayerCache]
    lengths: list[int]
    samples: int
    prompt_lengths: torch.Tensor
    step: torch.Tensor
    own_lengths: torch.Tensor
    steps_known: int | None

    @classmethod
    def empty(
        cls, shape: ModelShape, lengths: list[int], samples: int, steps: int, device: torch.device, dtype: torch.dtype
    ) -> "Cache":
        """For prompts of these lengths, and that many samples of each that go on for that many tokens."""
        prompts = (len(lengths), shape.n_kv_heads, max(lengths), shape.head_dim)
        own = (len(lengths) * samples, shape.n_kv_heads, steps, shape.head_dim)
        layers = [
            LayerCache(*(torch.zeros(size, device=device, dtype=dtype) for size in (prompts, prompts, own, own)))
            for _ in range(shape.n_layers)
        ]
        prompt_lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        step = torch.zeros(1, dtype=torch.int64, device=device)
        own_lengths = torch.ones(own[0], dtype=torch.int32, device=device)
        return cls(layers, lengths, samples, prompt_lengths, step, own_lengths, 0 if device.type == "cpu" else None)

    @staticmethod
    def nbytes(shape: ModelShape, lengths: list[int], samples: int, steps: int, dtype: torch.dtype) -> int:
        """What `empty` would take, bytes."""
        tokens = len(lengths) * max(lengths) + len(lengths) * samples * steps
        return tokens * token_bytes(shape, dtype)

    def restart(self) -> None:
        """Forgets the continuations."""
        self.step.zero_()
        self.own_lengths.fill_(1)
        self.steps_known = None if self.steps_known is None else 0

    def advance(self) -> None:
        """All sequences have one token more."""
        self.step += 1
        self.own_lengths += 1
        if self.steps_known is not None:
            self.steps_known += 1

    @cached_property
    def first_positions(self) -> torch.Tensor:
        """Position of each sequence's first token behind its prompt, int64 [N]."""
        return self.prompt_lengths.long().repeat_interleave(self.samples)

    def behind_prompts(self) -> torch.Tensor | None:
        """Where the cache holds no token of a sequence's prompt, bool [N, 1, 1, C]; None where prompts fill it."""
        longest = max(self.lengths)
        if min(self.lengths) == longest:
            return None
        places = torch.arange(longest, device=self.step.device)
        return (places >= self.first_positions[:, None])[:, None, None]


def token_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers."""
    return 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * dtype.itemsize
