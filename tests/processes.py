"""Running code in several processes, and the project's commands as a user would."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]

# What is tested on processes of the CPU is tested there also where there are GPUs.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(function: Callable[..., None], count: int, *arguments: Any) -> None:
    """Calls `function(*arguments)` in `count` processes that have torchrun's environment; raises what they raise."""
    mp.spawn(_as_rank, args=(count, free_port(), function, arguments), nprocs=count)


def _as_rank(rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **NO_GPU,
    )
    function(*arguments)


def train_command(*arguments: str, processes: int | None = None) -> list[str]:
    """`train.py` with these arguments, by torchrun where a number of processes is given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    return [sys.executable, *launcher, "train.py", *arguments]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the project's folder; its output and its errors together in `stdout`."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **NO_GPU, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def train(*arguments: str, processes: int | None = None, **environment: str) -> str:
    """Runs `train.py` to its end and returns what it printed; it has to succeed."""
    done = run(train_command(*arguments, processes=processes), **environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def descendants(ancestor: int, named: bytes = b"") -> list[int]:
    """The processes that this one has started, and those that they have; only those whose command line names that."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if named in (path / "cmdline").read_bytes() and _descends_from(path, ancestor):
                found.append(int(path.name))
        except OSError:  # it may end while it is looked at
            continue
    return found


def _descends_from(path: Path, ancestor: int) -> bool:
    while (parent := int((path / "stat").read_text().rpartition(")")[2].split()[1])) > 1:
        if parent == ancestor:
            return True
        path = Path(f"/proc/{parent}")
    return False
