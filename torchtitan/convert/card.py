"""The model card: what a stranger has to know of exported weights."""

import json
from pathlib import Path
from typing import Any

from torchtitan.checkpoint.init_from import checkpoint_folder
from torchtitan.checkpoint.manifest import Record, read_record
from torchtitan.data.recordings import HUB_DATASETS
from torchtitan.models.llama.shape import ModelShape

TOKENS = """\
A recording is a matrix of spike counts, neurons × 20 ms bins. For each bin in turn the sequence has BOS
(token {bos}) and then one token a neuron, in a fixed order: its spike count, clipped to {largest}. Recordings follow
each other without any other separator."""


def model_card(name: str, shape: ModelShape, record: Record, license: str | None, bits_per_spike: float | None) -> str:
    """The text of README.md, with the Hub's metadata at its head; it says only what is known."""
    source = source_weights(record)
    license = license or (source or {}).get("license")
    training = record.get("config", {}).get("training", {})
    data = record.get("data", {})
    facts: dict[str, Any] = {
        "parameters": f"{shape.num_params:,}",
        "shape": f"{shape.n_layers} layers, width {shape.dim}, {shape.n_heads} heads, {shape.n_kv_heads} of keys and "
        f"values, feed-forward width {shape.ffn_dim}, {shape.vocab_size} tokens",
        "rotary positions": f"base {shape.rope_theta:g}, scaling {shape.rope_scaling}",
        "data": _dataset(training),
        "started from": source["name"] if source else "random weights" if training else None,
        "training step": record.get("step"),
        "seed": training.get("seed"),
        "sequence length": training.get("seq_len"),
        "tokens seen": f"{data['cursor'] * data['seq_len']:,}" if {"cursor", "seq_len"} <= data.keys() else None,
        "bits per spike": bits_per_spike,
    }
    metadata = {"license": license, "tags": ["neuroscience", "spiking-neural-activity"]}
    head = [f"{key}: {json.dumps(value)}" for key, value in metadata.items() if value is not None]
    rows = [f"| {key} | {value} |" for key, value in facts.items() if value is not None]
    parts = ["---\n" + "\n".join(head) + "\n---", f"# {name}"]
    if training:
        parts.append("An autoregressive transformer of spiking neural activity.")
    parts.append("\n".join(["| | |", "|---|---|", *rows]))
    if shape.vocab_size <= 256:
        parts.append("## Tokens\n\n" + TOKENS.format(bos=shape.vocab_size - 1, largest=shape.vocab_size - 2))
    parts.append("## Licence\n\n" + _licence(license, source))
    return "\n\n".join(parts) + "\n"


def source_weights(record: Record) -> dict[str, Any] | None:
    """What is known of the weights that a training started from: their `name` and `license`; None: at random ones.

    Where those are another training's, the weights that it started from are what matters.
    """
    source, seen = None, set()
    while "source" not in record:
        init_from = record.get("config", {}).get("checkpoint", {}).get("init_from")
        if init_from is None or init_from in seen:
            return source
        seen.add(init_from)
        try:
            folder = checkpoint_folder(Path(init_from).expanduser(), "checkpoint.init_from")
            record = read_record(folder) or {}
        except ValueError:  # it has been moved, or was on another machine
            record = {}
        run = record.get("config", {}).get("job", {}).get("dump_folder", init_from)
        source = {"name": Path(run).name, "license": None}
    return record["source"]


def _dataset(training: dict[str, Any]) -> str | None:
    if training.get("dataset_path"):
        return Path(training["dataset_path"]).name
    return HUB_DATASETS.get(training.get("dataset", ""), training.get("dataset"))


def _licence(license: str | None, source: dict[str, Any] | None) -> str:
    if license is None:
        inherited = f"; that of the weights it started from, {source['name']}, applies" if source else ""
        return f"None is stated{inherited}."
    if license.startswith("llama"):
        return f"{license}: the weights descend from Llama, whose community licence applies to them. Built with Llama."
    return f"{license}."
