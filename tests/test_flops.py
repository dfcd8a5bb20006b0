"""FLOPs against the design's figures and a count of single operations."""

import pytest

from torchtitan.flops import peak_flops, training_flops
from torchtitan.models.llama.shape import FLAVORS


def test_8b_at_131072_tokens_takes_145_gflop_a_token() -> None:
    length = 131_072
    a_token = training_flops(FLAVORS["8B"], [length]) / length
    assert a_token == pytest.approx(145.0e9, rel=1e-3)
    assert a_token - 6 * 6.98e9 == pytest.approx(103.1e9, rel=1e-3)


def test_documents_pay_attention_only_to_themselves() -> None:
    shape = FLAVORS["250M"]
    whole, halves = training_flops(shape, [4096]), training_flops(shape, [2048, 2048])
    attention = 6 * shape.n_layers * shape.dim * 4096 * 4096
    assert whole - halves == attention // 2


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GB200", 2500e12),
    ],
)
def test_known_gpus(name: str, peak: float) -> None:
    assert peak_flops(name) == peak


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090", "NVIDIA H100 PCIe", "NVIDIA H200 NVL"])
def test_other_gpus_have_no_peak(name: str) -> None:
    assert peak_flops(name) is None
