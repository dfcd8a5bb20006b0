"""How a run says how it ended."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT
from torchtitan.outcome import clear_outcome, read_outcome, write_outcome
from torchtitan.owner import Owner
from torchtitan.trainer import Trainer


def test_an_outcome_is_of_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_ID", "7.0")
    assert read_outcome(tmp_path, "7.0") == "broken"
    write_outcome(tmp_path, "go_on", 12)
    assert read_outcome(tmp_path, "7.0") == "go_on"
    assert read_outcome(tmp_path, "7.1") == "broken"
    clear_outcome(tmp_path)
    assert read_outcome(tmp_path, "7.0") == "broken"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"outcome": "finished"}', "\0"])
def test_what_cannot_be_read_is_broken(tmp_path: Path, content: str) -> None:
    (tmp_path / "outcome.json").write_text(content)
    assert read_outcome(tmp_path, "") == "broken"


def test_the_command_that_the_launcher_asks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torchtitan.outcome", "--training.dataset", "synthetic"]
    command += ["--job.dump_folder", str(tmp_path)]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == f"broken 0 {tmp_path}\n"
    modules = [sys.executable, "-X", "importtime", *command[1:]]
    assert " torch\n" not in subprocess.check_output(modules, stderr=subprocess.STDOUT, cwd=ROOT, text=True)


def test_a_wrong_configuration_is_answered_as_by_training() -> None:
    command = [sys.executable, "-m", "torchtitan.outcome", "--training.dataset", "synthetic", "--training.stps", "3"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 1 problem in the configuration")
    assert "did you mean training.steps?" in done.stderr


def test_an_outcome_that_cannot_be_written_hides_no_error(
    tmp_path: Path, warnings_logged: pytest.LogCaptureFixture
) -> None:
    run = Trainer.__new__(Trainer)  # as it is when its disk is full
    run.dump_folder, run.step, run.owner = tmp_path / "gone", 3, Owner(tmp_path)
    run.end("broken")
    assert not (tmp_path / "owner.json").exists()
    [record] = warnings_logged.records
    assert record.message.endswith('gone: "broken" cannot be written as the outcome: No such file or directory')
