"""The kernels that a training step cannot do without, timed alone at its shapes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from torchtitan.models.llama.attention import Attention, Documents
from torchtitan.models.llama.shape import ModelShape


def seconds(run: Callable[[], object], *, repeats: int = 5) -> float:
    """Median time of a run on the device, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2]


def product_seconds(rows: int, inner: int, columns: int) -> float:
    """The three products of a linear layer in bf16: forward pass, gradient of the input, gradient of the weight."""
    x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(columns, inner, device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    return sum(seconds(run) for run in (lambda: x @ weight.T, lambda: upstream @ weight, lambda: upstream.T @ x))


def attention_seconds(
    attention: Attention, shape: ModelShape, sequences: int, length: int, documents: Documents | None
) -> tuple[float, float]:
    """Forward and backward pass of one layer's attention."""
    q, k, v = (
        torch.randn(sequences, length, n, shape.head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
    )
    forward = seconds(lambda: attention(q, k, v, documents))
    out = attention(q, k, v, documents)
    upstream = torch.randn_like(out)
    return forward, seconds(lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True))


def swiglu_seconds(rows: int, width: int) -> float:
    """Forward and backward pass of the compiled activation between the feed-forward layer's products."""
    gate, up = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    swiglu = torch.compile(lambda gate, up: F.silu(gate) * up)
    forward = seconds(lambda: swiglu(gate, up))
    out = swiglu(gate, up)
    upstream = torch.randn_like(out)
    return forward + seconds(lambda: torch.autograd.grad(out, (gate, up), upstream, retain_graph=True))


def kernel_seconds(
    attention: Attention, shape: ModelShape, sequences: int, length: int, documents: Documents | None
) -> dict[str, float]:
    """Seconds of a step's attention, matrix products and activations, in all layers, nothing being recomputed."""
    rows, kv_dim = sequences * length, shape.n_kv_heads * shape.head_dim
    times: dict[str, float] = {}
    forward, backward = attention_seconds(attention, shape, sequences, length, documents)
    times["attention_forward"], times["attention_backward"] = forward * shape.n_layers, backward * shape.n_layers
    linear = [(shape.dim, shape.dim, 2), (shape.dim, kv_dim, 2), (shape.dim, shape.ffn_dim, 2)]
    products = sum(count * product_seconds(rows, inner, columns) for inner, columns, count in linear)
    products += product_seconds(rows, shape.ffn_dim, shape.dim)
    times["products"] = products * shape.n_layers + product_seconds(rows, shape.dim, shape.vocab_size)
    times["swiglu"] = swiglu_seconds(rows, shape.ffn_dim) * shape.n_layers
    torch.cuda.empty_cache()
    return times
