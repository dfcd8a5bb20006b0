"""Dimensions of the flavours and of what overrides them."""

import pytest
import torch

from torchtitan.config import ConfigError, load_config
from torchtitan.models.llama.attention import BACKENDS, Attention
from torchtitan.models.llama.model import Transformer
from torchtitan.models.llama.shape import FLAVORS, ModelShape, check_shape

SYNTHETIC = ["--training.dataset", "synthetic"]


def test_8b_has_exactly_the_parameters_of_llama_8b_with_256_tokens() -> None:
    assert FLAVORS["8B"].num_params == 6_981_685_248


@pytest.mark.parametrize("flavor", FLAVORS)
def test_num_params_counts_the_model(flavor: str) -> None:
    with torch.device("meta"):
        model = Transformer(FLAVORS[flavor], Attention(BACKENDS["sdpa"], ""), max_length=8)
    assert sum(parameter.numel() for parameter in model.parameters()) == FLAVORS[flavor].num_params


@pytest.mark.parametrize(
    ("flavor", "dim", "layers", "heads", "head_dim", "ffn_dim"),
    [
        ("250M", 1024, 16, 16, 64, 4096),
        ("870M", 2048, 16, 32, 64, 7168),
        ("2B", 3072, 16, 32, 96, 11264),
        ("8B", 4096, 32, 32, 128, 14336),
    ],
)
def test_flavours(flavor: str, dim: int, layers: int, heads: int, head_dim: int, ffn_dim: int) -> None:
    shape = FLAVORS[flavor]
    found = (shape.dim, shape.n_layers, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.ffn_dim)
    assert found == (dim, layers, heads, 8, head_dim, ffn_dim)


def test_single_dimensions_override_the_flavour() -> None:
    config = load_config([*SYNTHETIC, "--model.flavor", "250M", "--model.n_layers", "3", "--model.rope_theta", "1e4"])
    shape = ModelShape.from_config(config)
    assert (shape.dim, shape.n_layers, shape.rope_theta) == (1024, 3, 1e4)


def test_dimensions_that_contradict_each_other_are_listed_with_the_other_problems() -> None:
    argv = [*SYNTHETIC, "--model.n_heads", "6", "--model.n_kv_heads", "4", "--training.stps", "3"]
    with pytest.raises(ConfigError) as caught:
        load_config(argv, checks=[check_shape])
    text = str(caught.value)
    assert "model.n_heads: 6 does not divide model.dim = 128" in text
    assert "model.n_kv_heads: 4 does not divide model.n_heads = 6" in text
    assert "did you mean training.steps?" in text


def test_head_size_must_suit_the_kernels() -> None:
    with pytest.raises(ConfigError, match="heads of 4"):
        load_config([*SYNTHETIC, "--model.n_heads", "32"], checks=[check_shape])
