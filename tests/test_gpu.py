"""What only a GPU can show: its attention kernels, and long sequences."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.processes import train
from torchtitan.models.llama.attention import BACKENDS, Documents, choose_attention
from torchtitan.models.llama.shape import FLAVORS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

HEADS = sorted({(shape.n_heads, shape.n_kv_heads, shape.head_dim) for shape in FLAVORS.values()})


def requires(name: str) -> None:
    """Skips where the kernels are not installed or not written for this GPU."""
    obstacle = BACKENDS[name].activate(torch.device("cuda"), torch.bfloat16)
    if obstacle is not None:
        pytest.skip(f"{BACKENDS[name].title}: {obstacle}")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def test_auto_takes_flash_attention_3_on_hopper() -> None:
    requires("fa3")
    assert choose_attention("auto", torch.device("cuda"), torch.bfloat16).backend is BACKENDS["fa3"]


@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", ["fa3", "fa4", "cudnn", "sdpa"])
def test_output_and_gradients_agree_with_float32(name: str, heads: tuple[int, int, int], documents: bool) -> None:
    requires(name)
    n_heads, n_kv_heads, head_dim = heads
    torch.manual_seed(0)
    q, k, v, upstream = (
        torch.randn(2, 1000, n, head_dim, device="cuda", dtype=torch.bfloat16)
        for n in (n_heads, n_kv_heads, n_kv_heads, n_heads)
    )
    packed = None
    if documents:
        starts = torch.tensor([0, 1, 300, 1000, 1700], dtype=torch.int32)
        packed = Documents.from_starts(starts, 2000, torch.device("cuda"))

    def output_and_gradients(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = choose_attention(backend, torch.device("cuda"), dtype)(*leaves, documents=packed)
        return [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    expected = output_and_gradients("sdpa", torch.float32)
    found = output_and_gradients(name, torch.bfloat16)
    for what, ours, theirs in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        # bf16 has 8 bits of mantissa: 4e-3 for a single rounding, and there are a few in a row.
        assert relative_error(ours, theirs) < 1e-2, what


@pytest.mark.parametrize("mask", ["false", "true"], ids=["whole", "documents"])
def test_250m_trains_at_131072_tokens(mask: str, tmp_path: Path) -> None:
    train(
        *("--model.flavor", "250M", "--training.dataset", "synthetic", "--training.seq_len", "131072"),
        *("--training.steps", "6", "--training.warmup_steps", "1", "--metrics.log_freq", "1"),
        *("--training.compile", "--activation_checkpoint.mode", "full", "--training.document_mask", mask),
        *("--job.dump_folder", str(tmp_path), "--metrics.enable_tensorboard", "false"),
        CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
    )
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 1
