"""Traces of single steps and snapshots of the GPU's memory, on request."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from torchtitan.config.schema import JobConfig
from torchtitan.logging import logger


class Profiler(Protocol):
    """Told of the end of every step."""

    def step(self) -> None: ...


@contextmanager
def profiling(config: JobConfig, rank: int, first_step: int) -> Iterator[list[Profiler]]:
    """The profilers that `[profiling]` asks for, running; call `step` of each at the end of every step."""
    profilers: list[Profiler] = []
    dump_folder = Path(config.job.dump_folder)
    with _tracing(config, dump_folder, rank, first_step) as trace:
        if trace is not None:
            profilers.append(trace)
        if config.profiling.enable_memory_snapshot and torch.cuda.is_available():
            folder = dump_folder / config.profiling.save_memory_snapshot_folder
            profilers.append(MemorySnapshots(folder, rank, config.profiling.profile_freq, first_step))
        try:
            yield profilers
        except torch.OutOfMemoryError:
            for profiler in profilers:
                if isinstance(profiler, MemorySnapshots):
                    profiler.write("out_of_memory")
            raise


class MemorySnapshots:
    """Records CUDA's allocations and writes them now and then; pytorch.org/memory_viz shows the files."""

    def __init__(self, folder: Path, rank: int, every: int, first_step: int) -> None:
        self.folder, self.rank, self.every, self.steps = folder, rank, every, first_step
        torch.cuda.memory._record_memory_history(max_entries=100_000)

    def step(self) -> None:
        """Writes a snapshot every so many steps."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.write(f"step-{self.steps}")

    def write(self, name: str) -> None:
        """Writes the memory as it is now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}-rank-{self.rank}.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
        logger.info(f"memory snapshot written to {path}")


@contextmanager
def _tracing(config: JobConfig, dump_folder: Path, rank: int, first_step: int) -> Iterator[Profiler | None]:
    if not config.profiling.enable_profiling:
        yield None
        return
    folder = dump_folder / config.profiling.save_traces_folder
    folder.mkdir(parents=True, exist_ok=True)
    steps_before = first_step

    def write(trace: torch.profiler.profile) -> None:
        path = folder / f"step-{steps_before + trace.step_num}-rank-{rank}.json.gz"
        trace.export_chrome_trace(str(path))
        logger.info(f"trace written to {path}")

    every = config.profiling.profile_freq
    schedule = torch.profiler.schedule(wait=every - 2, warmup=1, active=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as trace:
        yield trace
