"""Ends a process that makes no progress, and leaves behind what it was doing."""

import faulthandler
import os
import threading
import time
from pathlib import Path

from torch._C import _distributed_c10d as distributed_c10d

INTERVAL = 0.5
"""Seconds between looks at the clock."""
GRACE = 3.0
"""Seconds for the other ranks to leave their traces: those that wait for this one fail as soon as it is gone."""


class Watchdog:
    """Ends this process when it is not heard of for too long.

    Each rank watches itself, so that all that wait for a hung one end with it and all leave a trace:
    `hangs/rank-N.txt` in the dump folder has the stacks of all threads, `hangs/rank-N.flight` the last collectives
    where PyTorch's flight recorder is on (`torchfrtrace` reads it).
    """

    def __init__(self, dump_folder: Path, rank: int, seconds: float) -> None:
        self.folder, self.rank = dump_folder / "hangs", rank
        self.allow(seconds)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def allow(self, seconds: float) -> None:
        """There has been progress; the next is expected within so many seconds."""
        self.seconds, self.deadline = seconds, time.monotonic() + seconds

    def close(self) -> None:
        """Nothing more is expected."""
        self.stopped.set()

    def _watch(self) -> None:
        while not self.stopped.wait(INTERVAL):
            if time.monotonic() > self.deadline:
                try:
                    self._leave_trace()
                finally:
                    os._exit(1)

    def _leave_trace(self) -> None:
        message = f"error: rank {self.rank}: no progress for {self.seconds:.0f} s; stacks in {self.folder}"
        os.write(2, f"{message}\n".encode())  # the log's lock may be held by what hangs
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"rank-{self.rank}.txt", "w") as file:
            print(message, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        # What hangs may hold a lock that the recorder wants: then the process ends without it.
        faulthandler.dump_traceback_later(10, exit=True)
        dump = getattr(distributed_c10d, "_dump_fr_trace", None)  # not in every build
        if dump is not None:
            (self.folder / f"rank-{self.rank}.flight").write_bytes(dump())
        time.sleep(GRACE)
