"""Times the trainer's own steps, beside the sum of the kernels that they cannot do without.

    torchrun --nproc_per_node 4 benchmarks/train_step.py --json RESULT.json -- \
        --job.config_file train_configs/primate_8b_131k.toml --training.dataset_path RECORDINGS

What stands behind `--` is train.py's. One step in RESULT.json's `steps` is one optimizer step of all GPUs.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# As in train.py, and before torch reads it.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.kernel_families import profile_step
from benchmarks.kernels import kernel_seconds
from torchtitan.config import load_config
from torchtitan.data.loader import Batch
from torchtitan.distributed.offload import OffloadedBlock
from torchtitan.distributed.world import init_world
from torchtitan.flops import FORMULA, peak_flops, training_flops
from torchtitan.logging import init_logger, logger
from torchtitan.models.llama.attention import Documents
from torchtitan.trainer import Trainer

GIB = 2**30
REFERENCE_SECONDS = {("8B", 131_072): 33.4 / 32}
"""The kernels of a layer of that flavour and length, measured independently on an H200: a second opinion."""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--steps", type=int, default=3, help="steps to measure (default 3)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them (default 2)")
    parser.add_argument("--memory-cap-gib", type=float, help="GPU memory that PyTorch may take")
    parser.add_argument("--document-lengths", type=int, nargs="+", help="recordings of each window, in tokens")
    parser.add_argument("--no-kernels", action="store_true", help="leave out the kernel sum")
    parser.add_argument("--profile", action="store_true", help="also profile one more step, kernels by family")
    ours, theirs = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    return parser.parse_args(ours), theirs


class CardReadings:
    """Clock and power of this node's GPUs, read twice a second while the context is open."""

    def __enter__(self) -> "CardReadings":
        query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "500"]
        self.output = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(query, stdout=self.output, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        self.output.seek(0)
        rows = [line.split(",") for line in self.output if line.count(",") == 1]
        self.clock_mhz = statistics.median(float(row[0]) for row in rows) if rows else None
        self.power_watts = statistics.median(float(row[1]) for row in rows) if rows else None
        self.output.close()


def with_documents(batches: Iterator[Batch], lengths: list[int], sequences: int) -> Iterator[Batch]:
    """The batches, with recordings of these lengths in each sequence."""
    within = torch.tensor([0, *lengths]).cumsum(0)
    starts = torch.cat([within[:-1] + i * int(within[-1]) for i in range(sequences)]).int()
    for batch in batches:
        yield batch._replace(documents=starts)


def largest(value: float, device: torch.device) -> float:
    """Over all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def host_offload_gib(trainer: Trainer) -> float:
    """Page-locked memory of this process."""
    first = trainer.model.layers[0]
    return first.offload.memory.allocated / GIB if isinstance(first, OffloadedBlock) else 0.0


def measure(trainer: Trainer, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the steps and returns what was measured."""
    training, device = trainer.config.training, trainer.world.device
    batches: Iterator[Batch] = iter(trainer.loader())
    if arguments.document_lengths:
        batches = with_documents(batches, arguments.document_lengths, training.batch_size)

    def run(steps: int) -> tuple[list[float], list[torch.Tensor]]:
        times, losses = [], []
        for _ in range(steps):
            torch.cuda.synchronize()
            dist.barrier()
            start = time.perf_counter()
            trainer.step += 1
            losses.append(trainer.train_step(batches)[0])
            torch.cuda.synchronize()
            times.append(largest(time.perf_counter() - start, device))
            logger.info(f"step {trainer.step}: {times[-1]:.3f} s")
        return times, losses

    run(arguments.warm_up)
    torch.cuda.reset_peak_memory_stats()
    with CardReadings() as card:
        times, losses = run(arguments.steps)
    free, total = torch.cuda.mem_get_info()
    profiled = None
    if arguments.profile:
        profiled = profile_step(lambda: run(1))
    return {
        "steps": times,
        "step_seconds": statistics.mean(times),
        "losses": [largest(float(loss), device) * trainer.world.size for loss in losses],
        "peak_reserved_gib": largest(torch.cuda.max_memory_reserved() / GIB, device),
        "peak_allocated_gib": largest(torch.cuda.max_memory_allocated() / GIB, device),
        "device_used_gib": largest((total - free) / GIB, device),
        "host_offload_gib": host_offload_gib(trainer),
        "clock_mhz": card.clock_mhz,
        "power_watts": card.power_watts,
        "profile": profiled,
    }


def main() -> None:
    init_logger()
    arguments, argv = parse(sys.argv[1:])
    # Nothing is to be written but the result.
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--checkpoint.enable_checkpoint", "false", "--checkpoint.model_weights_only", "false"]
        config = load_config([*argv, *quiet, "--job.dump_folder", folder])
        world = init_world(config.comm.init_timeout_seconds)
        if arguments.memory_cap_gib:
            total = torch.cuda.get_device_properties(world.device).total_memory
            torch.cuda.set_per_process_memory_fraction(arguments.memory_cap_gib * GIB / total)
        trainer = Trainer(config, world)
        measured = measure(trainer, arguments)

    training, shape, recompute = config.training, trainer.model.shape, trainer.config.activation_checkpoint
    lengths = arguments.document_lengths or [training.seq_len]
    tokens = training.batch_size * training.seq_len * trainer.degrees.accumulation_steps
    attention, documents = trainer.model.attention, None
    if training.document_mask:
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).int()
        documents = Documents.from_starts(starts, sum(lengths), world.device)
    # The model's memory is needed for the kernels' operands.
    del trainer
    torch.cuda.empty_cache()
    kernels = None
    if not arguments.no_kernels:
        kernels = kernel_seconds(attention, shape, training.batch_size, training.seq_len, documents)
    kernel_sum = sum(kernels.values()) if kernels else None
    reference = REFERENCE_SECONDS.get((config.model.flavor, training.seq_len))
    if reference is not None and not arguments.document_lengths:
        reference *= shape.n_layers * training.batch_size
    else:
        reference = None
    flops = training_flops(shape, lengths * training.batch_size)
    step_seconds = measured["step_seconds"]
    peak = peak_flops(torch.cuda.get_device_name())
    result = {
        "command": shlex.join(["torchrun", "--nproc_per_node", str(world.size), *sys.argv]),
        "flavor": config.model.flavor,
        "n_layers": shape.n_layers,
        "seq_len": training.seq_len,
        "batch_size": training.batch_size,
        "document_lengths": arguments.document_lengths,
        "float8": config.float8.recipe if config.float8.enable_float8_linear else None,
        "activation_checkpoint": recompute.model_dump(),
        "reshard_after_forward": training.reshard_after_forward,
        "deterministic": training.deterministic,
        "gpu": torch.cuda.get_device_name(),
        "num_gpus": world.size,
        "tokens_per_second_per_gpu": tokens / step_seconds,
        "mfu_causal": flops / step_seconds / peak if peak else None,
        "mfu_formula": FORMULA,
        "kernel_sum_seconds": kernel_sum,
        "kernel_sum_ratio": step_seconds / kernel_sum if kernel_sum else None,
        "kernel_seconds": kernels,
        "reference_kernel_sum_seconds": reference,
        "memory_cap_gib": arguments.memory_cap_gib,
        "attention": attention.backend.title,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **measured,
    }
    if world.rank == 0:
        logger.info(
            f"{result['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU, {step_seconds:.2f} s a step, MFU "
            f"{result['mfu_causal'] or 0:.1%}, {result['peak_reserved_gib']:.1f} GiB"
            + (f", {step_seconds / kernel_sum:.3f} of the kernels' {kernel_sum:.2f} s" if kernel_sum else "")
            + (f" (elsewhere {reference:.2f} s)" if kernel_sum and reference else "")
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
