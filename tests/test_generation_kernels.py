"""The Triton kernels against PyTorch's operations: on a GPU, or by Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

from tests.test_model import SHAPE, build
from torchtitan.generation import operations
from torchtitan.generation.cache import Cache
from torchtitan.generation.decode import Decoder
from torchtitan.models.llama.shape import ModelShape

if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("no GPU", allow_module_level=True)
pytest.importorskip("triton")

from torchtitan.generation import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32]
CASES = [([70], 1, 0), ([70, 33, 5], 3, 17), ([40, 40], 12, 30), ([90], 20, 1)]
"""Tokens of the prompts, samples of each, tokens before this one."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a cache of a test would be one part."""
    monkeypatch.setattr(kernels, "attention_tiles", kernels.AttentionTiles(tokens=16, programs=4))
    monkeypatch.setattr(kernels, "SHORTEST_SPLIT", 16)


def random(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*size, device=DEVICE).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the rounding of the precision, as a share of the whole."""
    allowed = 1e-2 if found.dtype == torch.bfloat16 else 1e-5
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(100, 200), (64, 1024)])
def test_products(rows: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, norm, weight = random(1, columns, dtype=dtype), random(columns, dtype=dtype), random(rows, columns, dtype=dtype)
    residual = random(1, rows, dtype=dtype)
    for name, arguments in {
        "normed_product": (x, norm, weight, 1e-5),
        "gated_product": (x, norm, weight, 1e-5),
        "added_product": (x, weight, residual),
    }.items():
        close(getattr(kernels, name)(*arguments), getattr(operations, name)(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 64])
@pytest.mark.parametrize(("lengths", "samples", "step"), CASES, ids=str)
def test_append_and_attend(lengths: list[int], samples: int, step: int, head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, kv_heads, sequences = 8, 2, len(lengths) * samples
    shape = ModelShape(dim=heads * head_dim, n_layers=1, n_heads=heads, n_kv_heads=kv_heads, ffn_dim=64)
    cache = Cache.empty(shape, lengths, samples, 40, DEVICE, dtype)
    layer = cache.layers[0]
    for whole in (layer.prompt_k, layer.prompt_v):
        whole.normal_()
        for number, length in enumerate(lengths):
            whole[number, :, length:] = 100.0  # to be seen by nobody
    for part in (layer.own_k, layer.own_v):
        part[:, :, :step].normal_()
    for _ in range(step):
        cache.advance()
    qkv = random(sequences, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    rope = random(sequences, 2, head_dim // 2, dtype=torch.float32)

    q = operations.append(qkv, rope, layer, cache)
    keys, values = layer.own_k.clone(), layer.own_v.clone()
    layer.own_k[:, :, step], layer.own_v[:, :, step] = 0, 0
    found = kernels.append(qkv, rope, layer, cache)
    close(found, q)
    close(layer.own_k, keys)
    close(layer.own_v, values)
    close(kernels.attend(found, layer, cache), operations.attend(q, layer, cache))


@pytest.mark.parametrize("lengths", [(40,), (40, 25, 33)], ids=str)
@torch.inference_mode()
def test_whole_steps(lengths: tuple[int, ...]) -> None:
    """All kernels in a row: three steps of one sequence, and of several."""
    decoder = Decoder(build(SHAPE, 64).to(DEVICE))
    found = {}
    for name, ops in (("triton", kernels.operations_for(len(lengths))), ("pytorch", operations.PYTORCH)):
        cache = Cache.empty(SHAPE, list(lengths), 1, 3, DEVICE, torch.float32)
        tokens = torch.randint(SHAPE.vocab_size, (sum(lengths) + 9,), generator=torch.Generator().manual_seed(0))
        *prompts, following = tokens.to(DEVICE).split([*lengths, 9])
        for number, prompt in enumerate(prompts):
            decoder.prefill(prompt, decoder.rope(64), cache, number)
        logits = []
        for step in range(3):
            now = following[step : step + len(lengths)]
            logits.append(decoder.step(now, decoder.rope(64), cache, ops))
            cache.advance()
        found[name] = torch.stack(logits)
    close(found["triton"], found["pytorch"])
