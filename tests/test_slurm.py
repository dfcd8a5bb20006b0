"""The sbatch scripts on a real Slurm: preempted, put back into the queue, out of time, as a chain, to their end.

`.ci/slurm` sets one up on this machine.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import NO_GPU, ROOT, train
from torchtitan.metrics import read_metrics


def slurm_is_up() -> bool:
    if shutil.which("sbatch") is None:
        return False
    state = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
    return bool(re.search("idle|mixed|allocated|completing", state.stdout))


pytestmark = pytest.mark.skipif(not slurm_is_up(), reason="no Slurm here; .ci/slurm sets one up")

STEPS = 24
CONFIG = """
[training]
dataset = "synthetic"
seq_len = 256
batch_size = 2
global_batch_size = 8
steps = {steps}
warmup_steps = 3
mixed_precision_param = "float32"

[metrics]
log_freq = 1
enable_tensorboard = false

[checkpoint]
interval = {interval}
keep_latest_k = 2
"""


def submit(tmp_path: Path, *options: str, interval: int = 1000, arguments: tuple[str, ...] = ()) -> str:
    """Submits one of the scripts with a small run in place of its configuration; returns the job's number."""
    config = tmp_path / "small.toml"
    config.write_text(CONFIG.format(steps=STEPS, interval=interval))
    environment = {
        **os.environ,
        **NO_GPU,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CONFIG_FILE": str(config),
        "VENV": "none",
        "CLUSTER_ENV": "none",
        "NPROC_PER_NODE": "2",
    }
    command = ["sbatch", "--parsable", "--nodes=1", f"--output={tmp_path}/log-%a.txt", *options]
    command += ["train_primate_8B_131k.sh", "--job.dump_folder", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def job(number: str) -> str:
    return subprocess.run(["scontrol", "show", "job", "-o", number], capture_output=True, text=True).stdout


def log(tmp_path: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(tmp_path.glob("log-*.txt")))


def wait_for(what: str, condition: Callable[[], object], tmp_path: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}\n{log(tmp_path)}"
        time.sleep(0.3)


def wait_for_step(tmp_path: Path, step: int) -> None:
    def reached() -> bool:
        return any(line["step"] >= step for line in read_metrics(tmp_path / "out/metrics.jsonl"))

    wait_for(f"step {step} is not reached", reached, tmp_path)


def wait_for_end(tmp_path: Path, number: str, seconds: float = 240) -> None:
    """The job is neither running nor about to."""

    def over() -> bool:
        state = job(number)
        if "JobState=PENDING Reason=BeginTime" in state:  # for two minutes, in which a cluster cleans up
            time.sleep(8)
            subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], capture_output=True)
        requeued = log(tmp_path).rstrip().endswith("is put back into the queue")
        return bool(re.search("JobState=(COMPLETED|FAILED|CANCELLED|TIMEOUT)", state)) and not requeued

    wait_for("the job does not end", over, tmp_path, seconds)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "small.toml").write_text(CONFIG.format(steps=STEPS, interval=1000))
    train("--job.config_file", str(folder / "small.toml"), "--job.dump_folder", str(folder), processes=2)
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def assert_same_run(tmp_path: Path, uninterrupted: list[float]) -> None:
    lines = read_metrics(tmp_path / "out/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == uninterrupted


@pytest.mark.fault("Slurm", "preemption: scancel --signal=USR1", 1, "requeued, same losses")
def test_preempted_it_requeues_itself_and_goes_on(tmp_path: Path, uninterrupted: list[float]) -> None:
    number = submit(tmp_path)
    wait_for_step(tmp_path, 5)
    subprocess.run(["scancel", "--signal=USR1", number], check=True)
    wait_for_end(tmp_path, number)
    text = log(tmp_path)
    assert "stopping after this step" in text
    assert re.search(r"launch\.sh: go_on at step \d+", text)
    assert "resuming from" in text
    assert re.search("JobState=COMPLETED .*Restarts=1", job(number)), job(number)
    assert_same_run(tmp_path, uninterrupted)

    again = submit(tmp_path)
    wait_for_end(tmp_path, again)
    assert "nothing to do: the newest checkpoint is of step 24" in log(tmp_path)
    assert "JobState=COMPLETED" in job(again)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.fault("Slurm", "scontrol requeue", 1, "requeued, same losses")
def test_requeued_from_outside(tmp_path: Path, uninterrupted: list[float]) -> None:
    number = submit(tmp_path, interval=5)
    wait_for_step(tmp_path, 12)
    subprocess.run(["scontrol", "requeue", number], check=True)
    wait_for("it is not requeued", lambda: "Restarts=1" in job(number), tmp_path)
    wait_for_end(tmp_path, number)
    assert "resuming from" in log(tmp_path)
    assert "JobState=COMPLETED" in job(number)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.fault("Slurm", "time limit", 1, "saved in time, requeued, finished")
def test_out_of_time(tmp_path: Path, all_faults: bool) -> None:
    """Two minutes, of which the last one is kept in reserve, are not enough for larger steps."""
    if not all_faults:
        pytest.skip("takes minutes; make faults runs it")
    number = submit(tmp_path, "--time=2", "--signal=USR1@5", arguments=("--training.global_batch_size", "128"))
    wait_for_end(tmp_path, number, seconds=900)
    text = log(tmp_path)
    assert "stopping after this step: the job's time limit" in text
    assert "DUE TO TIME LIMIT" not in text
    assert re.search("JobState=COMPLETED .*Restarts=[1-9]", job(number)), job(number)
    assert [line["step"] for line in read_metrics(tmp_path / "out/metrics.jsonl")] == list(range(1, STEPS + 1))


@pytest.mark.fault("Slurm", "array chain, its first job preempted", 1, "the next goes on, same losses")
def test_an_array_is_a_chain(tmp_path: Path, uninterrupted: list[float]) -> None:
    number = submit(tmp_path, "--array=1-3%1")
    wait_for_step(tmp_path, 5)
    subprocess.run(["scancel", "--signal=TERM", f"{number}_1"])  # fails where the job has ended before it asks again
    for task in (1, 2, 3):
        wait_for_end(tmp_path, f"{number}_{task}")
    first, second = ((tmp_path / f"log-{task}.txt").read_text() for task in (1, 2))
    assert "launch.sh: the next job of the array goes on" in first
    assert "launch.sh: finished at step 24" in second
    # What has nothing to do any more is not even started.
    assert not (tmp_path / "log-3.txt").exists()
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.fault("Slurm", "a run that breaks before its first step", 1, "not started again")
def test_no_endless_restarts(tmp_path: Path) -> None:
    """A run that breaks before its first checkpoint would break again."""
    number = submit(tmp_path, arguments=("--training.dataset_path", str(tmp_path / "nowhere")))
    wait_for_end(tmp_path, number)
    assert "contradicts training.dataset" in log(tmp_path)
    number = submit(tmp_path, arguments=("--checkpoint.init_from", str(tmp_path / "nowhere")))
    wait_for_end(tmp_path, number)
    assert "no step was gained since step 0; the run is not started again" in log(tmp_path)
    assert re.search("JobState=FAILED .*Restarts=0", job(number)), job(number)
