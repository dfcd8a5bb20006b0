"""Signals, the job's end and hangs, in one process and in several."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.processes import NO_GPU, ROOT, descendants, run, run_ranks, train, train_command
from torchtitan.checkpoint.folders import complete_steps
from torchtitan.distributed.interrupts import STOP_SIGNALS, Interrupts, children_spared
from torchtitan.distributed.world import World, init_world
from torchtitan.metrics import read_metrics

ARGUMENTS = ("--training.dataset", "synthetic", "--training.seq_len", "64", "--training.steps", "400")
ARGUMENTS += ("--metrics.log_freq", "1", "--metrics.enable_tensorboard", "false", "--model.n_layers", "1")
ARGUMENTS += ("--checkpoint.interval", "1000", "--training.global_batch_size", "8")
SIGNALS_PASSED_ON = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@contextmanager
def handlers_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered(world: World, number: signal.Signals) -> None:
    with handlers_restored():
        interrupts = Interrupts()
        assert interrupts.agree(0, failed=False) == (False, False)
        os.kill(os.getpid(), number)
        assert interrupts.agree(0, failed=True) == (True, True)
        assert interrupts.reason == number.name


def test_a_second_ctrl_c_does_not_wait(world: World) -> None:
    with handlers_restored():
        # A shell that starts tests in the background has them ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        Interrupts()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_end_of_the_job_leaves_time_for_a_step_and_a_save(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    with handlers_restored():
        interrupts = Interrupts()
        assert interrupts.agree(800, failed=False) == (False, False)
        assert interrupts.agree(980, failed=False) == (True, False)
        assert interrupts.reason == "the job's time limit"


def test_children_are_spared() -> None:
    with children_spared():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    child.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    child.kill()
    child.wait()


def agree_on_one_ranks_signal() -> None:
    world = init_world(60)
    interrupts = Interrupts()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupts.agree(0, failed=world.rank == 0) == (True, True)
    dist.destroy_process_group()


def test_all_ranks_agree() -> None:
    run_ranks(agree_on_one_ranks_signal, 2)


def processes_with(folder: Path) -> dict[str, int]:
    """The processes of the run in that folder: "agent", and "0", "1", … the ranks."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line, variables = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in line:
            rank = re.search(rb"\0RANK=(\d+)", variables)
            found[rank[1].decode() if rank else "agent"] = int(path.name)
    return found


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = train_command(*ARGUMENTS, "--job.dump_folder", str(folder), *more, processes=2)
    command.insert(3, SIGNALS_PASSED_ON)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **NO_GPU}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while len(read_metrics(folder / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.fault("signal", "TERM or USR1 to torchrun or one rank", 1, "step saved, goes on")
@pytest.mark.parametrize(
    ("target", "number"),
    [("agent", signal.SIGTERM), ("agent", signal.SIGUSR1), ("1", signal.SIGUSR1)],
)
def test_a_signal_to_any_process_saves_the_step_and_ends_the_run(
    tmp_path: Path, target: str, number: signal.Signals
) -> None:
    process = start(tmp_path)
    os.kill(processes_with(tmp_path)[target], number)
    output = process.communicate(timeout=60)[0]
    assert "stopping after this step" in output
    assert "checkpoint; the same command goes on" in output
    (step,) = complete_steps(tmp_path / "checkpoint")
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"]) == ("go_on", step)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, step + 1))
    output = train(
        *ARGUMENTS, "--job.dump_folder", str(tmp_path), "--training.stop_after_step", str(step + 3), processes=2
    )
    assert f"resuming from {tmp_path}/checkpoint/step-{step}" in output
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, step + 4))


@pytest.mark.fault("signal", "TERM to every process of the job", 1, "step saved, goes on")
def test_a_signal_to_every_process_at_once(tmp_path: Path) -> None:
    """As scancel and preemption send it: the loader's processes and their server get it too."""
    process = start(tmp_path, "--training.num_workers", "1")
    ours = descendants(process.pid)
    assert len(ours) > 6
    for pid in (*ours, process.pid):
        os.kill(pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert json.loads((tmp_path / "outcome.json").read_text())["outcome"] == "go_on", output


@pytest.mark.fault("hung rank", "a step that never ends", 1, "all end in time, stacks of all")
def test_a_hung_rank_ends_all_and_leaves_their_stacks(tmp_path: Path) -> None:
    command = train_command(*ARGUMENTS, "--job.dump_folder", str(tmp_path), processes=2)
    command[command.index("train.py")] = "tests/faulty_train.py"
    began = time.monotonic()
    done = run([*command, "--comm.train_timeout_seconds", "6"], FAULT="hang:1:4")
    assert time.monotonic() - began < 60
    assert done.returncode == 1
    assert "no progress for 6 s" in done.stdout
    assert "in instead" in (tmp_path / "hangs/rank-1.txt").read_text()  # the planted function
    assert "in train_step" in (tmp_path / "hangs/rank-0.txt").read_text()
    for rank in (0, 1):
        assert (tmp_path / f"hangs/rank-{rank}.flight").stat().st_size > 100


@pytest.mark.fault("two writers", "a second run in the folder", 1, "refused, holder named")
def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    process = start(tmp_path)
    done = run(train_command(*ARGUMENTS, "--job.dump_folder", str(tmp_path)))
    assert done.returncode == 1
    holder = processes_with(tmp_path)["0"]
    assert f"error: {tmp_path} is in use: process {holder} on" in done.stdout
    process.terminate()
    process.communicate(timeout=60)
    assert json.loads((tmp_path / "outcome.json").read_text())["outcome"] == "go_on"
