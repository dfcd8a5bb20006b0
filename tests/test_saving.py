"""Saves that fail: seen on all ranks, without a half step, by the configured policy."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpoints import DATA
from tests.models import small_model, train_a_little
from tests.processes import run, run_ranks, train_command
from torchtitan.checkpoint import folders, writer
from torchtitan.checkpoint.checkpointer import Checkpointer, SaveError
from torchtitan.checkpoint.staging import KeptStager
from torchtitan.checkpoint.verify import main
from torchtitan.data.loader import Batch
from torchtitan.distributed.world import World, init_world
from torchtitan.owner import MARK, FolderInUseError, Owner

MODES = ["disabled", "async"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, of which a checkpoint of the small model takes 0.5."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def fill(disk: Path) -> Path:
    """Leaves 100 kB."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    ballast.write_bytes(b"x" * (free.f_bavail * free.f_bsize - 100_000))
    return ballast


def save(checkpointer: Checkpointer, step: int, optimizer: torch.optim.Optimizer) -> None:
    """Also where it is done in the background."""
    checkpointer.save(step, DATA, optimizer)
    checkpointer.wait()


@pytest.mark.fault("disk full", "tmpfs of 2 MB, save in the foreground and not", 1, "reported, no half step")
@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk_stops_the_run(world: World, small_disk: Path, mode: str) -> None:
    config, model, optimizer = small_model(world, "--job.dump_folder", str(small_disk), "--checkpoint.async_mode", mode)
    train_a_little(model, optimizer)
    checkpointer = Checkpointer(config, model)
    save(checkpointer, 1, optimizer)
    fill(small_disk)
    with pytest.raises(SaveError, match=r"step-2 could not be written: rank 0: OSError: .*No space left"):
        save(checkpointer, 2, optimizer)
    assert [path.name for path in checkpointer.root.iterdir()] == ["step-1"]
    assert folders.complete_steps(checkpointer.root) == [1]


@pytest.mark.fault("disk full", "the same with on_save_error = continue", 1, "the next save succeeds")
@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk_may_be_waited_out(world: World, small_disk: Path, mode: str) -> None:
    argv = ("--checkpoint.async_mode", mode, "--checkpoint.on_save_error", "continue")
    config, model, optimizer = small_model(world, "--job.dump_folder", str(small_disk), *argv)
    train_a_little(model, optimizer)
    checkpointer = Checkpointer(config, model)
    ballast = fill(small_disk)
    save(checkpointer, 1, optimizer)
    ballast.unlink()
    save(checkpointer, 2, optimizer)
    assert folders.complete_steps(checkpointer.root) == [2]
    assert not checkpointer.is_saved(1)


def fail_on_rank_one(folder: str, mode: str) -> None:
    """On each rank: a save whose write fails on rank 1 alone, then one that does not."""
    world = init_world(60)
    argv = ("--job.dump_folder", folder, "--checkpoint.async_mode", mode, "--comm.save_timeout_seconds", "20")
    config, model, optimizer = small_model(world, *argv)
    train_a_little(model, optimizer)
    checkpointer = Checkpointer(config, model)
    sync = os.fsync
    if world.rank == 1:

        def broken(descriptor: int) -> None:
            raise OSError(5, "Input/output error")

        writer.os.fsync = broken
    with pytest.raises(SaveError, match=r"rank 1: OSError: .*Input/output error"):
        save(checkpointer, 1, optimizer)
    writer.os.fsync = sync
    assert not checkpointer.is_saved(1)
    save(checkpointer, 1, optimizer)
    assert checkpointer.is_saved(1)
    dist.destroy_process_group()


@pytest.mark.fault("write error", "EIO on one of two ranks", 1, "raised on both, no half step")
@pytest.mark.parametrize("mode", MODES)
def test_an_error_on_one_rank_is_raised_on_all(tmp_path: Path, mode: str) -> None:
    run_ranks(fail_on_rank_one, 2, str(tmp_path), mode)
    assert folders.complete_steps(tmp_path / "checkpoint") == [1]


def fail_behind_training(folder: str, policy: str) -> None:
    """On each rank: a run whose save of step 3, in the background, fails on rank 1 while all are at step 4."""
    from torchtitan.config import load_config
    from torchtitan.trainer import Trainer

    world = init_world(60)
    argv = ["--training.dataset", "synthetic", "--training.seq_len", "32", "--training.steps", "7"]
    argv += ["--training.num_workers", "0", "--model.n_layers", "1", "--job.dump_folder", folder]
    argv += ["--checkpoint.interval", "3", "--checkpoint.async_mode", "async", "--checkpoint.on_save_error", policy]
    training = Trainer(load_config([*argv, "--training.mixed_precision_param", "float32"]), world)
    step, sync = training.train_step, os.fsync

    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    def until_it_has_failed(batches: Iterator[Batch]) -> Any:
        if training.step == 4:
            assert training.checkpointer.pending is not None
            assert training.checkpointer.pending.saving.exception(60)
        writer.os.fsync = broken if world.rank == 1 and training.step < 4 else sync
        return step(batches)

    training.train_step = until_it_has_failed
    if policy == "stop":
        with pytest.raises(SaveError, match=r"step-3 could not be written: rank 1: OSError: .*Input/output error"):
            training.train()
        assert training.step == 4
        training.give_up()
    else:
        training.train()
    dist.destroy_process_group()


