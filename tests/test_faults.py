"""Runs that are killed again and again end with the numbers of the run that was not: bit for bit, each step once."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.checkpoints import assert_same_checkpoint
from tests.processes import NO_GPU, ROOT, free_port, train, train_command
from torchtitan.checkpoint.verify import main as verify
from torchtitan.metrics import read_metrics

STEPS = 80
ARGUMENTS = ["--training.dataset", "synthetic", "--training.seq_len", "64", "--training.steps", str(STEPS)]
ARGUMENTS += ["--training.global_batch_size", "4", "--training.mixed_precision_param", "float32"]
ARGUMENTS += ["--model.n_layers", "1", "--model.dim", "32", "--metrics.log_freq", "1"]
ARGUMENTS += ["--metrics.enable_tensorboard", "false", "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "2"]
ARGUMENTS += ["--training.warmup_steps", "5", "--training.num_workers", "0"]
SAME = ("step", "loss", "grad_norm", "lr", "tokens_seen")
BIT_FOR_BIT = "went on to the same losses and weights, bit for bit"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(*ARGUMENTS, "--job.dump_folder", str(folder), processes=2)
    return folder


def start(folder: Path, fault: str | None, mode: str, *, agent: bool = False) -> list[subprocess.Popen[bytes]]:
    """Two ranks, started by hand, which takes a third of the time; or the torchrun that starts them."""
    arguments = [*ARGUMENTS, "--job.dump_folder", str(folder), "--checkpoint.async_mode", mode]
    command = train_command(*arguments, processes=2 if agent else None)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **NO_GPU}
    if fault is not None:
        command[command.index("train.py")] = "tests/faulty_train.py"
        environment["FAULT"] = fault
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    own = [{}] if agent else [{**ranks, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    with open(folder.with_suffix(".log"), "ab") as log:
        return [
            subprocess.Popen(command, cwd=ROOT, env={**environment, **variables}, stdout=log, stderr=log)
            for variables in own
        ]


def kill_at_random(folder: Path, processes: list[subprocess.Popen[bytes]], kind: str, dice: random.Random) -> None:
    """Behind the first step that this start has gained, within the next half second."""
    steps = len(read_metrics(folder / "metrics.jsonl"))
    deadline = time.monotonic() + 180
    while len(read_metrics(folder / "metrics.jsonl")) == steps and processes[0].poll() is None:
        assert time.monotonic() < deadline, folder.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.01)
    time.sleep(dice.uniform(0, 0.5))
    for process in [dice.choice(processes)] if kind == "one" else processes:
        process.kill()


def failpoint(kind: str, dice: random.Random) -> str | None:
    """A fault for tests/faulty_train.py; None where the kill comes from outside."""
    latest = {"write": 2000, "manifest": 4, "removal": 3}.get(kind)
    rank = dice.choice([0, 1]) if kind == "write" else 0
    return f"{kind}:{rank}:{dice.randint(1, latest)}" if latest else None


def killed_and_resumed(folder: Path, uninterrupted: Path, kinds: list[str], dice: random.Random) -> None:
    """Starts the run once for each kind of kill, and then to its end; each start has to give the same numbers."""
    for n, kind in enumerate(kinds):
        fault = failpoint(kind, dice)
        processes = start(folder, fault, dice.choice(["disabled", "async"]), agent=kind == "agent")
        if fault is None:
            kill_at_random(folder, processes, kind, dice)
        statuses = [process.wait(timeout=180) for process in processes]
        assert all(statuses), f"kill {n}, {kind} {fault}, did not strike: {statuses}"
        assert -signal.SIGKILL in statuses, f"kill {n}, {kind} {fault}: it broke by something else: {statuses}"
        deadline = time.monotonic() + 30
        while running(folder):
            assert time.monotonic() < deadline, "processes outlive the run"
            time.sleep(0.05)
        assert verify([str(folder)]) != 1, "a damaged checkpoint has been left"
        assert_same_steps(folder, uninterrupted)
    for process in start(folder, None, "disabled"):
        assert process.wait(timeout=300) == 0, folder.with_suffix(".log").read_text()[-3000:]


def assert_same_steps(folder: Path, uninterrupted: Path) -> int:
    """Up to the last step that is logged, each is, once and with the same numbers; returns that step."""
    found, expected = (read_metrics(path / "metrics.jsonl") for path in (folder, uninterrupted))
    numbers = [[[line[key] for key in SAME] for line in lines] for lines in (found, expected[: len(found)])]
    assert numbers[0] == numbers[1]
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return len(found)


def assert_same_run(folder: Path, uninterrupted: Path) -> None:
    assert assert_same_steps(folder, uninterrupted) == STEPS
    assert_same_checkpoint(folder / f"checkpoint/step-{STEPS}", uninterrupted / f"checkpoint/step-{STEPS}")
    names = sorted(path.name for path in (folder / "checkpoint").iterdir())
    assert names == [f"step-{STEPS - 1}", f"step-{STEPS}"]


def test_killed_in_every_way_it_is_the_same_run(uninterrupted: Path, tmp_path: Path) -> None:
    """One run with many kills: a single start that goes on from something else ends with other numbers."""
    kinds = ["write", "all", "removal", "manifest", "one"]
    killed_and_resumed(tmp_path / "run", uninterrupted, kinds, random.Random(0))
    assert_same_run(tmp_path / "run", uninterrupted)


WAYS = {
    "write": ("inside a write", "failpoint in half a write of a shard, on either rank", 12),
    "manifest": ("between manifest and rename", "failpoint", 6),
    "removal": ("in retention", "failpoint behind the first file of an old step", 6),
    "one": ("one rank", "from outside, at a random time", 16),
    "all": ("all processes", "from outside, at a random time", 16),
    "agent": ("torchrun", "from outside, at a random time", 4),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.fault(f"kill -9, {title}", how, times, BIT_FOR_BIT))
        for kind, (title, how, times) in WAYS.items()
    ],
)
def test_killed_again_and_again_it_is_the_same_run(
    kind: str, all_faults: bool, uninterrupted: Path, tmp_path: Path
) -> None:
    if not all_faults:
        pytest.skip("takes long; make faults runs it")
    killed_and_resumed(tmp_path / "run", uninterrupted, [kind] * WAYS[kind][2], random.Random(kind))
    assert_same_run(tmp_path / "run", uninterrupted)


def running(folder: Path) -> list[str]:
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in line_of(path)]


def line_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
