"""The way of `lang-primate`, with the README's commands and a small Llama: convert, train, resume, convert back."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from tests.checkpoints import read_checkpoint
from tests.helpers import random_recordings, write_recordings
from tests.llamas import SHAPE, llama, loaded, logits, meta_weights, to_llama, write_meta_layout
from tests.processes import run, train
from torchtitan.models.llama.attention import BACKENDS, Attention
from torchtitan.models.llama.model import Transformer

SCALED = replace(SHAPE, rope_scaling="llama3.1")


def convert(script: str, source: Path, output: Path, *flags: str) -> Path:
    done = run([sys.executable, script, "--input_dir", str(source), "--output_dir", str(output), *flags])
    assert done.returncode == 0, done.stdout
    return output


def test_from_llama_to_a_model_of_spikes(tmp_path: Path) -> None:
    original = llama(replace(SCALED, vocab_size=160))
    source = write_meta_layout(tmp_path / "llama", original, dtype=torch.bfloat16)
    start = convert("llama_to_dcp.py", source, tmp_path / "llama-dcp")

    rows = random_recordings([(6, 100), (4, 80)], largest=3)
    recordings = write_recordings(tmp_path / "recordings", {"train": rows, "test": rows[1:]})
    small = ("--model.flavor", "debug", "--model.n_layers", "2", "--model.n_heads", "16", "--model.n_kv_heads", "8")
    short = ("--training.seq_len", "64", "--training.steps", "4", "--training.warmup_steps", "1")
    run_flags = (
        *("--job.config_file", "train_configs/lang_primate_8b_131k.toml", "--job.dump_folder", str(tmp_path / "run")),
        *(*small, "--model.ffn_dim", "192", *short, "--training.vocab_size", "96", "--training.compile", "false"),
        *("--training.dataset_path", str(recordings), "--training.mixed_precision_param", "float32"),
        *("--checkpoint.init_from", str(start), "--checkpoint.interval", "2", "--optimizer.lr", "1e-3"),
    )
    said = train(*run_flags, "--training.stop_after_step", "2")
    assert f"starting from the weights in {start}, widened from torch.bfloat16 to float32; left at their random" in said
    assert "resuming from" in train(*run_flags, processes=3)  # 128 rows over 3 processes: pieces of unequal size

    checkpoints = tmp_path / "run/checkpoint"
    theirs = loaded(convert("dcp_to_llama.py", checkpoints, tmp_path / "hf", "--format", "hf"))
    model = Transformer(SCALED, Attention(BACKENDS["sdpa"], ""), max_length=64)
    trained = read_checkpoint(checkpoints / "step-4")
    model.load_state_dict({name[6:]: tensor for name, tensor in trained.items() if name.startswith("model.")})
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    assert theirs.config.max_position_embeddings == 64
    assert theirs.generation_config.bos_token_id == 95
    # Its type asks for attributes that only other models have.
    assert cast(Any, theirs).generate(torch.tensor([[95]]), max_new_tokens=8).shape == (1, 9)
    card = (tmp_path / "hf/README.md").read_text()
    assert "| started from | llama |" in card
    tokens_seen = f"| tokens seen | {64 * (2 * 1 + 2 * 3)} |"
    assert tokens_seen in card
    # The weights have moved from Llama's, and not far.
    for name, weight in meta_weights(original).items():
        if name.startswith("layers."):
            moved = (trained[f"model.{name}"] - weight.bfloat16().float()).abs().max()
            assert 0 < moved < 0.01, name

    # The export that ends the run is rounded to bf16, and goes the same way.
    exported = to_llama(checkpoints / "export/step-4", tmp_path / "pth")
    stored = torch.load(exported / "consolidated.00.pth", weights_only=True)
    assert all(torch.equal(weight, trained[f"model.{name}"].bfloat16()) for name, weight in stored.items())
    assert json.loads((exported / "params.json").read_text())["use_scaled_rope"] is True
    assert tokens_seen in (exported / "README.md").read_text()
