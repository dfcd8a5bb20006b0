"""Stopping in time: signals and the end of the Slurm job, on which all ranks agree at the end of a step."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

import torch
import torch.distributed as dist

from torchtitan.logging import logger

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Preemption and scancel; Slurm's warning (`#SBATCH --signal`); Ctrl-C."""
RESERVE = 60.0
"""Seconds that are left of the job after everything that is measured: the end of the processes, a slower disk."""


class Interrupts:
    """What asks this process to stop.

    From here on a stop signal is remembered instead of ending the process; only a second Ctrl-C ends it at once.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.job_end = float(os.environ.get("SLURM_JOB_END_TIME", "inf"))
        self.group = dist.new_group(backend="gloo")
        self.ctrl_c = signal.getsignal(signal.SIGINT)
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self.ctrl_c)

    def agree(self, needed_seconds: float, failed: bool) -> tuple[bool, bool]:
        """Whether any rank has to stop after this step, and whether any has `failed`.

        A reduction of two integers between the hosts: it does not wait for the GPUs.

        Args:
            needed_seconds: what one more step and saving it may take; with that little left of the job, it is time.
            failed: of this rank.
        """
        if self.reason is None and time.time() + needed_seconds + RESERVE > self.job_end:
            self.reason = "the job's time limit"
        flags = torch.tensor([self.reason is not None, failed], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        stop, any_failed = flags.bool().tolist()
        if stop:
            logger.warning(f"stopping after this step: {self.reason or 'another rank was told to'}")
        return stop, any_failed


@contextmanager
def children_spared() -> Iterator[None]:
    """Processes that are started in here do not get stop signals, which Slurm sends to all processes of a job.

    The data loader's would end at once, and the step that is to be saved with them.
    """
    # Started here, for it would unblock them again; it spares itself SIGTERM and SIGINT.
    handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    resource_tracker.ensure_running()
    signal.signal(signal.SIGUSR1, handler)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
