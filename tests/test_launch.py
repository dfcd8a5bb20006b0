"""The sbatch scripts: what they ask of Slurm, and that they train, with Slurm and without."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import NO_GPU, ROOT

NODES = {"primate": 36, "synthetic": 12, "synthetic_primate": 21, "lang_primate": 36}
# What srun would do on one node, and scontrol's only answer.
SRUN = """#!/usr/bin/env bash
echo "srun $*"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = "#!/usr/bin/env bash\necho 127.0.0.1\n"


def run_script(script: str, tmp_path: Path, *arguments: str, **environment: str) -> str:
    """Runs one of the scripts with a small synthetic run in place of its configuration."""
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
        "NPROC_PER_NODE": "2",
        **environment,
    }
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


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
    assert "--rdzv_id 123 --rdzv_endpoint 127.0.0.1:20123" in output
    assert "step 2 of 2 is done" in output