@pytest.mark.fault("write error", "EIO on one of two ranks, beside a training", 1, "by policy, at the next step")
@pytest.mark.parametrize(("policy", "steps", "outcome"), [("stop", [], "broken"), ("continue", [6, 7], "finished")])
def test_a_training_sees_the_error_at_its_next_step(
    tmp_path: Path, policy: str, steps: list[int], outcome: str
) -> None:
    run_ranks(fail_behind_training, 2, str(tmp_path), policy)
    assert folders.complete_steps(tmp_path / "checkpoint") == steps
    assert len(list((tmp_path / "checkpoint").iterdir())) == len(steps)
    assert json.loads((tmp_path / "outcome.json").read_text())["outcome"] == outcome


def test_a_run_whose_export_fails_has_not_finished(tmp_path: Path) -> None:
    """Also where the policy is to train on: nothing comes after it."""
    argv = ["--training.dataset", "synthetic", "--training.seq_len", "32", "--training.steps", "2"]
    argv += ["--model.n_layers", "1", "--job.dump_folder", str(tmp_path), "--checkpoint.model_weights_only"]
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/export").write_text("in the way")
    done = run(train_command(*argv, "--checkpoint.on_save_error", "continue"))
    assert done.returncode == 1
    assert "error: the weights of the last step, 2, are not exported" in done.stdout
    assert folders.complete_steps(tmp_path / "checkpoint") == [2]
    assert json.loads((tmp_path / "outcome.json").read_text())["outcome"] == "broken"


@pytest.mark.fault("lost write", "file cut behind DCP's back", 1, "not committed")
def test_a_file_that_is_shorter_on_disk_is_not_committed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a write error would leave behind that nobody has reported."""
    config, model, optimizer = small_model(world, "--job.dump_folder", str(tmp_path))
    train_a_little(model, optimizer)

    def cut(descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - 1)

    monkeypatch.setattr(writer.os, "fsync", cut)
    with pytest.raises(SaveError, match=r"__0_0\.distcp has [\d,]+ bytes on disk, and [\d,]+ were written"):
        Checkpointer(config, model).save(1, DATA, optimizer)
    assert not list((tmp_path / "checkpoint").iterdir())


@pytest.mark.fault("two writers", "taken over while it writes a step", 1, "commits and removes nothing")
@pytest.mark.parametrize("mode", MODES)
def test_who_was_thought_dead_changes_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The new owner may be writing to a temporary folder of the same name."""
    argv = ("--job.dump_folder", str(tmp_path), "--checkpoint.async_mode", mode, "--checkpoint.keep_latest_k", "1")
    config, model, optimizer = small_model(world, *argv, "--checkpoint.on_save_error", "continue")
    train_a_little(model, optimizer)
    owner = Owner(tmp_path)
    checkpointer = Checkpointer(config, model, owner.check)
    save(checkpointer, 1, optimizer)
    mark = json.loads((tmp_path / MARK).read_text())

    def taken_over(descriptor: int) -> None:
        (tmp_path / MARK).write_text(json.dumps({**mark, "token": "x", "host": "node7"}))

    monkeypatch.setattr(writer.os, "fsync", taken_over)
    with pytest.raises(FolderInUseError, match=r"has been taken over: process .* on node7"):
        save(checkpointer, 2, optimizer)
    assert sorted(path.name for path in checkpointer.root.iterdir()) == ["step-1", "step-2.tmp"]
    owner.release()


def test_saves_in_the_background_are_copied_to_the_same_memory() -> None:
    stager, state = KeptStager(pinned=False), {"weight": torch.ones(3), "step": torch.tensor(1.0)}
    first = stager.stage(state)
    for tensor in state.values():
        tensor += 1
    assert torch.equal(first["weight"], torch.ones(3))
    memory = first["weight"].data_ptr()
    second = stager.stage(state)
    assert second["weight"].data_ptr() == memory
    assert torch.equal(second["weight"], torch.full((3,), 2.0))
    assert second["step"] == 2


def test_start_up_needs_room_for_two_checkpoints(world: World, small_disk: Path) -> None:
    config, model, _ = small_model(world, "--job.dump_folder", str(small_disk))
    checkpointer = Checkpointer(config, model)
    checkpointer.check_space()
    fill(small_disk)
    size = 12 * sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(ValueError, match=rf"{2 * size:,} bytes are needed .* and [\d,]+ are free"):
        checkpointer.check_space()


def test_verify_prints_a_table_and_says_by_its_status_whether_all_are_good(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, model, optimizer = small_model(world, "--job.dump_folder", str(tmp_path))
    train_a_little(model, optimizer)
    checkpointer = Checkpointer(config, model)
    assert main([str(tmp_path)]) == 2
    for step in (1, 2):
        checkpointer.save(step, DATA, optimizer)
    checkpointer.export(2, DATA)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("good") == 3
    shard = tmp_path / "checkpoint/step-1/__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    assert main([str(tmp_path / "checkpoint/step-2")]) == 0
    assert main([str(tmp_path), "--size"]) == 0
    capsys.readouterr()
    assert main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "step-1" in line and "__0_0.distcp differs from its checksum" in line]
