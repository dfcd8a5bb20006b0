"""The sbatch scripts: what they ask of Slurm, and that they train, with Slurm and without."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import NO_GPU, ROOT, descendants
from torchtitan.checkpoint.folders import complete_steps
from torchtitan.metrics import read_metrics

NODES = {"primate": 36, "synthetic": 12, "synthetic_primate": 21, "lang_primate": 36}
# What srun would do on one node, and scontrol's only answer.
SRUN = """#!/usr/bin/env bash
echo "srun $*"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = "#!/usr/bin/env bash\necho 127.0.0.1\n"


def popen_script(script: str, tmp_path: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Starts one of the scripts with a small synthetic run in place of its configuration."""
    config = tmp_path / "small.toml"
    config.write_text('[training]\ndataset = "synthetic"\nseq_len = 64\nsteps = 2\nmixed_precision_param = "float32"\n')
    command = ["bash", script, "--job.dump_folder", str(tmp_path / "out"), *arguments]
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {
        **os.environ,
        **NO_GPU,
        "PATH": path,
        "CONFIG_FILE": str(config),
        "VENV": "none",
        "CLUSTER_ENV": "none",
        "NPROC_PER_NODE": "2",
        **environment,
    }
    return subprocess.Popen(
        command, env=variables, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_script(script: str, tmp_path: Path, *arguments: str, **environment: str) -> str:
    """Runs one of the scripts to its end, which has to be a good one; returns what it printed."""
    process = popen_script(script, tmp_path, *arguments, **environment)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("name", NODES)
def test_what_is_asked_of_slurm(name: str) -> None:
    path = ROOT / f"train_{name}_8B_131k.sh"
    text = path.read_text()
    assert f"#SBATCH --nodes={NODES[name]}\n" in text
    assert "#SBATCH --gpus-per-node=4\n" in text
    config = re.search(r"train_configs/\w+\.toml", text)
    assert config is not None
    assert config[0] == f"train_configs/{name}_8b_131k.toml"
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("script", [*sorted(ROOT.glob("train_*.sh")), ROOT / "scripts/launch.sh"], ids=lambda s: s.name)
def test_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_on_one_machine_without_slurm(tmp_path: Path) -> None:
    output = run_script(str(ROOT / "train_primate_8B_131k.sh"), tmp_path, "--training.steps", "3")
    assert "mesh: 2 shard on cpu" in output
    assert "step 3 of 3 is done" in output


def test_in_a_slurm_job(tmp_path: Path) -> None:
    """sbatch runs a copy of the script from elsewhere."""
    (tmp_path / "bin").mkdir()
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    copy = tmp_path / "slurm_script"
    copy.write_bytes((ROOT / "train_lang_primate_8B_131k.sh").read_bytes())
    output = run_script(
        str(copy),
        tmp_path,
        SLURM_JOB_ID="123",
        SLURM_NNODES="1",
        SLURM_JOB_NODELIST="node1",
        SLURM_SUBMIT_DIR=str(ROOT),
    )
    assert "srun --ntasks=1 --ntasks-per-node=1 --kill-on-bad-exit=1" in output
    assert "--standalone train.py" in output
    assert "step 2 of 2 is done" in output


# Both agents on this machine; either may be the one that the other finds. Ends as srun does: with the first that fails.
SRUN_OF_TWO = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
echo "agents $first $second"
trap 'kill $first $second' TERM
wait -n || { sleep 3; kill -9 $first $second; exit 1; }
wait -n
"""
SCONTROL_OF_TWO = """#!/usr/bin/env bash
[ "$1" = requeue ] && echo "requeued $2" || echo 127.0.0.1
"""


@pytest.mark.fault("two nodes", "one of two torchrun agents killed", 1, "both end; the next start goes on")
def test_two_agents_of_which_one_is_killed(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, content in (("srun", SRUN_OF_TWO), ("scontrol", SCONTROL_OF_TWO), ("squeue", "#!/bin/sh\nexit 1\n")):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "two", "NPROC_PER_NODE": "1"}
    job |= {"GLOO_SOCKET_IFNAME": "lo"}
    arguments = ("--training.steps", "300", "--checkpoint.interval", "5", "--checkpoint.keep_latest_k", "2")
    arguments += ("--metrics.log_freq", "1", "--metrics.enable_tensorboard", "false")
    script = str(ROOT / "train_primate_8B_131k.sh")
    with popen_script(script, tmp_path, *arguments, **job) as process:
        assert process.stdout is not None
        agents = next(line for line in process.stdout if line.startswith("agents ")).split()
        deadline = time.monotonic() + 120
        while not complete_steps(tmp_path / "out/checkpoint"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(int(agents[2]), signal.SIGKILL)
        output = process.stdout.read()
    assert "launch.sh: broken at step" in output
    assert "requeued 123" in output
    assert not descendants(process.pid)
    before = complete_steps(tmp_path / "out/checkpoint")[-1]
    output = run_script(script, tmp_path, *arguments, "--training.stop_after_step", str(before + 5), **job)
    assert "resuming from" in output
    assert f"launch.sh: finished at step {before + 5}" in output
    lines = read_metrics(tmp_path / "out/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, before + 6))


def test_a_run_that_went_back_to_an_older_step_goes_on(tmp_path: Path) -> None:
    """Stopped before it is where it was: a gain all the same, which is requeued; without one it is not."""
    script = str(ROOT / "train_primate_8B_131k.sh")
    run_script(script, tmp_path, "--training.steps", "3", "--checkpoint.interval", "1")
    (tmp_path / "bin").mkdir()
    steps = tmp_path / "out/checkpoint"
    went_back = f"mv {steps}/step-3 {steps}/step-3.superseded-1\nexit 1\n"
    for name, content in (("srun", f"#!/bin/sh\n{went_back}"), ("scontrol", SCONTROL_OF_TWO), ("squeue", "exit 1\n")):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "one"}
    assert "requeued 123" in popen_script(script, tmp_path, **job).communicate(timeout=60)[0]
    assert "no step was gained since step 2" in popen_script(script, tmp_path, **job).communicate(timeout=60)[0]


def test_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here")
    scripts = [*ROOT.glob("train_*.sh"), ROOT / "scripts/launch.sh", ROOT / ".ci/run", ROOT / ".ci/slurm"]
    subprocess.run(["shellcheck", *map(str, scripts)], check=True)


def test_without_slurm_a_run_that_is_stopped_says_how_it_ended(tmp_path: Path) -> None:
    script = str(ROOT / "train_primate_8B_131k.sh")
    with popen_script(script, tmp_path, "--training.steps", "2000", "--metrics.log_freq", "1") as process:
        deadline = time.monotonic() + 120
        while len(read_metrics(tmp_path / "out/metrics.jsonl")) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()  # the script itself, which has to pass it on
        assert process.stdout is not None
        output = process.stdout.read()
    assert "launch.sh: go_on at step" in output
    assert process.returncode == 0
