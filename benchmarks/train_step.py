"""Times the trainer's own steps, beside the sum of the kernels that they cannot do without.

    torchrun --nproc_per_node 4 benchmarks/train_step.py --json RESULT.json -- \
        --job.config_file train_configs/primate_8b_131k.toml --training.dataset_path RECORDINGS

What stands behind `--` is train.py's. One step in RESULT.json's `steps` is one optimizer step of all GPUs.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# As in train.py, and before torch reads it.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.card import CardReadings
from benchmarks.command import recorded
from benchmarks.kernel_families import profile_step
from benchmarks.kernels import kernel_seconds
from torchtitan.config import ConfigError, JobConfig, load_config
from torchtitan.data.loader import Batch
from torchtitan.distributed.degrees import check_degrees
from torchtitan.distributed.offload import OffloadedBlock
from torchtitan.distributed.world import init_world
from torchtitan.flops import FORMULA, peak_flops, training_flops
from torchtitan.logging import init_logger, logger
from torchtitan.models.llama.attention import Documents
from torchtitan.models.llama.shape import check_shape
from torchtitan.plan.check import check_recompute
from torchtitan.plan.choose import DEVICE_SHARE
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
    arguments = parser.parse_args(ours)
    if arguments.document_lengths:
        theirs += ["--training.document_mask", "true"]
    if arguments.memory_cap_gib:
        # As on a GPU that has no more: what `auto` leaves there it leaves here.
        theirs += ["--activation_checkpoint.device_memory_gib", str(DEVICE_SHARE * arguments.memory_cap_gib)]
    return arguments, theirs


def configure(argv: list[str], folder: str, lengths: list[int] | None) -> JobConfig:
    """The configuration, with nothing to be written but the result; exits with 2 where it is wrong."""
    quiet = ["--checkpoint.enable_checkpoint", "false", "--checkpoint.model_weights_only", "false"]
    quiet += ["--validation.enable", "false"]
    try:
        config = load_config(
            [*argv, *quiet, "--job.dump_folder", folder], [check_shape, check_degrees, check_recompute]
        )
    except ConfigError as error:
        logger.error(f"error: {error}")
        sys.exit(2)
    if config.training.document_mask and sum(lengths or []) != config.training.seq_len:
        logger.error("error: with documents, --document-lengths must add up to training.seq_len")
        sys.exit(2)
    return config


def starts_of(lengths: list[int], sequences: int) -> torch.Tensor:
    """Where documents of these lengths begin, in that many sequences of them, int32."""
    within = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat([within[:-1] + i * int(within[-1]) for i in range(sequences)]).int()


def known(package: str) -> bool:
    """Whether a package of that name is installed."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


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
        starts = starts_of(arguments.document_lengths, training.batch_size)
        batches = (batch._replace(documents=starts) for batch in batches)

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
        "losses": [float(loss) for loss in losses],
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
    with tempfile.TemporaryDirectory() as folder:
        config = configure(argv, folder, arguments.document_lengths)
        world = init_world(config.comm.init_timeout_seconds)
        if arguments.memory_cap_gib:
            total = torch.cuda.get_device_properties(world.device).total_memory
            torch.cuda.set_per_process_memory_fraction(arguments.memory_cap_gib * GIB / total)
        trainer = Trainer(config, world)
        measured = measure(trainer, arguments)
        trainer.end("finished")

    training, shape, recompute = config.training, trainer.model.shape, trainer.config.activation_checkpoint
    lengths = arguments.document_lengths or [training.seq_len]
    passes = trainer.degrees.accumulation_steps
    tokens = training.batch_size * training.seq_len * passes
    attention, documents = trainer.model.attention, None
    if training.document_mask:
        starts = starts_of(lengths, training.batch_size)
        documents = Documents.from_starts(starts, training.batch_size * training.seq_len, world.device)
    # The model's memory is needed for the kernels' operands.
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    kernels = None
    if not arguments.no_kernels:
        kernels = kernel_seconds(attention, shape, training.batch_size, training.seq_len, documents)
    kernel_sum = passes * sum(kernels.values()) if kernels else None
    reference = REFERENCE_SECONDS.get((config.model.flavor, training.seq_len))
    if reference is not None:
        reference *= shape.n_layers * training.batch_size * passes
    if arguments.document_lengths:
        reference = None
    flops = training_flops(shape, lengths * training.batch_size * passes)
    step_seconds = measured["step_seconds"]
    peak = peak_flops(torch.cuda.get_device_name())
    result = {
        "command": recorded(["torchrun", "--nproc_per_node", str(world.size), *sys.argv], arguments.json),
        "flavor": config.model.flavor,
        "n_layers": shape.n_layers,
        "seq_len": training.seq_len,
        "batch_size": training.batch_size,
        "accumulation_steps": passes,
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
        "versions": {
            name: version(name) for name in ("torch", "torchao", "triton", "flash-attn-3", "flash_attn") if known(name)
        },
        "cuda": torch.version.cuda,
        "environment": {key: value for key, value in os.environ.items() if key.startswith("NCCL_")},
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
