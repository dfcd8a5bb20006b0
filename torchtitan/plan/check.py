"""Which recomputations and precisions go together. Imports no torch."""

from collections.abc import Iterator

from torchtitan.config.schema import JobConfig
from torchtitan.models.llama.shape import ModelShape


def check_recompute(config: JobConfig) -> Iterator[tuple[str, str]]:
    """Contradictions in `[activation_checkpoint]` and `[float8]`, as (key, message): a check for `load_config`."""
    recompute, n_layers = config.activation_checkpoint, ModelShape.from_config(config).n_layers
    for key in ("projections_layers", "gate_up_layers", "offload_layers"):
        value = getattr(recompute, key)
        allowed = ("attention",) if key != "offload_layers" else ("none", "attention", "full")
        if value and recompute.mode not in allowed:
            modes = " or ".join(f'"{mode}"' for mode in allowed)
            yield f"activation_checkpoint.{key}", f'contradicts mode = "{recompute.mode}"; it takes mode {modes}'
        elif value > n_layers:
            yield f"activation_checkpoint.{key}", f"{value} is more than the model's {n_layers} blocks"
    if recompute.offload_layers and recompute.mode == "attention" and not config.training.compile:
        yield (
            "activation_checkpoint.offload_layers",
            'needs training.compile = true in mode "attention": an uncompiled block holds on to it itself',
        )
    if config.float8.enable_float8_linear:
        tokens = config.training.batch_size * config.training.seq_len
        if config.training.mixed_precision_param != "bfloat16":
            yield "float8.enable_float8_linear", 'needs training.mixed_precision_param = "bfloat16"'
        if tokens % 16:
            yield (
                "float8.enable_float8_linear",
                f"takes a multiple of 16 tokens at once; training.batch_size times training.seq_len is {tokens}",
            )
