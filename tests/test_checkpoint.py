"""Saving, committing, retention, resuming, and the refusals of all that does not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.checkpoints import DATA, read_checkpoint, resume, rewritten, saved, whole
from tests.models import small_model, train_a_little
from tests.processes import run_ranks
from torchtitan.checkpoint import folders
from torchtitan.checkpoint.checkpointer import Checkpointer
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors
from torchtitan.distributed.world import World, init_world


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_what_is_saved_comes_back_bit_for_bit(world: World, tmp_path: Path, mode: str) -> None:
    argv = ("--job.dump_folder", str(tmp_path), "--checkpoint.async_mode", mode)
    config, model, optimizer = small_model(world, *argv)
    checkpointer = Checkpointer(config, model)
    for step in (1, 2):
        train_a_little(model, optimizer)
        expected = whole(model_tensors(model) | optimizer_tensors(model, optimizer))
        random = torch.get_rng_state()
        checkpointer.save(step, {**DATA, "cursor": 12 * step}, optimizer)
        # What goes on changing while a save in the background is under way must not get into it.
        train_a_little(model, optimizer)
        torch.rand(3)
    checkpointer.wait()

    config, model, optimizer = small_model(world, *argv, seed=1)
    record = resume(config, model, optimizer)
    assert record is not None
    assert (record["step"], record["data"]["cursor"]) == (2, 24)
    found = whole(model_tensors(model) | optimizer_tensors(model, optimizer))
    assert found.keys() == expected.keys()
    assert any(name.endswith("exp_avg_sq") for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(torch.get_rng_state(), random)


def test_training_goes_on_from_it_as_without_it(world: World, tmp_path: Path) -> None:
    argv = ("--job.dump_folder", str(tmp_path))
    config, model, optimizer = small_model(world, *argv)
    train_a_little(model, optimizer)
    Checkpointer(config, model).save(1, DATA, optimizer)
    expected = train_a_little(model, optimizer, steps=4)
    config, model, optimizer = small_model(world, *argv, seed=1)
    resume(config, model, optimizer)
    assert train_a_little(model, optimizer, steps=4) == expected


def test_all_of_it_is_tensors_and_json(world: World, tmp_path: Path) -> None:
    saved(world, tmp_path)
    step = tmp_path / "checkpoint/step-1"
    read_checkpoint(step)  # asserts that every entry is a tensor
    record = json.loads((step / "checkpoint.json").read_text())
    assert record["model"]["rope_theta"] == 500_000
    assert record["config"]["model"]["dim"] == 32
    assert sorted(path.name for path in step.iterdir()) == [".metadata", "__0_0.distcp", "checkpoint.json"]


def test_keep_latest_k(world: World, tmp_path: Path) -> None:
    saved(world, tmp_path, "--checkpoint.keep_latest_k", "2", steps=(1, 5, 9, 10))
    assert folders.complete_steps(tmp_path / "checkpoint") == [9, 10]
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["step-10", "step-9"]


def test_a_step_that_exists_is_left_as_it_is(world: World, tmp_path: Path) -> None:
    saved(world, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint/step-1").iterdir()}
    saved(world, tmp_path)
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint/step-1").iterdir()}


def test_an_unfinished_step_does_not_count_and_leaves_nothing_behind(world: World, tmp_path: Path) -> None:
    saved(world, tmp_path)
    left_over = [tmp_path / "checkpoint" / name for name in ("step-2.tmp", "step-7.tmp", "step-0.removed")]
    for folder in left_over:
        folder.mkdir()
        (folder / "__7_0.distcp").write_text("of another run")
    config, model, optimizer = small_model(world, "--job.dump_folder", str(tmp_path))
    record = resume(config, model, optimizer)
    assert record is not None
    assert record["step"] == 1
    assert not any(folder.exists() for folder in left_over)
    left_over[0].mkdir()
    (left_over[0] / "__7_0.distcp").write_text("of an interrupted save")
    train_a_little(model, optimizer)
    Checkpointer(config, model).save(2, DATA, optimizer)
    names = sorted(path.name for path in (tmp_path / "checkpoint").rglob("*"))
    assert names == sorted(["step-1", "step-2", *2 * [".metadata", "__0_0.distcp", "checkpoint.json"]])


def test_a_foreign_folder_in_the_way_of_a_step_is_named(world: World, tmp_path: Path) -> None:
    (tmp_path / "checkpoint/step-3").mkdir(parents=True)
    config, model, _ = small_model(world, "--job.dump_folder", str(tmp_path))
    with pytest.raises(ValueError, match=r"step-3 is damaged: it has no checkpoint\.json.*init_from"):
        Checkpointer(config, model).find()


def test_load_step(world: World, tmp_path: Path) -> None:
    """The newer steps are of another continuation: they make room, but are not lost."""
    saved(world, tmp_path, steps=(1, 2, 3))
    argv = ("--job.dump_folder", str(tmp_path), "--checkpoint.load_step")
    config, model, optimizer = small_model(world, *argv, "7")
    with pytest.raises(ValueError, match=r"load_step = 7: no complete checkpoint.*there are 1, 2, 3"):
        Checkpointer(config, model).find()
    config, model, optimizer = small_model(world, *argv, "1")
    record = resume(config, model, optimizer)
    assert record is not None
    assert record["step"] == 1
    assert folders.complete_steps(tmp_path / "checkpoint") == [1]
    aside = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert aside == ["step-1", "step-2.superseded-1", "step-3.superseded-1"]


def test_the_same_command_with_load_step_goes_on_from_what_it_has_written(world: World, tmp_path: Path) -> None:
    saved(world, tmp_path, steps=(1, 2))
    argv = ("--job.dump_folder", str(tmp_path), "--checkpoint.load_step", "1")
    config, model, optimizer = small_model(world, *argv)
    resume(config, model, optimizer)
    Checkpointer(config, model).save(5, DATA, optimizer)
    # Also when retention has removed the step that the command names.
    shutil.rmtree(tmp_path / "checkpoint/step-1")
    found = Checkpointer(config, model).find()
    assert found is not None
    assert found.record["step"] == 5


def test_load_step_beside_weights_of_another_program(world: World, tmp_path: Path) -> None:
    """A converted checkpoint in the place of a step has no configuration that would say what it is."""
    saved(world, tmp_path, steps=(1, 2))
    rewritten(tmp_path / "checkpoint/step-2", lambda record: record.update(kind="weights", config={}))
    config, model, optimizer = small_model(world, "--job.dump_folder", str(tmp_path), "--checkpoint.load_step", "1")
    record = resume(config, model, optimizer)
    assert record is not None
    assert record["step"] == 1


def test_load_step_without_any_checkpoint_is_no_fresh_start(world: World, tmp_path: Path) -> None:
    argv = ("--job.dump_folder", str(tmp_path), "--checkpoint.load_step", "3")
    config, model, _ = small_model(world, *argv)
    with pytest.raises(ValueError, match="there is no checkpoint at all"):
        Checkpointer(config, model).find()
    config, model, _ = small_model(world, *argv[:2])
    assert Checkpointer(config, model).find() is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--training.vocab_size", "200"), "vocab_size is 256 there and 200 here"),
        (("--model.rope_scaling", "llama3.1"), "rope_scaling is none there and llama3.1 here"),
        (("--model.n_heads", "2"), "n_heads is 4 there and 2 here"),
        (("--model.n_layers", "1", "--model.norm_eps", "1e-6"), r"n_layers is 2 there and 1 here\n.*norm_eps"),
    ],
)
def test_another_model_is_refused_by_name(world: World, tmp_path: Path, argv: tuple[str, ...], message: str) -> None:
    saved(world, tmp_path)
    config, model, _ = small_model(world, "--job.dump_folder", str(tmp_path), *argv)
    with pytest.raises(ValueError, match=message):
        Checkpointer(config, model).find()


def test_an_unrecorded_rope_scaling_counts_as_none(world: World, tmp_path: Path) -> None:
    saved(world, tmp_path)
    rewritten(tmp_path / "checkpoint/step-1", lambda record: record["model"].pop("rope_scaling"))
    config, model, _ = small_model(world, "--job.dump_folder", str(tmp_path), "--model.rope_scaling", "llama3.1")
    with pytest.raises(ValueError, match=r"rope_scaling is none there and llama3\.1 here"):
        Checkpointer(config, model).find()


def test_tensors_that_are_not_the_models_are_all_listed(world: World, tmp_path: Path) -> None:
    saved(world, tmp_path)
    step = tmp_path / "checkpoint/step-1"
    tensors = read_checkpoint(step)
    del tensors["model.norm.weight"]
    tensors["model.surplus"] = torch.zeros(2)
    tensors["model.output.weight"] = tensors["model.output.weight"][:9]
    tensors["optimizer.state.norm.weight.exp_avg"] = tensors["optimizer.state.norm.weight.exp_avg"].double()
    rewritten(step, lambda record: None, tensors)
    with pytest.raises(ValueError, match="does not fit") as caught:
        resume(*small_model(world, "--job.dump_folder", str(tmp_path)))
    text = str(caught.value)
    assert "missing: model.norm.weight" in text
    assert "unexpected: model.surplus" in text
    assert "other shape: model.output.weight is [9, 32] there and [256, 32] here" in text
    assert "other dtype: optimizer.state.norm.weight.exp_avg is torch.float64 there and torch.float32 here" in text


def test_an_export_is_no_training_state(world: World, tmp_path: Path) -> None:
    config, model, _ = small_model(world, "--job.dump_folder", str(tmp_path))
    Checkpointer(config, model).export(4, DATA)
    argv = ("--job.dump_folder", str(tmp_path), "--checkpoint.folder", "checkpoint/export")
    config, model, _ = small_model(world, *argv)
    with pytest.raises(ValueError, match=r"does not hold a training state.*init_from"):
        Checkpointer(config, model).find()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export(world: World, tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    config, model, _ = small_model(world, "--job.dump_folder", str(tmp_path), "--checkpoint.export_dtype", name)
    Checkpointer(config, model).export(4, DATA)
    exported = read_checkpoint(tmp_path / "checkpoint/export/step-4")
    weights = whole(model_tensors(model))
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name].to(dtype)) for name in weights)


def save_in_the_background_and_export(folder: str) -> None:
    """On each rank. Both use the same process group: one has to wait for the other."""
    world = init_world(60)
    config, model, optimizer = small_model(
        world, "--job.dump_folder", folder, "--checkpoint.async_mode", "async", "--comm.save_timeout_seconds", "20"
    )
    train_a_little(model, optimizer)
    checkpointer = Checkpointer(config, model)
    checkpointer.save(1, DATA, optimizer)
    checkpointer.export(1, DATA)
    checkpointer.wait()
    dist.destroy_process_group()


def test_a_save_in_the_background_and_an_export_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(save_in_the_background_and_export, 2, str(tmp_path))
    weights = read_checkpoint(tmp_path / "checkpoint/export/step-1")
    step = read_checkpoint(tmp_path / "checkpoint/step-1")
    assert all(torch.equal(weights[name], step[name]) for name in weights)
    assert {"random.0.cpu", "random.1.cpu"} <= step.keys()
