"""Whole conversions, with `transformers` as the judge: the same bits and the same logits, whichever way they go."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from transformers import LlamaForCausalLM

from tests.checkpoints import read_checkpoint, whole
from tests.llamas import MODEL_FLAGS, SHAPE, llama, loaded, logits, meta_weights, to_dcp, to_llama, write_meta_layout
from tests.models import small_model, train_a_little
from torchtitan.checkpoint.checkpointer import Checkpointer
from torchtitan.checkpoint.init_from import find_weights, load_weights
from torchtitan.checkpoint.state import model_tensors
from torchtitan.convert.weights import model_weights
from torchtitan.distributed.world import World
from torchtitan.models.llama.model import Transformer
from torchtitan.models.llama.shape import ModelShape

SCALED = replace(SHAPE, rope_scaling="llama3.1")


def laid_out(folder: Path, model: LlamaForCausalLM, layout: str) -> Path:
    """The model in Meta's layout with some shards, or in Hugging Face's with one file or several."""
    if layout.startswith("meta"):
        return write_meta_layout(folder, model, shards=int(layout.removeprefix("meta ")))
    model.save_pretrained(folder, max_shard_size="150KB" if layout == "hf sharded" else "1GB")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (layout == "hf sharded")
    return folder


def started(world: World, source: Path, *argv: str) -> tuple[Transformer, torch.optim.Optimizer, Checkpointer]:
    """A model of this project that has started from a converted checkpoint."""
    config, model, optimizer = small_model(world, *MODEL_FLAGS, "--checkpoint.init_from", str(source), *argv)
    load_weights(model, find_weights(model, config.checkpoint))
    return model, optimizer, Checkpointer(config, model)


@pytest.mark.parametrize(
    ("layout", "tied", "shape"),
    [
        ("meta 1", False, SHAPE),
        ("meta 1", False, SCALED),
        ("meta 2", True, SCALED),
        ("meta 8", False, SHAPE),
        ("hf", False, SHAPE),
        ("hf", True, SCALED),
        ("hf sharded", False, SCALED),
        ("hf sharded", True, SHAPE),
    ],
)
def test_in_trained_a_step_and_out_again(
    world: World, tmp_path: Path, layout: str, tied: bool, shape: ModelShape
) -> None:
    original = llama(shape, tied=tied)
    source = laid_out(tmp_path / "source", original, layout)
    converted = to_dcp(source, tmp_path / "dcp", "--keep_embeddings")
    more = ("--job.dump_folder", str(tmp_path), "--model.rope_scaling", shape.rope_scaling)
    model, optimizer, checkpointer = started(world, converted, *more)
    torch.testing.assert_close(logits(model), logits(original), rtol=1e-4, atol=1e-4)

    train_a_little(model, optimizer, steps=1)
    assert (logits(model) - logits(original)).abs().max() > 1e-2
    checkpointer.save(1, {"cursor": 0}, optimizer)
    exported = to_llama(tmp_path / "checkpoint", tmp_path / "hf", "--format", "hf")
    theirs = loaded(exported)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    ours = {name.removeprefix("model."): weight for name, weight in whole(model_tensors(model)).items()}
    found = meta_weights(theirs)
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[name], ours[name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["meta 1", "meta 8", "hf", "hf sharded"])
def test_any_way_round_gives_the_same_bits(tmp_path: Path, start: str, dtype: torch.dtype) -> None:
    original = llama(SCALED)
    nn.Module.to(original, dtype)
    if start.startswith("meta"):
        source = write_meta_layout(tmp_path / "source", original, int(start[-1]), dtype)
    else:
        source = laid_out(tmp_path / "source", original, start)
    expected = meta_weights(original)

    first = to_dcp(source, tmp_path / "dcp", "--keep_embeddings")
    pth = to_llama(first, tmp_path / "pth")
    hf = to_llama(first, tmp_path / "hf", "--format", "hf", "--max_shard_size", "60KB")
    assert len(list(hf.glob("*.safetensors"))) > 5
    again_from_pth = to_dcp(pth, tmp_path / "dcp-pth", "--keep_embeddings")
    again_from_hf = to_dcp(hf, tmp_path / "dcp-hf", "--keep_embeddings")
    for folder in (first, again_from_pth, again_from_hf):
        found = read_checkpoint(folder)
        assert found.keys() == {f"model.{name}" for name in expected}
        for name, weight in expected.items():
            assert found[f"model.{name}"].dtype == dtype
            assert torch.equal(found[f"model.{name}"], weight), name

    for mapped in (True, False):
        stored = torch.load(pth / "consolidated.00.pth", weights_only=True, mmap=mapped)
        assert list(stored) == list(model_weights(SCALED))
        assert all(stored[name].dtype == dtype and torch.equal(stored[name], expected[name]) for name in expected)
    theirs = loaded(hf)
    assert theirs.dtype == dtype
    # `original.to(bfloat16)` has rounded its table of frequencies, which loading a model does not: compare in float32.
    judge = llama(SCALED)
    judge.load_state_dict(original.state_dict())
    assert torch.equal(logits(theirs.float()), logits(judge))
    unscaled = llama(SHAPE)
    unscaled.load_state_dict(original.state_dict())
    assert (logits(theirs) - logits(unscaled)).abs().max() > 1e-2, "a lost scaling would not show"
    assert theirs.config.rope_parameters == original.config.rope_parameters
    # From the second conversion on, the files are the same too.
    assert (to_llama(again_from_hf, tmp_path / "again") / "consolidated.00.pth").read_bytes() == (
        pth / "consolidated.00.pth"
    ).read_bytes()


def test_dtype_is_changed_only_where_it_is_asked_for(tmp_path: Path) -> None:
    original = llama(SHAPE)
    converted = to_dcp(write_meta_layout(tmp_path / "source", original), tmp_path / "dcp", "--keep_embeddings")
    narrow = to_llama(converted, tmp_path / "narrow", "--format", "hf", "--dtype", "bfloat16")
    theirs = loaded(narrow)
    assert theirs.dtype == torch.bfloat16
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(theirs.parameters(), original.parameters(), strict=True))
    wide = to_llama(to_dcp(narrow, tmp_path / "back", "--keep_embeddings"), tmp_path / "wide", "--dtype", "float32")
    stored = torch.load(wide / "consolidated.00.pth", weights_only=True)
    assert torch.equal(stored["output.weight"], original.lm_head.weight.bfloat16().float())


def test_without_embeddings_it_is_what_a_training_starts_from(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """bf16, of another vocabulary: widened, and the two layers left at their initial values."""
    original = llama(replace(SCALED, vocab_size=160))
    source = write_meta_layout(tmp_path / "source", original, dtype=torch.bfloat16)
    converted = to_dcp(source, tmp_path / "dcp")
    table = capsys.readouterr().out
    assert "left out: tok_embeddings.weight" in table
    assert "of another vocabulary" in table
    record = json.loads((converted / "checkpoint.json").read_text())
    assert record["model"] == {**asdict(SCALED), "vocab_size": 160}
    missing = ("--checkpoint.init_missing_keys", "tok_embeddings.weight", "--checkpoint.init_missing_keys")
    flags = (*missing, "output.weight", "--model.rope_scaling", "llama3.1")
    model, _, _ = started(world, converted, *flags)
    weights = whole(model_tensors(model))
    expected = meta_weights(original)
    del expected["tok_embeddings.weight"], expected["output.weight"]
    assert all(torch.equal(weights[f"model.{name}"], w.bfloat16().float()) for name, w in expected.items())
    with pytest.raises(ValueError, match=r"rope_scaling is llama3\.1 there and none here"):
        started(world, converted, *missing, "output.weight")
    with pytest.raises(ValueError, match=r"missing: tok_embeddings\.weight"):
        to_llama(converted, tmp_path / "out")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_older_checkpoints_need_flavor_and_rope_scaling(tmp_path: Path, prefix: str) -> None:
    """Flat or behind `model.`, with a table of frequencies, beside a training's state."""
    shape = replace(SHAPE, dim=128, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=448, vocab_size=200)
    original = llama(shape)
    expected = meta_weights(original)
    stored = {prefix + name: weight for name, weight in expected.items()}
    stored[f"{prefix}freqs_cis"] = torch.zeros(16, 4, dtype=torch.complex64)
    stored |= {"optimizer.state.norm.weight.exp_avg": torch.ones(128), "train_state": {"step": 3}}  # type: ignore[dict-item]
    dcp.save(stored, checkpoint_id=tmp_path / "old", no_dist=True)
    for flags, missing in (
        ((), "--flavor and --rope_scaling"),
        (("--flavor", "debug"), "give --rope_scaling"),
        (("--rope_scaling", "none"), "give --flavor"),
    ):
        with pytest.raises(ValueError, match=missing):
            to_llama(tmp_path / "old", tmp_path / "out", *flags)
    with pytest.raises(ValueError, match="does not hold the 16 layers of --flavor 250M: it has 4, without 4, 5"):
        to_llama(tmp_path / "old", tmp_path / "out", "--flavor", "250M", "--rope_scaling", "none")
    assert not (tmp_path / "out").exists()
    flags = ("--flavor", "debug", "--rope_scaling", "none", "--format", "hf")
    theirs = loaded(to_llama(tmp_path / "old", tmp_path / "out", *flags))
    assert torch.equal(logits(theirs), logits(original))


def test_what_the_record_says_cannot_be_contradicted(tmp_path: Path) -> None:
    source = write_meta_layout(tmp_path / "source", llama(SHAPE))
    converted = to_dcp(source, tmp_path / "dcp", "--keep_embeddings")
    with pytest.raises(ValueError, match=r"--rope_scaling llama3\.1: .* records none"):
        to_llama(converted, tmp_path / "out", "--rope_scaling", "llama3.1")
    with pytest.raises(ValueError, match=r"--flavor debug is not the model of .*: n_layers is 4 there and 2 here"):
        to_llama(converted, tmp_path / "out", "--flavor", "debug")
    with pytest.raises(ValueError, match=r"--rope_scaling llama3\.1: by use_scaled_rope in .* it is none"):
        to_dcp(source, tmp_path / "out", "--rope_scaling", "llama3.1")
