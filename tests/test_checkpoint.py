"""Saving, committing, retention, resuming, and the refusals of all that does not fit."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.checkpoints import read_checkpoint
from tests.models import small_model, train_a_little
from torchtitan.checkpoint import folders
from torchtitan.checkpoint.checkpointer import Checkpointer
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors
from torchtitan.distributed.world import World

DATA = {"cursor": 12, "fingerprint": "f", "seed": 0}


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the tensors, gathered from their shards."""
    return {name: t.full_tensor().clone() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}


def saved(world: World, folder: Path, *argv: str, steps: tuple[int, ...] = (1,)) -> dict[str, torch.Tensor]:
    """A checkpoint of each step; returns weights and optimizer state of the last."""
    config, model, optimizer = small_model(world, "--job.dump_folder", str(folder), *argv)
    checkpointer = Checkpointer(config, model, optimizer)
    for step in steps:
        train_a_little(model, optimizer)
        checkpointer.save(step, {**DATA, "cursor": 12 * step})
    checkpointer.wait()
    return whole(model_tensors(model) | optimizer_tensors(model, optimizer))


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_what_is_saved_comes_back_bit_for_bit(world: World, tmp_path: Path, mode: str) -> None:
    argv = ("--job.dump_folder", str(tmp_path), "--checkpoint.async_mode", mode)
    config, model, optimizer = small_model(world, *argv)
    checkpointer = Checkpointer(config, model, optimizer)
    for step in (1, 2):
        train_a_little(model, optimizer)
        expected = whole(model_tensors(model) | optimizer_tensors(model, optimizer))
        random = torch.get_rng_state()
        checkpointer.save(step, {**DATA, "cursor": 12 * step})
        # What goes on changing while a save in the background is under way must not get into it.
        train_a_little(model, optimizer)
        torch.rand(3)
    checkpointer.wait()

    config, model, optimizer = small_model(world, *argv, seed=1)
    record = Checkpointer(config, model, optimizer).resume()
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
    Checkpointer(config, model, optimizer).save(1, DATA)
    expected = train_a_little(model, optimizer, steps=4)
    config, model, optimizer = small_model(world, *argv, seed=1)
    Checkpointer(config, model, optimizer).resume()
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


def test_an_unfinished_step_does_not_count_and_does_not_get_in_the_way(world: World, tmp_path: Path) -> None:
    saved(world, tmp_path)
    unfinished = tmp_path / "checkpoint/step-2.tmp"
    unfinished.mkdir()
    (unfinished / "__7_0.distcp").write_text("of another run")
    (tmp_path / "checkpoint/step-3").mkdir()
    config, model, optimizer = small_model(world, "--job.dump_folder", str(tmp_path))
    checkpointer = Checkpointer(config, model, optimizer)
    record = checkpointer.resume()
    assert record is not None
    assert record["step"] == 1
    train_a_little(model, optimizer)
    checkpointer.save(2, DATA)
    assert not unfinished.exists()
    assert not (tmp_path / "checkpoint/step-2/__7_0.distcp").exists()


def test_load_step(world: World, tmp_path: Path) -> None:
    saved(world, tmp_path, steps=(1, 2))

    def resume(step: str) -> int:
        config, model, optimizer = small_model(
            world, "--job.dump_folder", str(tmp_path), "--checkpoint.load_step", step
        )
        record = Checkpointer(config, model, optimizer).resume()
        assert record is not None
        return record["step"]

    assert resume("1") == 1
    with pytest.raises(ValueError, match=r"load_step = 7: no complete checkpoint.*there are 1, 2"):
        resume("7")


def test_load_step_without_any_checkpoint_is_no_fresh_start(world: World, tmp_path: Path) -> None:
    argv = ("--job.dump_folder", str(tmp_path), "--checkpoint.load_step", "3")
    with pytest.raises(ValueError, match="there is no checkpoint at all"):
        Checkpointer(*small_model(world, *argv)).resume()
    assert Checkpointer(*small_model(world, *argv[:2])).resume() is None


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
    other = small_model(world, "--job.dump_folder", str(tmp_path), *argv)
    with pytest.raises(ValueError, match=message):
        Checkpointer(*other).resume()


def test_tensors_that_are_not_the_models_are_all_listed(world: World, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    saved(world, tmp_path)
    step = tmp_path / "checkpoint/step-1"
    tensors = read_checkpoint(step)
    del tensors["model.norm.weight"]
    tensors["model.surplus"] = torch.zeros(2)
    tensors["model.output.weight"] = tensors["model.output.weight"][:9]
    tensors["optimizer.state.norm.weight.exp_avg"] = tensors["optimizer.state.norm.weight.exp_avg"].double()
    dcp.save(tensors, checkpoint_id=step, no_dist=True)
    model = small_model(world, "--job.dump_folder", str(tmp_path))
    with pytest.raises(ValueError, match="does not fit") as caught:
        Checkpointer(*model).resume()
    text = str(caught.value)
    assert "missing: model.norm.weight" in text
    assert "unexpected: model.surplus" in text
    assert "other shape: model.output.weight is [9, 32] there and [256, 32] here" in text
    assert "other dtype: optimizer.state.norm.weight.exp_avg is torch.float64 there and torch.float32 here" in text


def test_a_damaged_record_is_named(world: World, tmp_path: Path) -> None:
    saved(world, tmp_path)
    record = tmp_path / "checkpoint/step-1/checkpoint.json"
    record.write_text(record.read_text()[:50])
    with pytest.raises(ValueError, match=r"checkpoint\.json cannot be read"):
        Checkpointer(*small_model(world, "--job.dump_folder", str(tmp_path))).resume()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export(world: World, tmp_path: Path, dtype: torch.dtype) -> None:
    config, model, optimizer = small_model(world, "--job.dump_folder", str(tmp_path))
    Checkpointer(config, model, optimizer).export(4, dtype)
    exported = read_checkpoint(tmp_path / "checkpoint/export/step-4")
    weights = whole(model_tensors(model))
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name].to(dtype)) for name in weights)
