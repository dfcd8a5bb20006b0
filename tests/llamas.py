"""Small Llamas of `transformers` with random weights, laid out as Meta and Hugging Face publish them."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from torchtitan.convert.arguments import parse_dcp_to_llama, parse_llama_to_dcp
from torchtitan.convert.to_dcp import llama_to_dcp
from torchtitan.convert.to_llama import dcp_to_llama
from torchtitan.models.llama.shape import ModelShape

LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Its heads, vocabulary and width of feed-forward can be spread over 8 shards.
SHAPE = ModelShape(dim=128, n_layers=2, n_heads=16, n_kv_heads=8, ffn_dim=192, vocab_size=96)
PARAMS = {"multiple_of": 64, "ffn_dim_multiplier": 0.5}
MODEL_FLAGS = (
    *("--model.dim", "128", "--model.n_layers", "2", "--model.n_heads", "16", "--model.n_kv_heads", "8"),
    *("--model.ffn_dim", "192", "--training.vocab_size", "96"),
)
"""What makes `small_model` one of SHAPE."""
META_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama(shape: ModelShape, *, tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    """One with random weights, norms included."""
    scaling = LLAMA_31 if shape.rope_scaling == "llama3.1" else {"rope_type": "default"}
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        rms_norm_eps=shape.norm_eps,
        max_position_embeddings=131_072,
        rope_parameters={"rope_theta": shape.rope_theta, **scaling},
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def meta_weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Its weights as Meta has them: the inverse of the permutation in transformers' own conversion script."""
    config = model.config
    weights = {}
    for name, weight in model.state_dict().items():
        if name.startswith("model.layers."):
            _, _, layer, *inner, _ = name.split(".")
            kind = ".".join(inner)
            if kind in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if kind == "self_attn.q_proj" else config.num_key_value_heads
                rows, columns = weight.shape
                weight = weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
            weights[f"layers.{layer}.{META_NAMES[kind]}.weight"] = weight.clone()
        else:
            new = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight"}
            weights[new.get(name, "output.weight")] = weight.clone()
    return weights


def write_meta_layout(
    folder: Path, model: LlamaForCausalLM, shards: int = 1, dtype: torch.dtype = torch.float32, **params: Any
) -> Path:
    """`params.json` and that many `consolidated.NN.pth`, split as Meta's model-parallel layers are."""
    config, rotary = model.config, cast(dict[str, Any], model.config.rope_parameters)
    folder.mkdir(parents=True)
    stated = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": rotary["rope_theta"],
        "use_scaled_rope": rotary["rope_type"] == "llama3",
        **PARAMS,
        **params,
    }
    (folder / "params.json").write_text(json.dumps({key: value for key, value in stated.items() if value is not None}))
    weights = {name: weight.to(dtype) for name, weight in meta_weights(model).items()}
    for shard in range(shards):
        part = {"rope.freqs": torch.ones(4)}
        for name, weight in weights.items():
            axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            whole = name.endswith("norm.weight")
            part[name] = weight if whole else weight.chunk(shards, axis)[shard].clone()
        torch.save(part, folder / f"consolidated.{shard:02}.pth")
    return folder


def to_dcp(source: Path, output: Path, *flags: str) -> Path:
    """Runs the conversion in this process."""
    llama_to_dcp(parse_llama_to_dcp(["--input_dir", str(source), "--output_dir", str(output), *flags]))
    return output


def to_llama(source: Path, output: Path, *flags: str) -> Path:
    """Runs the conversion in this process."""
    dcp_to_llama(parse_dcp_to_llama(["--input_dir", str(source), "--output_dir", str(output), *flags]))
    return output


def loaded(folder: Path) -> LlamaForCausalLM:
    """What `transformers` makes of a folder, in the dtype that it says."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert isinstance(model, LlamaForCausalLM)
    return model


@torch.no_grad()
def logits(model: nn.Module, vocab_size: int = SHAPE.vocab_size) -> torch.Tensor:
    """Of some random tokens, by a model of either kind."""
    tokens = torch.randint(vocab_size, (2, 32), generator=torch.Generator().manual_seed(7))
    result = model(tokens)
    return result if isinstance(result, torch.Tensor) else result.logits
