"""A run folder has one writer: the process whose mark, `owner.json`, is in it. Imports no torch."""

import atexit
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchtitan.logging import logger

MARK = "owner.json"
RENEWED_EVERY = 10.0
STALE_AFTER = 120.0
"""Seconds without renewal after which the holder counts as dead. It renews from a thread of its own, also while a step
or a save takes longer."""
ASKED_EVERY = 5.0
"""Seconds between questions to Slurm about a job that is ending."""
SETTLE = 1.0
"""Seconds in which another process that takes over the same dead holder's folder has to show up."""


class FolderInUseError(ValueError):
    """Another process writes to the folder."""


class Owner:
    """This process as the writer of a run folder, until `release`.

    Raises:
        FolderInUseError: where another process is; it names the holder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / MARK
        self.mark = {
            "host": socket.gethostname(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "process": os.getpid(),
            "started": _start_time(os.getpid()),
            "token": uuid.uuid4().hex,
        }
        self._take()
        atexit.register(self.release)
        self.released = threading.Event()
        self.thread = threading.Thread(target=self._renew, name="owner", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raises FolderInUseError where another process has taken the folder over: this one was thought dead."""
        holder = _read(self.path)
        if holder is None or holder["token"] != self.mark["token"]:
            raise FolderInUseError(f"{self.path.parent} has been taken over: {_describe(holder)}")

    def release(self) -> None:
        """Leaves the folder to others."""
        self.released.set()
        self.thread.join()
        atexit.unregister(self.release)
        with suppress(OSError, FolderInUseError):
            self.check()
            self.path.unlink()

    def _take(self) -> None:
        temporary = self.path.with_name(f"{MARK}.{self.mark['token']}")
        temporary.write_text(json.dumps(self.mark) + "\n")
        try:
            os.link(temporary, self.path)  # fails where there is a mark
            return None
        except FileExistsError:
            # Both ages by the file system's clock: those of two hosts may differ.
            try:
                age = temporary.stat().st_mtime - self.path.stat().st_mtime
            except FileNotFoundError:  # the holder has just ended
                return self._take()
            holder = _read(self.path)
            obstacle = None if holder is None and age > STALE_AFTER else self._alive(holder, age)
            if obstacle:
                raise FolderInUseError(
                    f"{self.path.parent} is in use: {_describe(holder)}, last heard of {age:.0f} s ago ({obstacle}); "
                    "give this run a job.dump_folder of its own, or end the other one first"
                ) from None
            logger.warning(f"taking over {self.path.parent}: {_describe(holder)}, which is no more")
            os.utime(temporary)  # Slurm may have been asked for a while
            os.replace(temporary, self.path)
            time.sleep(SETTLE)
            self.check()
        finally:
            temporary.unlink(missing_ok=True)

    def _alive(self, holder: dict[str, Any] | None, age: float) -> str | None:
        """Why the holder counts as alive; None where it does not."""
        if holder is None:
            return "its mark cannot be read"
        if age > STALE_AFTER:
            return None
        if holder["host"] == self.mark["host"]:
            same = _start_time(holder["process"]) == holder["started"]
            return "the process is there" if same else None
        if holder["job"] is not None:
            # A job that Slurm has requeued is the one that held the folder before.
            if holder["job"] == self.mark["job"]:
                return None
            return "Slurm knows the job" if _slurm_knows(holder["job"]) else None
        return f"it counts as dead after {STALE_AFTER:.0f} s"

    def _renew(self) -> None:
        while not self.released.wait(RENEWED_EVERY):
            with suppress(OSError, FolderInUseError):
                self.check()
                os.utime(self.path)


def make_writable(folder: Path) -> None:
    """Makes the run folder, if it is not there; raises ValueError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"a full disk takes names, but no bytes")
    except OSError as error:
        raise ValueError(f'job.dump_folder = "{folder}" cannot be written: {error.strerror}') from error


def _read(path: Path) -> dict[str, Any] | None:
    try:
        mark = json.loads(path.read_text())
        return mark if {"host", "job", "process", "started", "token"} <= mark.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _describe(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "an unknown process"
    job = f", job {holder['job']}" if holder["job"] else ""
    return f"process {holder['process']} on {holder['host']}{job}"


def _start_time(process: int) -> str | None:
    """When a process of this host was started, in the kernel's ticks; None where it is not there, or a zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _slurm_knows(job: str) -> bool:
    """Whether the job is running; True where Slurm does not answer.

    The end of one whose processes Slurm is killing is waited for: the next job of its chain may start before that. It
    counts as ended where that takes as long as a holder may be silent.
    """
    last_asked = time.monotonic() + STALE_AFTER
    while (state := _slurm_state(job)) == "COMPLETING" and time.monotonic() < last_asked:
        time.sleep(ASKED_EVERY)
    return state not in ("", "PENDING", "REQUEUED", "COMPLETING")


def _slurm_state(job: str) -> str | None:
    """What Slurm says of the job: nothing where there is no such job; None where Slurm does not answer."""
    try:
        asked = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if "Invalid job id" in asked.stderr:
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else None
