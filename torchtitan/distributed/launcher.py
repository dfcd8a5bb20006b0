"""What a process owes to the launcher that started it. Imports no torch."""

import ctypes
import gc
import os
import signal
import sys
import time
from typing import NoReturn

from torchtitan.logging import logger

PR_SET_PDEATHSIG = 1
"""`prctl`'s option: the signal that a process gets when its parent dies (linux/prctl.h)."""

PATIENCE = 10
"""Seconds that other ranks give to the one that speaks for all."""


def end_with_launcher() -> None:
    """Under torchrun on Linux: has the kernel end this process when torchrun dies, however it dies.

    Workers run in sessions of their own and would otherwise go on training alone, into the folder of the run that is
    started in their place.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it died before it could be asked for
        sys.exit("torchrun has died")


def end(status: int) -> NoReturn:
    """Ends this process at once, with that exit status.

    An orderly exit would wait for the loader's processes and for ranks that are gone. It also destroys threads of
    PyTorch's process groups that may still run, which ends one of some fifteen finished runs by SIGABRT on a machine
    that has other work.
    """
    if status == 0:
        gc.collect()  # with the loader, whose semaphores Python would call leaked
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def report(message: str) -> None:
    """Logs an error that all ranks find before they know of each other: on rank 0 alone.

    The others give it the time, because torchrun ends all as soon as one has ended.
    """
    if os.environ.get("RANK", "0") == "0":
        logger.error(f"error: {message}")
    else:
        time.sleep(PATIENCE)
