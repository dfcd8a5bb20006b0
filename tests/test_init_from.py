"""Starting from other weights: what fits, what is widened, and what is refused."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.checkpoints import DATA, read_checkpoint, saved, whole
from tests.models import small_model, train_a_little
from torchtitan.checkpoint.checkpointer import Checkpointer
from torchtitan.checkpoint.init_from import find_weights, load_weights
from torchtitan.checkpoint.manifest import DamagedCheckpointError
from torchtitan.checkpoint.state import model_tensors
from torchtitan.distributed.world import World

MISSING = ("--checkpoint.init_missing_keys", "tok_embeddings.weight", "--checkpoint.init_missing_keys", "output.weight")


def weights(world: World) -> dict[str, torch.Tensor]:
    """The weights of a model that has been trained a little, under their bare names."""
    _, model, optimizer = small_model(world, seed=5)
    train_a_little(model, optimizer)
    return {name.removeprefix("model."): tensor for name, tensor in whole(model_tensors(model)).items()}


def start(world: World, source: Path, *argv: str) -> dict[str, torch.Tensor]:
    """The weights of a fresh model after starting from `source`."""
    config, model, _ = small_model(world, "--checkpoint.init_from", str(source), *argv)
    load_weights(model, find_weights(model, config.checkpoint))
    return {name.removeprefix("model."): tensor for name, tensor in whole(model_tensors(model)).items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("buffer", [False, True])
def test_another_programs_weights(world: World, tmp_path: Path, prefix: str, buffer: bool) -> None:
    expected = weights(world)
    stored = {prefix + name: tensor for name, tensor in expected.items()}
    if buffer:
        stored[f"{prefix}freqs_cis"] = torch.zeros(16, 4, dtype=torch.complex64)
    if prefix:  # a whole training checkpoint holds more than the weights, and not only tensors
        stored |= {"optimizer.state.norm.weight.exp_avg": torch.ones(32), "train_state": {"step": 3}}  # type: ignore[dict-item]
    dcp.save(stored, checkpoint_id=tmp_path, no_dist=True)
    assert_equal(start(world, tmp_path), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_widened(world: World, tmp_path: Path, dtype: torch.dtype) -> None:
    narrow = {name: tensor.to(dtype) for name, tensor in weights(world).items()}
    dcp.save(narrow, checkpoint_id=tmp_path, no_dist=True)
    assert_equal(start(world, tmp_path), {name: tensor.float() for name, tensor in narrow.items()})


def test_narrowing_is_refused(world: World, tmp_path: Path) -> None:
    dcp.save({name: t.double() for name, t in weights(world).items()}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match=r"other dtype: norm\.weight is torch\.float64 there and torch\.float32 here"):
        start(world, tmp_path)


def test_another_run(world: World, tmp_path: Path) -> None:
    """Its checkpoint folder, of which the newest step counts; one of its steps; its export."""
    config, model, optimizer = small_model(
        world, "--job.dump_folder", str(tmp_path), "--checkpoint.export_dtype", "bfloat16"
    )
    checkpointer = Checkpointer(config, model)
    checkpointer.export(0, DATA)
    first = whole(model_tensors(model))
    train_a_little(model, optimizer)
    checkpointer.save(9, {"cursor": 0}, optimizer)
    nine = whole(model_tensors(model))
    train_a_little(model, optimizer)
    checkpointer.save(10, {"cursor": 0}, optimizer)
    ten = whole(model_tensors(model))
    root = tmp_path / "checkpoint"
    for source, expected in ((root, ten), (root / "step-9", nine)):
        assert_equal(start(world, source), {name.removeprefix("model."): t for name, t in expected.items()})
    exported = start(world, root / "export/step-0")
    assert_equal(exported, {name.removeprefix("model."): t.bfloat16().float() for name, t in first.items()})


def test_only_the_keys_that_the_configuration_names_may_be_missing(world: World, tmp_path: Path) -> None:
    expected = weights(world)
    body = {name: t for name, t in expected.items() if name not in ("tok_embeddings.weight", "output.weight")}
    dcp.save(body, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match=r"missing: model.tok_embeddings|missing: tok_embeddings") as caught:
        start(world, tmp_path)
    assert "missing: output.weight" in str(caught.value)
    found = start(world, tmp_path, *MISSING)
    assert_equal({name: found[name] for name in body}, body)
    as_in_the_error = [key.replace("tok_embeddings", "model.tok_embeddings") for key in MISSING]
    assert_equal(start(world, tmp_path, *as_in_the_error), found)
    _, fresh, _ = small_model(world)
    initial = whole(model_tensors(fresh))
    assert torch.equal(found["output.weight"], initial["model.output.weight"])
    # Named as missing, but there: then they are taken.
    dcp.save(expected, checkpoint_id=tmp_path / "whole", no_dist=True)
    assert_equal(start(world, tmp_path / "whole", *MISSING), expected)


def test_everything_that_does_not_fit_is_listed(world: World, tmp_path: Path) -> None:
    stored = weights(world)
    del stored["layers.1.ffn_norm.weight"]
    stored["layers.2.ffn_norm.weight"] = torch.ones(32)
    stored["output.weight"] = stored["output.weight"][:100]
    dcp.save(stored, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match="does not fit") as caught:
        start(world, tmp_path)
    text = str(caught.value)
    assert "missing: layers.1.ffn_norm.weight" in text
    assert "unexpected: layers.2.ffn_norm.weight" in text
    assert "other shape: output.weight is [100, 32] there and [256, 32] here" in text


def test_rope_scaling_must_match_and_unrecorded_means_none(world: World, tmp_path: Path) -> None:
    dcp.save(weights(world), checkpoint_id=tmp_path / "unrecorded", no_dist=True)
    with pytest.raises(ValueError, match=r"rope_scaling is none there and llama3\.1 here"):
        start(world, tmp_path / "unrecorded", "--model.rope_scaling", "llama3.1")
    saved(world, tmp_path, "--model.rope_scaling", "llama3.1")
    start(world, tmp_path / "checkpoint", "--model.rope_scaling", "llama3.1")
    with pytest.raises(ValueError, match=r"rope_scaling is llama3\.1 there and none here"):
        start(world, tmp_path / "checkpoint")


def test_heads_are_compared_though_no_weight_shows_them(world: World, tmp_path: Path) -> None:
    saved(world, tmp_path)
    with pytest.raises(ValueError, match="n_heads is 4 there and 2 here"):
        start(world, tmp_path / "checkpoint", "--model.n_heads", "2", "--model.n_kv_heads", "1")


def test_places_without_weights(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        start(world, tmp_path / "absent")
    with pytest.raises(ValueError, match="neither a DCP checkpoint nor steps of one"):
        start(world, tmp_path)
    saved(world, tmp_path / "run")
    with pytest.raises(ValueError, match=r"nor steps of one; did you mean .*run/checkpoint\?"):
        start(world, tmp_path / "run")
    (tmp_path / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="metadata cannot be read"):
        start(world, tmp_path)


def test_missing_keys_that_are_no_weights(world: World, tmp_path: Path) -> None:
    dcp.save(weights(world), checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match=r"names no weights of the model: outputs\.weight"):
        start(world, tmp_path, "--checkpoint.init_missing_keys", "outputs.weight")


def test_what_has_no_manifest_is_loaded_with_a_warning(
    world: World, tmp_path: Path, warnings_logged: pytest.LogCaptureFixture
) -> None:
    dcp.save(weights(world), checkpoint_id=tmp_path / "old", no_dist=True)
    start(world, tmp_path / "old")
    assert f"{tmp_path}/old has no manifest" in warnings_logged.text
    warnings_logged.clear()
    saved(world, tmp_path)
    start(world, tmp_path / "checkpoint")
    assert "has no manifest" not in warnings_logged.text


def test_damaged_weights_are_refused(world: World, tmp_path: Path) -> None:
    saved(world, tmp_path)
    shard = tmp_path / "checkpoint/step-1/__0_0.distcp"
    content = bytearray(shard.read_bytes())
    position = content.index(read_checkpoint(shard.parent)["model.norm.weight"].numpy().tobytes())
    content[position] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"__0_0\.distcp differs from its checksum"):
        start(world, shard.parent)
    start(world, shard.parent, "--checkpoint.verify", "size")


def test_a_record_by_hand_adopts_weights_trained_with_scaling(world: World, tmp_path: Path) -> None:
    expected = weights(world)
    dcp.save(expected, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "checkpoint.json").write_text('{"format": 1, "model": {"rope_scaling": "llama3.1"}}')
    assert_equal(start(world, tmp_path, "--model.rope_scaling", "llama3.1"), expected)
