"""What only a GPU can show: its attention kernels, and long sequences."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.processes import train
from torchtitan.config import load_config
from torchtitan.distributed.degrees import Degrees
from torchtitan.distributed.offload import OffloadedBlock
from torchtitan.distributed.parallelize import build_model, init_weights
from torchtitan.distributed.world import World, build_mesh, init_world
from torchtitan.models.llama.attention import BACKENDS, Documents, choose_attention
from torchtitan.models.llama.model import token_losses
from torchtitan.models.llama.shape import FLAVORS
from torchtitan.optimizer import build_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

HEADS = sorted({(shape.n_heads, shape.n_kv_heads, shape.head_dim) for shape in FLAVORS.values()})


KEEP = "--activation_checkpoint."
SMALL = ["--training.dataset", "synthetic", "--training.seq_len", "8192", "--training.compile"]
SMALL += ["--model.flavor", "870M", "--model.n_layers", "6"]
ATTENTION = [f"{KEEP}mode", "attention"]
RECOMPUTES = {
    "full": [f"{KEEP}mode", "full"],
    "attention": ATTENTION,
    "all": [*ATTENTION, f"{KEEP}projections_layers", "6", f"{KEEP}gate_up_layers", "6"],
}


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


def losses_and_gradients(argv: list[str], world: World) -> list[torch.Tensor]:
    """Of four steps of a small compiled model on random tokens."""
    config = load_config([*SMALL, *argv])
    model = build_model(config, build_mesh(Degrees.of(config.training, 1), world.device), world.device)
    init_weights(model, world.device, seed=0)
    optimizer = build_optimizer(model, config.optimizer)
    found = []
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(256, (1, config.training.seq_len + 1), generator=generator).to(world.device)
        loss = token_losses(model(tokens[:, :-1]), tokens[:, 1:]).mean()
        loss.backward()
        found += [
            loss.detach(),
            *(p.grad.to_local().clone() for p in model.parameters() if isinstance(p.grad, DTensor)),
        ]
        optimizer.step()
        optimizer.zero_grad()
    first = model.layers[0]
    if config.activation_checkpoint.offload_layers:
        assert isinstance(first, OffloadedBlock)
        assert first.offload.memory.allocated > 0
    return found


def test_offloading_changes_no_bit_and_recomputation_only_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    requires("fa3")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    world = init_world(60)
    try:
        plain = losses_and_gradients([f"{KEEP}mode", "none"], world)
        for argv in RECOMPUTES.values():
            here = losses_and_gradients(argv, world)
            there = losses_and_gradients([*argv, f"{KEEP}offload_layers", "5"], world)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(there, here, strict=True)), argv
            # Compiled, other tensors are rounded to bf16 on their way; the first step has the same weights.
            for ours, theirs in zip(here[: len(here) // 4], plain, strict=False):
                assert relative_error(ours, theirs.float()) < 2e-2, argv
    finally:
        torch.use_deterministic_algorithms(False)
        torch.distributed.destroy_process_group()


def test_float8_learns_as_bfloat16_does(tmp_path: Path) -> None:
    """Mean loss of the last 50 of 200 steps at 8,192 tokens."""
    pytest.importorskip("torchao")
    reached = {}
    for float8 in ("false", "true"):
        train(
            *("--model.flavor", "250M", "--training.dataset", "synthetic", "--training.synthetic_kind", "poisson"),
            *("--training.seq_len", "8192", "--training.batch_size", "2", "--training.compile"),
            *("--training.steps", "200", "--training.warmup_steps", "20", "--metrics.log_freq", "1"),
            *("--checkpoint.enable_checkpoint", "false", "--metrics.enable_tensorboard", "false"),
            *("--float8.enable_float8_linear", float8, "--job.dump_folder", str(tmp_path / float8)),
            CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
        )
        lines = (tmp_path / float8 / "metrics.jsonl").read_text().splitlines()
        reached[float8] = sum(json.loads(line)["loss"] for line in lines[-50:]) / 50
    print(f"mean loss of the last 50 steps: {reached}")
    assert reached["true"] == pytest.approx(reached["false"], rel=0.01)
