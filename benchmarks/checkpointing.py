"""How long training stands still for a checkpoint, how long a restart and a verification take, what checksums cost.

    torchrun --nproc_per_node 2 benchmarks/checkpointing.py --folder FOLDER [--json FILE] [--table.key value …]

The keys are those of train.py: `--model.flavor 8B` on eight GPUs, `250M` (1 GB of weights, 3 GB with the optimizer's
state) on CPU processes by default. Weights and moments are random, the files are written to a disk and synced. Reading
finds what it can in the page cache, as a restart on the same node does; empty it before to measure the disk.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchtitan.checkpoint import writer
from torchtitan.checkpoint.checkpointer import Checkpointer
from torchtitan.checkpoint.verify import damage_of
from torchtitan.config import JobConfig, load_config
from torchtitan.distributed.degrees import Degrees
from torchtitan.distributed.parallelize import build_model, init_weights
from torchtitan.distributed.world import World, build_mesh, init_world
from torchtitan.optimizer import build_optimizer

DEFAULTS = ["--training.dataset", "synthetic", "--training.seq_len", "128", "--model.flavor", "250M"]
ROUNDS = 5


def seconds(action: Callable[[], Any]) -> float:
    """How long it takes on the slowest rank."""
    dist.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed = torch.tensor(time.perf_counter() - started)
    dist.all_reduce(elapsed, dist.ReduceOp.MAX)
    return float(elapsed)


def raw_write(folder: Path, size: int, rank: int) -> None:
    """Writes and syncs that many bytes, as fast as the system takes them."""
    path, block = folder / f"raw-{rank}", os.urandom(1 << 24)
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    path.unlink()


class Bench:
    """A model with its optimizer, and the times of what is done with its checkpoints."""

    def __init__(self, config: JobConfig, world: World) -> None:
        mesh = build_mesh(Degrees.of(config.training, world.size), world.device)
        self.world, self.model = world, build_model(config, mesh, world.device)
        init_weights(self.model, world.device, 0)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.step = 0
        self.times: dict[str, list[float]] = {}

    def note(self, name: str, action: Callable[[], Any]) -> None:
        self.times.setdefault(name, []).append(seconds(action))

    def save(self, checkpointer: Checkpointer, name: str) -> Path:
        """One save, and what of it goes on behind the training; returns its folder."""
        self.step += 1
        self.note(f"{name}: training stands still", lambda: checkpointer.save(self.step, {}, self.optimizer))
        self.note(f"{name}: until it is committed", checkpointer.wait)
        return checkpointer.root / f"step-{self.step}"

    def read(self, checkpointer: Checkpointer, folder: Path) -> None:
        """Verifies and loads the newest checkpoint, which lies there."""
        found = checkpointer.find()
        assert found is not None
        self.note("verification (one process)", lambda: self.world.rank == 0 and damage_of(folder))
        self.note("load", lambda: checkpointer.load(found, self.optimizer))


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    given, rest = parser.parse_known_args()
    # A folder of its own, which can be removed.
    written = given.folder / "checkpointing"
    argv = [*DEFAULTS, *rest, "--job.dump_folder", str(written), "--checkpoint.keep_latest_k", "1"]
    world = init_world(1800)
    bench = Bench(load_config(argv), world)
    modes = ["disabled", "async"] + ["async_with_pinned_mem"] * torch.cuda.is_available()
    checkpointers = {
        mode: Checkpointer(load_config([*argv, "--checkpoint.async_mode", mode]), bench.model) for mode in modes
    }
    plain = checkpointers["disabled"]
    folder = bench.save(plain, "warm-up")
    size = sum(file.stat().st_size for file in folder.iterdir())
    zlib = writer.zlib
    for _ in range(ROUNDS):
        bench.note("raw write", lambda: raw_write(written, size // world.size, world.rank))
        for mode, checkpointer in checkpointers.items():
            bench.save(checkpointer, mode)
        writer.zlib = SimpleNamespace(crc32=lambda data, value=0: 0)  # type: ignore[assignment]
        bench.save(plain, "disabled, without checksums")
        writer.zlib = zlib
        bench.read(plain, bench.save(plain, "disabled, before reading"))
    dist.destroy_process_group()
    if world.rank == 0:
        shutil.rmtree(written)
        report(bench, size, given.json)


def report(bench: Bench, size: int, path: Path | None) -> None:
    """Prints the medians, and writes all times."""
    rows = []
    for name, times in bench.times.items():
        if name.startswith(("warm-up", "disabled, before")) or max(times) < 0.01:
            continue
        median = statistics.median(times)
        rows.append((name, f"{median:.2f}", f"{min(times):.2f}-{max(times):.2f}", f"{size / median / 1e9:.2f}"))
    print(tabulate(rows, headers=("what", "s, median", "s, range", "GB/s"), tablefmt="github", disable_numparse=True))
    device = torch.cuda.get_device_name() if bench.world.device.type == "cuda" else "CPU"
    print(f"{size / 1e9:.2f} GB, {bench.world.size} processes, {device}, torch {torch.__version__}")
    if path is not None:
        content = {"bytes": size, "processes": bench.world.size, "device": device, "torch": torch.__version__}
        path.write_text(json.dumps({**content, "seconds": bench.times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
