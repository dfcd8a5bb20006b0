"""The kernels of generation alone, cut up in several ways: which tiles read fastest."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernels import seconds
from torchtitan.generation import flash3, kernels
from torchtitan.generation.cache import Cache
from torchtitan.generation.decode import Decoder
from torchtitan.generation.kernels import AttentionTiles, MatvecTiles

MATVEC = [
    MatvecTiles(rows, columns, warps, stages)
    for rows, columns, warps in ((4, 512, 4), (8, 512, 4), (4, 1024, 4), (2, 1024, 4), (8, 256, 2), (16, 256, 4))
    for stages in (1, 3)
]
ATTENTION = [
    AttentionTiles(tokens, warps, stages, programs)
    for tokens, warps, stages in ((64, 4, 3), (64, 4, 2), (64, 4, 4), (128, 4, 2), (128, 8, 2), (128, 8, 3), (32, 4, 4))
    for programs in (2, 3, 4, 8)
]
CASES = {"one prompt": (1, 1, 16), "eight prompts": (8, 1, 4), "eight samples": (1, 8, 16)}
"""Prompts, samples of each, and layers whose caches are read in turn."""


def graph_seconds(run: Callable[[], object]) -> float:
    """Seconds of a run as a CUDA graph: kernels of microseconds would else wait for the host."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return seconds(graph.replay)


def sweep_kernels(decoder: Decoder, context: int) -> dict[str, list[dict[str, Any]]]:
    """TB/s of the products of one vector, by kind and all together, and of attention to one and to eight prompts.

    All layers' weights and caches are read in turn, so that none of it comes from the GPU's own cache.
    """
    return {"products": _products(decoder), "attention": _attention(decoder, context)}


@contextmanager
def fastest_tiles(sweep: dict[str, list[dict[str, Any]]], prompts: int) -> Iterator[dict[str, Any]]:
    """Puts those into use that were fastest for that many prompts."""
    case = "one prompt" if prompts == 1 else "eight prompts"
    products = max((found for found in sweep["products"] if found["tiles"] != "cuBLAS"), key=lambda found: found["all"])
    ours = [found for found in sweep["attention"] if found["tiles"] != "fa3" and case in found]
    attention = max(ours, key=lambda found: found[case])
    kept = kernels.matvec_tiles, kernels.attention_tiles
    kernels.matvec_tiles = MatvecTiles(**products["tiles"])
    kernels.attention_tiles = AttentionTiles(**attention["tiles"])
    try:
        yield {"products": products["tiles"], "attention": attention["tiles"]}
    finally:
        kernels.matvec_tiles, kernels.attention_tiles = kept


def _products(decoder: Decoder) -> list[dict[str, Any]]:
    layers, eps, dim = decoder.layers, decoder.eps, decoder.shape.dim
    x, wide = (torch.randn(1, n, device="cuda", dtype=decoder.dtype) for n in (dim, decoder.shape.ffn_dim))
    own: dict[str, Callable[[], object]] = {
        "qkv": lambda: [kernels.normed_product(x, layer.attention_norm, layer.qkv, eps) for layer in layers],
        "wo": lambda: [kernels.added_product(x, layer.wo, x) for layer in layers],
        "gate_up": lambda: [kernels.gated_product(x, layer.ffn_norm, layer.gate_up, eps) for layer in layers],
        "down": lambda: [kernels.added_product(wide, layer.down, x) for layer in layers],
    }
    cublas: dict[str, Callable[[], object]] = {
        "qkv": lambda: [F.linear(x, layer.qkv) for layer in layers],
        "wo": lambda: [F.linear(x, layer.wo) for layer in layers],
        "gate_up": lambda: [F.linear(x, layer.gate_up) for layer in layers],
        "down": lambda: [F.linear(wide, layer.down) for layer in layers],
    }
    nbytes = {name: sum(getattr(layer, name).nbytes for layer in layers) for name in own}

    def rates(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
        taken = {name: graph_seconds(run) for name, run in runs.items()}
        each = {name: nbytes[name] / taken[name] / 1e12 for name in runs}
        return each | {"all": sum(nbytes.values()) / sum(taken.values()) / 1e12}

    results: list[dict[str, Any]] = [{"tiles": "cuBLAS", **rates(cublas)}]
    kept = kernels.matvec_tiles
    for tiles in MATVEC:
        kernels.matvec_tiles = tiles
        results.append({"tiles": asdict(tiles), **rates(own)})
    kernels.matvec_tiles = kept
    return _said("products, TB/s", results)


def _attention(decoder: Decoder, context: int) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = [{"tiles": "fa3"}, *({"tiles": asdict(tiles)} for tiles in ATTENTION)]
    kept = kernels.attention_tiles
    for case, (prompts, samples, layers) in CASES.items():
        shape = replace(decoder.shape, n_layers=layers)
        cache = Cache.empty(shape, [context] * prompts, samples, 256, decoder.device, decoder.dtype)
        q = torch.randn(prompts * samples, shape.n_heads, shape.head_dim, device="cuda", dtype=decoder.dtype)
        for result, tiles in zip(results, (None, *ATTENTION), strict=True):
            kernels.attention_tiles = tiles or kept
            try:
                result[case] = _attention_rate(q, cache, kernels.attend if tiles else flash3.attend)
            except Exception as problem:  # also what compilers raise
                print(f"{result['tiles']}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
        del cache
    kernels.attention_tiles = kept
    return _said("attention, TB/s", results)


def _attention_rate(q: torch.Tensor, cache: Cache, attend: Callable[..., object]) -> float:
    """TB/s of the prompts' keys and values."""
    nbytes = sum(layer.prompt_k.nbytes + layer.prompt_v.nbytes for layer in cache.layers)
    return nbytes / graph_seconds(lambda: [attend(q, layer, cache) for layer in cache.layers]) / 1e12


def _said(title: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    print(f"\n{title}")
    for result in results:
        rates = ", ".join(f"{name} {rate:.2f}" for name, rate in result.items() if name != "tiles")
        print(f"  {rates}: {result['tiles']}", flush=True)
    return results
