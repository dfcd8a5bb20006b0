"""A run folder has one writer."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import ROOT
from torchtitan import owner
from torchtitan.owner import MARK, STALE_AFTER, FolderInUseError, Owner, make_writable

HOLD = "import sys, time; from pathlib import Path; from torchtitan.owner import Owner\n"
HOLD += "Owner(Path(sys.argv[1])); print('holding', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "SETTLE", 0.01)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that writes to the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    return process


def forge(folder: Path, age: float = 0.0, **changes: object) -> None:
    """A mark as another host would leave it."""
    mark = {"host": "node7", "job": None, "process": 1, "started": "1", "token": "x", **changes}
    (folder / MARK).write_text(json.dumps(mark))
    then = time.time() - age
    os.utime(folder / MARK, (then, then))


def fake_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(FolderInUseError, match=rf"is in use: process {process.pid} on .*the process is there"):
            Owner(tmp_path)
        process.terminate()


@pytest.mark.fault("two writers", "a dead holder", 1, "taken over")
def test_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / MARK).exists()
    mine = Owner(tmp_path)
    mine.check()
    mine.release()
    assert not list(tmp_path.iterdir())


def test_another_process_with_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    first = Owner(tmp_path)
    forge(tmp_path, host=first.mark["host"], process=os.getpid(), started="12345")
    Owner(tmp_path).release()
    first.release()


def test_another_host_counts_as_dead_when_it_is_silent_for_too_long(tmp_path: Path) -> None:
    forge(tmp_path, age=STALE_AFTER - 20)
    with pytest.raises(FolderInUseError, match=r"process 1 on node7, last heard of 10\d s ago"):
        Owner(tmp_path)
    forge(tmp_path, age=STALE_AFTER + 1)
    Owner(tmp_path).release()


@pytest.mark.parametrize(
    ("answer", "alive"),
    [
        ("echo RUNNING", True),
        ("echo PENDING", False),
        ("exit 0", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", True),
    ],
)
def test_slurm_is_asked_for_the_job_of_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, alive: bool
) -> None:
    (tmp_path / "bin").mkdir()
    fake_squeue(tmp_path / "bin", monkeypatch, answer)
    forge(tmp_path, job="77")
    if alive:
        with pytest.raises(FolderInUseError, match="process 1 on node7, job 77"):
            Owner(tmp_path)
    else:
        Owner(tmp_path).release()


def test_a_job_that_is_ending_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    asked = tmp_path / "asked"
    fake_squeue(tmp_path / "bin", monkeypatch, f"[ -e {asked} ] || {{ touch {asked}; echo COMPLETING; }}")
    monkeypatch.setattr(owner, "ASKED_EVERY", 0.01)
    forge(tmp_path, job="77")
    Owner(tmp_path).release()
    fake_squeue(tmp_path / "bin", monkeypatch, "echo COMPLETING")
    monkeypatch.setattr(owner, "STALE_AFTER", 0.5)
    forge(tmp_path, job="77")
    begun = time.monotonic()
    Owner(tmp_path).release()
    assert time.monotonic() - begun >= 0.5


def test_a_requeued_job_takes_its_own_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forge(tmp_path, job="77")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    Owner(tmp_path).release()


def test_who_was_thought_dead_notices(tmp_path: Path) -> None:
    mine = Owner(tmp_path)
    forge(tmp_path)
    with pytest.raises(FolderInUseError, match="has been taken over: process 1 on node7"):
        mine.check()
    mine.release()
    assert (tmp_path / MARK).exists(), "the mark of another must stay"


def test_the_mark_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "RENEWED_EVERY", 0.05)
    mine = Owner(tmp_path)
    os.utime(tmp_path / MARK, (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / MARK).stat().st_mtime < 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    mine.release()


def test_a_mark_that_cannot_be_read_protects_for_as_long(tmp_path: Path) -> None:
    (tmp_path / MARK).write_text("nonsense")
    with pytest.raises(FolderInUseError, match="an unknown process"):
        Owner(tmp_path)
    os.utime(tmp_path / MARK, (0, 0))
    Owner(tmp_path).release()


def test_a_full_disk_is_no_place_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(
        ValueError, match=f'^job.dump_folder = "{tmp_path}" cannot be written: No space left on device$'
    ):
        make_writable(tmp_path)
