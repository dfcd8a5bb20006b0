"""Llama in Hugging Face's format: `config.json` and safetensors under their names for the weights."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from torchtitan.convert.safetensors_files import open_safetensors, write_safetensors
from torchtitan.convert.settings import agreed_rope_scaling, number, read_json, shape_of
from torchtitan.convert.weights import (
    Source,
    Tensors,
    check_dtypes,
    check_weights,
    group_left_out,
    model_weights,
)
from torchtitan.models.llama import rope
from torchtitan.models.llama.shape import ModelShape

CONFIG = "config.json"
NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "factor": rope.FACTOR,
    "low_freq_factor": rope.LOW,
    "high_freq_factor": rope.HIGH,
    "original_max_position_embeddings": rope.ORIGINAL_CONTEXT,
}
# What `transformers` takes where the key is absent; anything else is another model than ours.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def hf_name(name: str) -> str:
    """Hugging Face's name of a weight."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    return f"model.layers.{layer[1]}.{NAMES[layer[2]]}" if layer else NAMES[name]


def to_hf(name: str, weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """A weight as Hugging Face keeps it, by its name here.

    Rotary positions turn pairs of channels: neighbours in Llama's own code, channel i and i + head_dim / 2 of a head in
    theirs. So the rows of wq and wk lie in another order.
    """
    if not name.endswith(("wq.weight", "wk.weight")):
        return weight
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def from_hf(name: str, weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `to_hf`."""
    if not name.endswith(("wq.weight", "wk.weight")):
        return weight
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def open_hf(folder: Path, rope_scaling: str | None = None) -> Source:
    """The model of a folder in Hugging Face's format; `rope_scaling` must not contradict its `config.json`.

    Where the embeddings are tied, the output layer gets a copy of them.

    Raises:
        ValueError: where a file, a shard, a layer or a key is missing, the model is no Llama, a shape is not that of
            `config.json`, or a file is damaged.
    """
    path = folder / CONFIG
    config = read_json(path)
    shape = _read_config(path, config, rope_scaling)
    stored = open_safetensors(folder)
    theirs = {name: hf_name(name) for name in model_weights(shape)}
    if config.get("tie_word_embeddings", False) and theirs["output.weight"] not in stored.weights:
        theirs["output.weight"] = theirs["tok_embeddings.weight"]
    ours = {their_name: name for name, their_name in theirs.items()}
    tables = {name: weight for name, weight in stored.weights.items() if name.endswith("rotary_emb.inv_freq")}
    found = {ours.get(name, name): weight.shape for name, weight in stored.weights.items() if name not in tables}
    for name, their_name in theirs.items():
        if their_name in stored.weights:
            found[name] = stored.weights[their_name].shape
    order = check_weights(folder, CONFIG, shape, found)
    weights = {name: stored.weights[theirs[name]] for name in order}
    check_dtypes(folder, weights)
    tensors = Tensors(weights, lambda name: from_hf(name, stored.read(theirs[name]), shape.head_dim).contiguous())
    left_out = group_left_out(tables, lambda _: ("rotary_emb.inv_freq", "a table that follows from the shape"))
    return Source(shape, tensors, left_out, {"max_length": config.get("max_position_embeddings")})


def write_hf(folder: Path, shape: ModelShape, tensors: Tensors, max_length: int, max_shard_size: int) -> None:
    """Writes safetensors, `config.json` and `generation_config.json` for `transformers`.

    `max_length`: the number of positions that the model is said to have. No file gets larger than `max_shard_size`
    bytes of weights, unless by a single tensor.
    """
    ours = {hf_name(name): name for name in tensors.weights}
    theirs = Tensors(
        tensors.weights, lambda name: to_hf(name, tensors.read(name), shape.head_dim).contiguous()
    ).renamed(hf_name)
    write_safetensors(folder, theirs, max_shard_size)
    dtypes = [weight.dtype for name, weight in theirs.weights.items() if "layers." in ours[name]]
    config = _config(shape, max(set(dtypes), key=dtypes.count), max_length)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    generation = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **_token_ids(shape)}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _config(shape: ModelShape, dtype: torch.dtype, max_length: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_dim,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": shape.norm_eps,
        "max_position_embeddings": max_length,
        # Both the names of transformers 4, which 5 reads too, and none that only 5 knows.
        "rope_theta": shape.rope_theta,
        "rope_scaling": LLAMA_31_ROPE if shape.rope_scaling == "llama3.1" else None,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
        **FIXED,
        **_token_ids(shape),
    }


def _token_ids(shape: ModelShape) -> dict[str, Any]:
    """BOS is the last token of a vocabulary of spike counts; there is no end, and other vocabularies are unknown."""
    bos = shape.vocab_size - 1 if shape.vocab_size <= 256 else None
    return {"bos_token_id": bos, "eos_token_id": None, "pad_token_id": None}


def _read_config(path: Path, config: dict[str, Any], rope_scaling: str | None) -> ModelShape:
    if config.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type = {json.dumps(config.get('model_type'))}: only llama can be converted")
    if "quantization_config" in config:
        raise ValueError(f"{path}: quantization_config: only weights that are not quantised can be converted")
    n_heads, kv_heads = number(path, config, "num_attention_heads"), "num_key_value_heads"
    rotary = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    shape = shape_of(
        path,
        dim=number(path, config, "hidden_size"),
        n_layers=number(path, config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads if config.get(kv_heads) is None else number(path, config, kv_heads),
        ffn_dim=number(path, config, "intermediate_size"),
        vocab_size=number(path, config, "vocab_size"),
        norm_eps=number(path, config, "rms_norm_eps", float),
        rope_theta=number(path, rotary if "rope_theta" in rotary else config, "rope_theta", float),
        rope_scaling=agreed_rope_scaling(path, "rope_scaling", _rope_scaling(path, rotary), rope_scaling),
    )
    for key, value in {**FIXED, "head_dim": shape.head_dim}.items():
        if config.get(key) not in (None, value):
            raise ValueError(f"{path}: {key} = {json.dumps(config[key])}: only {json.dumps(value)} can be converted")
    return shape


def _rope_scaling(path: Path, rotary: dict[str, Any]) -> str:
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind == "default":
        return "none"
    found = {**rotary, "rope_type": kind}
    different = [f"{key} = {found.get(key)}" for key, value in LLAMA_31_ROPE.items() if found.get(key) != value]
    if different:
        raise ValueError(f"{path}: rope scaling with {', '.join(different)}: only none and that of Llama 3.1 are known")
    return "llama3.1"
