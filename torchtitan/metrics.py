"""What a logged step reports, and where: console, `metrics.jsonl`, TensorBoard."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from torchtitan.config.schema import Metrics
from torchtitan.logging import logger


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One line of `metrics.jsonl`.

    Attributes:
        step: number of the step, the first being 1.
        loss: mean cross-entropy of the step's global batch, nats a token, BOS included; None where it is not finite.
        grad_norm: norm of the gradient before clipping; None where it is not finite.
        skipped_updates: updates skipped since the start of this process, for what is not finite or a spike.
        lr: learning rate of the step.
        tokens_seen: tokens that all ranks have trained on since step 1.
        epoch: how often the data has been gone through, a fraction; None where it has no end.
        tokens_per_second_per_gpu, seconds_per_step: since the last logged step or save, the session's first step
            left out where there are others.
        mfu: FLOP/s over the GPU's peak, by the formula of `torchtitan.flops`; None where the peak is not known.
        data_wait_share: share of that time spent waiting for the loader.
        peak_reserved_gib: most memory that PyTorch has reserved on this GPU since the last logged step; None on a CPU.
        clipped_counts: spike counts clipped since the start of this process, all ranks.
        seconds_left: estimate for the steps that remain.
        time: of the report, seconds since 1970.
        validation_nats_per_token: mean negative log likelihood of held-out counts, BOS left out; None where this step
            is not validated.
        validation_bits_per_spike: what that is better than a Poisson with each neuron's mean of the same counts.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    skipped_updates: int
    lr: float
    tokens_seen: int
    epoch: float | None
    tokens_per_second_per_gpu: float
    seconds_per_step: float
    mfu: float | None
    data_wait_share: float
    peak_reserved_gib: float | None
    clipped_counts: int
    seconds_left: float
    time: float
    validation_nats_per_token: float | None = None
    validation_bits_per_spike: float | None = None

    def __str__(self) -> str:
        mfu = "peak unknown" if self.mfu is None else f"{self.mfu:.1%}"
        memory = "" if self.peak_reserved_gib is None else f"  memory {self.peak_reserved_gib:.1f} GiB"
        clipped = f"  clipped {self.clipped_counts:,}" if self.clipped_counts else ""
        loss = "not finite" if self.loss is None else f"{self.loss:.4f}"
        norm = "not finite" if self.grad_norm is None else f"{self.grad_norm:.3f}"
        held_out = ""
        if self.validation_nats_per_token is not None:
            held_out = f"  validation {self.validation_nats_per_token:.4f}"
            if self.validation_bits_per_spike is not None:
                held_out += f" ({self.validation_bits_per_spike:+.3f} bits/spike)"
        clipped += f"  skipped {self.skipped_updates}" if self.skipped_updates else ""
        return (
            f"step {self.step:>6}  loss {loss}{held_out}  grad norm {norm}  lr {self.lr:.2e}  "
            f"tokens/s/GPU {self.tokens_per_second_per_gpu:,.0f}  MFU {mfu}{memory}  "
            f"data wait {self.data_wait_share:.1%}  left {timedelta(seconds=round(self.seconds_left))}{clipped}"
        )


class Stopwatch:
    """Time since the last logged step, the part of it spent waiting for data, and what was done in it."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins a new interval."""
        self.start = time.perf_counter()
        self.waited = 0.0
        self.steps = 0
        self.flops = 0

    @property
    def elapsed(self) -> float:
        """Seconds of the interval so far."""
        return time.perf_counter() - self.start


class MetricsWriter:
    """Writes the reports of rank 0; on other ranks it does nothing.

    A run that goes on with step `first_step` drops what was reported of it and later ones: each step stands there once.
    """

    def __init__(self, config: Metrics, dump_folder: Path, rank: int, first_step: int) -> None:
        self.file = self.tensorboard = None
        self.unwritten: set[str] = set()
        if rank != 0:
            return
        path = dump_folder / "metrics.jsonl"
        _drop_from(path, first_step)
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 - open for as long as the run lasts
        if config.enable_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(dump_folder / config.save_tb_folder)
            self.tensorboard = SummaryWriter(folder, purge_step=first_step)

    def write(self, metrics: StepMetrics) -> None:
        """Reports one step."""
        if self.file is None:
            return
        logger.info(str(metrics))
        with self._going_on_without("metrics.jsonl"):
            self.file.write(json.dumps(asdict(metrics)) + "\n")
        if self.tensorboard is not None:
            with self._going_on_without("TensorBoard's file"):
                for name, value in asdict(metrics).items():
                    if value is not None and name not in ("step", "time"):
                        self.tensorboard.add_scalar(name, value, metrics.step)

    def sync(self) -> None:
        """Makes sure that what was reported is on disk: a run that goes on from a later checkpoint never repeats it."""
        if self.file is not None:
            with self._going_on_without("metrics.jsonl"):
                os.fsync(self.file.fileno())

    def close(self) -> None:
        """Writes out what is buffered."""
        if self.file is not None:
            with self._going_on_without("metrics.jsonl"):
                self.file.close()
        if self.tensorboard is not None:
            with self._going_on_without("TensorBoard's file"):
                self.tensorboard.close()

    @contextmanager
    def _going_on_without(self, file: str) -> Iterator[None]:
        """A full disk is no reason to end a run, unless its checkpoints say so: warns once."""
        try:
            yield
        except OSError as error:
            if file not in self.unwritten:
                logger.warning(f"{file} cannot be written ({error.strerror}); the run goes on")
            self.unwritten.add(file)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, but for a last one that a kill has cut off."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _drop_from(path: Path, step: int) -> None:
    """Leaves the reports before `step`; by a rename, so that a kill leaves either the old file or the new one."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] < step]
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
