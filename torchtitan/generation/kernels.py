"""What a token passes on its way through a block, as Triton kernels for GPUs; none of them waits for the host.

A token reads every weight and every key and value once, and does little with them: these kernels are made to read.
The functions are those of `operations.py`; importing this needs triton, which PyTorch's CUDA builds bring along.
"""

# Kernels are compiled, not called: their arguments have no types for Python, and their launch is an index.
# ruff: noqa: ANN001, ANN202
# pyright: reportMissingImports=false, reportIndexIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from torchtitan.generation import operations
from torchtitan.generation.cache import Cache, LayerCache


@dataclass(frozen=True)
class MatvecTiles:
    """How a product of a matrix and one vector is cut up.

    Attributes:
        rows, columns: of the weight that a program reads at a time.
        warps: of a program.
        stages: pieces that are on their way at a time; 1 leaves it to the registers.
    """

    rows: int = 8
    columns: int = 512
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class AttentionTiles:
    """How the attention of a token is cut up.

    Attributes:
        tokens: of the cache that a program reads at a time.
        warps, stages: of a program, and pieces that are on their way at a time.
        programs: for each multiprocessor: into so many parts the cache is split.
    """

    tokens: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 2


matvec_tiles, attention_tiles = MatvecTiles(), AttentionTiles()
"""What is used; `benchmarks/generation.py --sweep` tries others."""

SHORTEST_SPLIT = 256
"""Tokens: less is not worth a program."""
MULTIPROCESSORS_OFF_GPU = 8
"""What the interpreter takes for the number of multiprocessors."""


@triton.jit
def _matvec_kernel(
    x,
    norm,
    weight,
    residual,
    out,
    eps,
    rows,
    columns: tl.constexpr,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A vector of `rows` products; see `Operations`. `weight`: [rows or, gated, 2 · rows, columns]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    start = row.to(tl.int64) * columns
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(0, columns, COLUMNS, num_stages=STAGES):
        column = first + tl.arange(0, COLUMNS)
        in_columns = column < columns
        inside = in_rows[:, None] & in_columns[None, :]
        vector = tl.load(x + column, mask=in_columns, other=0.0).to(tl.float32)
        if NORMED:
            squares += vector * vector
            vector *= tl.load(norm + column, mask=in_columns, other=0.0).to(tl.float32)
        place = weight + start[:, None] + column[None, :]
        gate += tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32) * vector[None, :]
        if GATED:
            place += rows.to(tl.int64) * columns
            up += tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32) * vector[None, :]
    product = tl.sum(gate, axis=1)
    scale = 1.0
    if NORMED:
        # The norm divides all of the vector by one number, which may as well be done to what comes of it.
        scale = tl.rsqrt(tl.sum(squares, axis=0) / columns + eps)
        product *= scale
    if GATED:
        product = product * tl.sigmoid(product) * (tl.sum(up, axis=1) * scale)
    if ADDED:
        product += tl.load(residual + row, mask=in_rows, other=0.0).to(tl.float32)
    tl.store(out + row, product.to(out.dtype.element_ty), mask=in_rows)


