"""How long training stands still for a checkpoint, what checksums cost, how long a restart and a verification take.

    torchrun --nproc_per_node 2 benchmarks/checkpointing.py --folder FOLDER [--json FILE] [--table.key value …]
    python benchmarks/checkpointing.py --restart 2 --folder FOLDER [--json FILE] [--table.key value …]

The keys are those of train.py: `250M` (1 GB of weights, 3 GB with the optimizer's state) on CPU processes by default.
The files are written to a disk and synced; never more than one checkpoint lies there. `--parts` and `--rounds` choose
what is measured, and the file is written after each part, as is a line on the screen. Reading finds what it can in the
page cache, as a restart on the same node does; with `--cold` the files are dropped from it before.

With `--restart` the time from the start of torchrun to the end of its first step, from a checkpoint, is measured.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchtitan.checkpoint import writer
from torchtitan.checkpoint.checkpointer import Checkpointer
from torchtitan.checkpoint.verify import damage_of
from torchtitan.config import load_config
from torchtitan.distributed.degrees import Degrees
from torchtitan.distributed.interrupts import Interrupts
from torchtitan.distributed.parallelize import build_model, init_weights
from torchtitan.distributed.world import World, build_mesh, init_world
from torchtitan.metrics import read_metrics
from torchtitan.optimizer import build_optimizer

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = ["--training.dataset", "synthetic", "--training.seq_len", "128", "--model.flavor", "250M"]
PARTS = ("write", "read", "sync", "checksums", "async", "pinned", "load", "verify", "agree")
"""Writing and reading alone; saves in the foreground, those with and without checksums, in the background; the rest."""
AGREEMENTS = 1000


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


def drop_from_cache(folder: Path) -> None:
    """Makes the next one read the files from the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def raw_read(folder: Path) -> None:
    """Reads all files of the folder, as fast as the system gives them."""
    block = bytearray(1 << 24)
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass


def verify(folder: Path) -> None:
    """Verifies a checkpoint, which has to be good."""
    damage = damage_of(folder)
    assert damage is None, damage


class NoChecksum:
    """Takes the place of a checksum, and sums up nothing."""

    def reset(self) -> None: ...

    def update(self, data: memoryview) -> None: ...

    def intdigest(self) -> int:
        return 0


