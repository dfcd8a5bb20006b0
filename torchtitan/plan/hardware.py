"""What the GPUs can hold and do: rates that kernels reach on an H200, and estimates for the others."""

from dataclasses import dataclass, replace

from torchtitan.flops import known_gpu

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One GPU with its share of the node. FLOP/s and bytes/s.

    Attributes:
        memory_gib: what CUDA reports as its memory.
        products, products_float8: FLOP/s of the matrix products of a block, in bf16 and in float8.
        float32: FLOP/s of everything in fp32, by the datasheet.
        attention_forward, attention_backward: FLOP/s of causal attention on long sequences.
        memory_bandwidth: of fused elementwise kernels, bytes read and written.
        host_bandwidth: of copies to or from page-locked host memory, one way.
        link_bandwidth: of collectives among the GPUs of a node (NCCL's bus bandwidth).
        network_bandwidth: the same between nodes, a GPU's share.
        host_memory_gib: host memory, a GPU's share.
    """

    memory_gib: float
    products: float
    products_float8: float
    float32: float
    attention_forward: float
    attention_backward: float
    memory_bandwidth: float
    host_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    host_memory_gib: float


H200 = GPU(
    memory_gib=139.8,
    products=680 * TERA,
    products_float8=1040 * TERA,
    float32=60 * TERA,
    attention_forward=690 * TERA,
    attention_backward=622 * TERA,
    memory_bandwidth=4.0 * TERA,
    host_bandwidth=52 * GIGA,
    link_bandwidth=330 * GIGA,
    network_bandwidth=40 * GIGA,
    host_memory_gib=128,
)
"""Products and attention by the kernel sums of `benchmarks/train_step.py`; float8 and memory bandwidth fitted to its
step times; copies, link, network, fp32 and host memory are expectations that no result here has tested."""

GPUS = {
    "H200": H200,
    "H100": replace(H200, memory_gib=79.1, memory_bandwidth=2.8 * TERA),
    # The same processor; until measured on one: HBM3 of 4 TB/s, and a link to the Grace CPU of 450 GB/s each way.
    "GH200": replace(
        H200, memory_gib=94.5, memory_bandwidth=3.3 * TERA, host_bandwidth=300 * GIGA, host_memory_gib=120
    ),
}
"""By the name that `--gpu` takes and that is part of what CUDA calls them."""


def find_gpu(device_name: str) -> GPU | None:
    """The GPU by the name that CUDA gives it; None where it is not known."""
    name = known_gpu(device_name, GPUS)
    return None if name is None else GPUS[name]