@triton.jit
def _append_kernel(
    qkv,
    rope,
    q,
    own_k,
    own_v,
    step,
    capacity,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program for a sequence's head: rotates a query or key, and puts it, or a value, where it belongs."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half = tl.arange(0, WIDTH // 2)
    inside = half < D // 2
    place = qkv + (sequence * (heads + 2 * kv_heads) + head) * D + 2 * half
    even, odd = tl.load(place, mask=inside), tl.load(place + 1, mask=inside)
    if head < heads + kv_heads:
        cos = tl.load(rope + sequence * D + half, mask=inside)
        sin = tl.load(rope + sequence * D + D // 2 + half, mask=inside)
        e, o = even.to(tl.float32), odd.to(tl.float32)
        even, odd = (e * cos - o * sin).to(even.dtype), (e * sin + o * cos).to(odd.dtype)
    if head < heads:
        out = q + (sequence * heads + head) * D + 2 * half
    else:
        kv_head = (head - heads) % kv_heads
        offset = ((sequence * kv_heads + kv_head) * capacity + tl.load(step)) * D + 2 * half
        out = own_k + offset
        if head >= heads + kv_heads:
            out = own_v + offset
    tl.store(out, even, mask=inside)
    tl.store(out + 1, odd, mask=inside)


@triton.jit
def _attend_kernel(
    q,
    k,
    v,
    lengths,
    outs,
    sums,
    scale,
    capacity,
    samples,
    first_split,
    all_splits,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A part of the tokens of a cache's head, for all queries that look at it: a group of each of `samples` sequences.

    Writes what it has seen, divided by the sum of the weights, and the logarithm (base 2) of that sum.
    """
    shared: tl.constexpr = heads // kv_heads
    cache = tl.program_id(0) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    split = tl.program_id(1)
    query = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    is_query = query < samples * shared
    row = (cache * samples + query // shared) * heads + kv_head * shared + query % shared
    channel = tl.arange(0, WIDTH)
    is_channel = channel < D
    is_out = is_query[:, None] & is_channel[None, :]
    q_QD = tl.load(q + row[:, None] * D + channel[None, :], mask=is_out, other=0.0)

    length = tl.load(lengths + cache)
    tokens = tl.cdiv(tl.cdiv(length, tl.num_programs(1)), TOKENS) * TOKENS
    begin = split * tokens
    end = tl.minimum(begin + tokens, length)
    start = (cache.to(tl.int64) * kv_heads + kv_head) * capacity * D
    most = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    seen = tl.zeros([QUERIES, WIDTH], tl.float32)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        is_token = token < end
        is_key = is_channel[:, None] & is_token[None, :]
        k_DT = tl.load(k + start + token[None, :] * D + channel[:, None], mask=is_key, other=0.0)
        scores = tl.dot(q_QD, k_DT, input_precision="ieee") * scale
        scores = tl.where(is_token[None, :], scores, -float("inf"))
        new_most = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_most[:, None])
        shrink = tl.exp2(most - new_most)
        total = total * shrink + tl.sum(weights, axis=1)
        is_value = is_token[:, None] & is_channel[None, :]
        v_TD = tl.load(v + start + token[:, None] * D + channel[None, :], mask=is_value, other=0.0)
        seen = seen * shrink[:, None] + tl.dot(weights.to(v_TD.dtype), v_TD, input_precision="ieee")
        most = new_most

    # A part behind the last token has seen nothing: zeros, and the logarithm of zero.
    some = total > 0
    seen = seen / tl.where(some, total, 1.0)[:, None]
    out = row.to(tl.int64) * all_splits + first_split + split
    tl.store(sums + out, tl.where(some, most + tl.log2(total), -float("inf")), mask=is_query)
    tl.store(outs + out[:, None] * D + channel[None, :], seen, mask=is_out)


@triton.jit
def _combine_kernel(outs, sums, out, all_splits, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """One query's parts, weighed by their sums."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    is_channel = channel < D
    most = -float("inf")
    for first in range(0, all_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        logarithm = tl.load(sums + row * all_splits + split, mask=split < all_splits, other=-float("inf"))
        most = tl.maximum(most, tl.max(logarithm, axis=0))
    total = 0.0
    seen = tl.zeros([WIDTH], tl.float32)
    for first in range(0, all_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = split < all_splits
        logarithm = tl.load(sums + row * all_splits + split, mask=inside, other=-float("inf"))
        weight = tl.exp2(logarithm - most)
        place = outs + (row * all_splits + split)[:, None] * D + channel[None, :]
        part = tl.load(place, mask=inside[:, None] & is_channel[None, :], other=0.0)
        seen += tl.sum(weight[:, None] * part, axis=0)
        total += tl.sum(weight, axis=0)
    tl.store(out + row * D + channel, (seen / total).to(out.dtype.element_ty), mask=is_channel)


def normed_product(x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `Operations`; for one sequence."""
    return _matvec(x, weight, weight.shape[0], norm=norm, eps=eps)


def gated_product(x: torch.Tensor, norm: torch.Tensor, gate_up: torch.Tensor, eps: float) -> torch.Tensor:
    """See `Operations`; for one sequence."""
    return _matvec(x, gate_up, gate_up.shape[0] // 2, norm=norm, eps=eps, gated=True)


def added_product(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """See `Operations`; for one sequence."""
    return _matvec(x, weight, weight.shape[0], residual=residual)


def append(qkv: torch.Tensor, rope: torch.Tensor, layer: LayerCache, cache: Cache) -> torch.Tensor:
    """See `Operations`."""
    sequences, kv_heads, capacity, head_dim = layer.own_k.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q = qkv.new_empty(sequences, heads, head_dim)
    grid = (sequences, heads + 2 * kv_heads)
    _append_kernel[grid](
        qkv, rope, q, layer.own_k, layer.own_v, cache.step, capacity, heads, kv_heads, head_dim, _width(head_dim),
        num_warps=1,
    )  # fmt: skip
    return q


def attend(q: torch.Tensor, layer: LayerCache, cache: Cache) -> torch.Tensor:
    """See `Operations`. The parts of all caches are read side by side, and then put together.

    After Dao et al., Flash-Decoding for long-context inference (2023).
    """
    sequences, heads, head_dim = q.shape
    assert q.is_contiguous()
    prompts, kv_heads, longest, _ = layer.prompt_k.shape
    own_longest, shared = layer.own_k.shape[2], heads // kv_heads
    grouped = cache.samples * shared
    # In float32 there are no tensor cores, and the registers hold no more.
    most = 64 if q.dtype != torch.float32 else 16
    queries = min(most, max(16, triton.next_power_of_2(grouped)))
    blocks = triton.cdiv(grouped, queries)
    splits = _splits(q.device, longest, prompts * kv_heads * blocks)
    own_splits = _splits(q.device, own_longest, sequences * kv_heads)
    outs = q.new_empty(sequences, heads, splits + own_splits, head_dim, dtype=torch.float32)
    sums = outs.new_empty(outs.shape[:-1])
    scale = head_dim**-0.5 * 1.4426950408889634  # exp(x) is exp2(x · log2(e))

    tiles = attention_tiles
    settings = {"TOKENS": tiles.tokens, "num_warps": tiles.warps, "num_stages": tiles.stages}
    shape = {"heads": heads, "kv_heads": kv_heads, "D": head_dim, "WIDTH": _width(head_dim)}
    _attend_kernel[(prompts * kv_heads, splits, blocks)](
        q, layer.prompt_k, layer.prompt_v, cache.prompt_lengths, outs, sums, scale,
        longest, cache.samples, 0, splits + own_splits, **shape, QUERIES=queries, **settings,
    )  # fmt: skip
    _attend_kernel[(sequences * kv_heads, own_splits, triton.cdiv(shared, 16))](
        q, layer.own_k, layer.own_v, cache.own_lengths, outs, sums, scale,
        own_longest, 1, splits, splits + own_splits, **shape, QUERIES=16, **settings,
    )  # fmt: skip
    out = torch.empty_like(q)
    _combine_kernel[(sequences * heads,)](outs, sums, out, splits + own_splits, head_dim, _width(head_dim), 16)
    return out.flatten(1)


def operations_for(sequences: int) -> operations.Operations:
    """The fastest for that many sequences: for several at a time, the products of cuBLAS."""
    if sequences == 1:
        return operations.Operations(normed_product, gated_product, added_product, append, attend)
    return operations.Operations(
        operations.normed_product, operations.gated_product, operations.added_product, append, attend
    )


def _matvec(
    x: torch.Tensor,
    weight: torch.Tensor,
    rows: int,
    *,
    norm: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> torch.Tensor:
    assert x.shape[0] == 1, "a product of a matrix and several vectors is not this kernel's"
    out, tiles = x.new_empty(1, rows), matvec_tiles
    _matvec_kernel[(triton.cdiv(rows, tiles.rows),)](
        x, norm, weight, residual, out, eps, rows, weight.shape[1],
        norm is not None, gated, residual is not None, tiles.rows, tiles.columns, tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return out


def _width(head_dim: int) -> int:
    """Channels that a program handles: powers of two, and no fewer than the tensor cores take."""
    return max(16, triton.next_power_of_2(head_dim))


def _splits(device: torch.device, longest: int, programs: int) -> int:
    """Into how many parts to split that many tokens, where each part takes that many programs."""
    multiprocessors = MULTIPROCESSORS_OFF_GPU
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = attention_tiles.programs * multiprocessors // programs
    return max(1, min(wanted, triton.cdiv(longest, SHORTEST_SPLIT)))