class Bench:
    """A model with its optimizer, and the times of what is done with its checkpoints."""

    def __init__(self, argv: list[str], world: World, given: argparse.Namespace) -> None:
        config = load_config(argv)
        mesh = build_mesh(Degrees.of(config.training, world.size), world.device)
        self.argv, self.world, self.model = argv, world, build_model(config, mesh, world.device)
        init_weights(self.model, world.device, 0)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.rounds, self.cold, self.json = given.rounds, given.cold, given.json
        self.step = self.size = 0
        self.times: dict[str, list[float]] = {}

    def note(self, name: str, action: Callable[[], Any]) -> None:
        """Measures, prints, and keeps what has been measured up to here."""
        self.times.setdefault(name, []).append(seconds(action))
        if self.world.rank == 0:
            print(f"{name}: {self.times[name][-1]:.3f} s", flush=True)
            if self.json is not None:
                device = torch.cuda.get_device_name() if self.world.device.type == "cuda" else "CPU"
                facts = {"bytes": self.size, "processes": self.world.size, "device": device, "torch": torch.__version__}
                self.json.write_text(json.dumps({**facts, "seconds": self.times}, indent=1) + "\n")

    def checkpointer(self, mode: str) -> Checkpointer:
        return Checkpointer(load_config([*self.argv, "--checkpoint.async_mode", mode]), self.model)

    def save(self, checkpointer: Checkpointer, name: str) -> None:
        """One save, and what of it goes on behind the training."""
        dist.barrier()
        if self.world.rank == 0:  # the disk may have room for one alone
            shutil.rmtree(checkpointer.root, ignore_errors=True)
        self.step += 1
        self.note(f"{name}: training stands still", lambda: checkpointer.save(self.step, {}, self.optimizer))
        self.note(f"{name}: after that until it is committed", checkpointer.wait)
        self.folder = checkpointer.root / f"step-{self.step}"
        self.size = sum(file.stat().st_size for file in self.folder.iterdir())

    def save_in_the_foreground(self, checkpointer: Checkpointer, parts: list[str], turns_left: int) -> None:
        """With checksums, and without where that is to be compared; which goes first, by turns; with them at last."""
        both = (True, False) if "checksums" in parts else (True,)
        for checksums in both if turns_left % 2 else both[::-1]:
            writer.xxhash = xxhash if checksums else SimpleNamespace(xxh3_64=NoChecksum)  # type: ignore[assignment]
            self.save(checkpointer, "foreground" if checksums else "foreground, without checksums")
        writer.xxhash = xxhash

    def read(self, name: str, action: Callable[[Path], Any], *, all_ranks: bool = False) -> None:
        """Times what reads the checkpoint, on one process or all."""
        if self.cold and self.world.rank == 0:
            drop_from_cache(self.folder)
        self.note(f"{name}{' (disk)' * self.cold}", lambda: (all_ranks or self.world.rank == 0) and action(self.folder))

    def run(self, parts: list[str], written: Path) -> None:
        """Measures these parts."""
        plain = self.checkpointer("disabled")
        if self.rounds > 1:
            self.save(plain, "first save")
        for turns_left in reversed(range(self.rounds)):
            if "sync" in parts or "checksums" in parts:
                self.save_in_the_foreground(plain, parts, turns_left)
        for part, mode in (("async", "async"), ("pinned", "async_with_pinned_mem")):
            if part in parts:
                checkpointer = self.checkpointer(mode)
                for n in range(self.rounds + 1):
                    self.save(checkpointer, f"{mode}{', first' * (n == 0)}")
                del checkpointer
        for _ in range(self.rounds):
            if "write" in parts:
                self.note("raw write", lambda: raw_write(written, self.size // self.world.size, self.world.rank))
            if "read" in parts:
                self.read("raw read (one process)", raw_read)
            if "verify" in parts:
                self.read("verification (one process)", verify)
            if "load" in parts:
                self.read("load", lambda _: self.load(plain), all_ranks=True)
        if "agree" in parts:
            agree = Interrupts().agree
            for _ in range(self.rounds):
                self.note(f"{AGREEMENTS:,} agreements", lambda: [agree(0, False) for _ in range(AGREEMENTS)])

    def load(self, checkpointer: Checkpointer) -> None:
        """Loads the newest checkpoint."""
        found = checkpointer.find()
        assert found is not None
        checkpointer.load(found, self.optimizer)


def restart(given: argparse.Namespace, argv: list[str]) -> None:
    """Runs train.py to a checkpoint, and again and again from there: until the first step has ended."""
    train = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(given.restart)]
    train += [str(ROOT / "train.py"), *argv]
    train += ["--metrics.log_freq", "1", "--checkpoint.interval", "1000", "--training.warmup_steps", "1"]
    metrics = Path(argv[argv.index("--job.dump_folder") + 1]) / "metrics.jsonl"
    times: dict[str, list[float]] = {
        "from the start of torchrun to the end of the first step": [],
        "of it the step": [],
    }
    for last_step in range(2, given.rounds + 3):
        begun = time.time()
        subprocess.run([*train, "--training.steps", str(last_step)], check=True, stdout=subprocess.DEVNULL)
        first = next(line for line in read_metrics(metrics) if line["step"] == (last_step if last_step > 2 else 1))
        if last_step > 2:
            for name, figure in zip(times, (first["time"] - begun, first["seconds_per_step"]), strict=True):
                times[name].append(figure)
                print(f"{name}: {figure:.2f} s", flush=True)
        if given.json is not None:
            facts = {"processes": given.restart, "torch": torch.__version__}
            given.json.write_text(json.dumps({**facts, "seconds": times}, indent=1) + "\n")


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="gets a folder of its own, which is removed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="read from the disk")
    parser.add_argument("--restart", type=int, metavar="PROCESSES", help="measure restarts, and nothing else")
    given, rest = parser.parse_known_args()
    written = given.folder / "checkpointing"
    argv = [*DEFAULTS, *rest, "--job.dump_folder", str(written), "--checkpoint.keep_latest_k", "1"]
    try:
        if given.restart:
            restart(given, argv)
            return
        world = init_world(1800)
        bench = Bench(argv, world, given)
        bench.run([part for part in given.parts if part != "pinned" or torch.cuda.is_available()], written)
        dist.destroy_process_group()
    finally:
        if int(os.environ.get("RANK", "0")) == 0:
            shutil.rmtree(written, ignore_errors=True)
    if world.rank == 0:
        report(bench)


def report(bench: Bench) -> None:
    """Prints the medians."""
    rows = []
    for name, times in bench.times.items():
        median = statistics.median(times)
        rate = "" if "agreements" in name else f"{bench.size / max(median, 1e-9) / 1e9:.2f}"
        if max(times) >= 0.01:
            rows.append((name, f"{median:.2f}", f"{min(times):.2f}-{max(times):.2f}", rate))
    print(tabulate(rows, headers=("what", "s, median", "s, range", "GB/s"), tablefmt="github", disable_numparse=True))
    pairs = [bench.times.get(f"foreground{kind}: training stands still", []) for kind in ("", ", without checksums")]
    if all(pairs):
        costs = [with_sums / without - 1 for with_sums, without in zip(*pairs, strict=True)]
        print(f"checksums: {statistics.median(costs):+.1%} of a save, median of {len(costs)} pairs")
    print(f"{bench.size / 1e9:.2f} GB, {bench.world.size} processes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
