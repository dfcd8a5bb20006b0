"""Linear layers in float8, by torchao."""

import torch
from torch import nn

from torchtitan.config.schema import Float8


def convert_linears(blocks: nn.ModuleList, config: Float8, device: torch.device) -> None:
    """Replaces every linear layer of the blocks by one that computes in float8; weights keep names and precision.

    The output layer is left alone: it is small, and its precision is the loss's.

    Raises:
        ValueError: where torchao is missing, or the GPU has no float8.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"float8.enable_float8_linear = true needs torchao ({error}): pip install torchao, or set it to false"
        ) from error
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        raise ValueError(
            f"float8.enable_float8_linear = true: {name} has no float8 matrix products (compute capability 8.9 and "
            "higher have); set it to false"
        )
    convert_to_float8_training(blocks, config=Float8LinearConfig.from_recipe_name(config.recipe))
