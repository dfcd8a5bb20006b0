"""The dimensions of a model: named flavours, overrides, and what follows from them. Imports no torch."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torchtitan.config.schema import JobConfig


def swiglu_dim(dim: int, multiple_of: int = 1024) -> int:
    """Llama 3's feed-forward width: 1.3 × 2/3 × 4·dim, rounded up."""
    width = int(1.3 * (4 * dim * 2 // 3))
    return -(-width // multiple_of) * multiple_of


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything that the weights of a model depend on. Two checkpoints fit each other where their shapes are equal.

    Attributes:
        dim: width of the residual stream.
        n_layers: number of blocks.
        n_heads, n_kv_heads: query heads, and the key and value heads that groups of them share.
        ffn_dim: width of the SwiGLU layer.
        vocab_size: number of tokens.
        norm_eps: epsilon of the RMS norms.
        rope_theta, rope_scaling: base of the rotary frequencies, and "llama3.1" or "none".
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: str = "none"

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.n_heads

    @property
    def num_params(self) -> int:
        """Parameters of the model, its input and output layers included."""
        attention = 2 * self.dim * self.dim + 2 * self.dim * self.n_kv_heads * self.head_dim
        block = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        return self.n_layers * block + self.dim + 2 * self.vocab_size * self.dim

    @classmethod
    def from_config(cls, config: JobConfig) -> "ModelShape":
        """The flavour's dimensions with the configuration's own in their place."""
        names = {field.name for field in fields(cls)}
        own = {key: value for key, value in config.model.model_dump().items() if key in names and value is not None}
        return replace(FLAVORS[config.model.flavor], vocab_size=config.training.vocab_size, **own)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What differs between this shape and a recorded one, a phrase each; unrecorded values do not.

        Only the rope scaling counts as `none` where it is not recorded: no weight shows it, and weights that were
        trained without it are wrong with it.
        """
        other = {"rope_scaling": "none", **other}
        return [
            f"{name} is {other[name]} there and {value} here"
            for name, value in asdict(self).items()
            if name in other and other[name] != value
        ]


FLAVORS = {
    "debug": ModelShape(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=swiglu_dim(128, multiple_of=64)),
    "250M": ModelShape(dim=1024, n_layers=16, n_heads=16, n_kv_heads=8, ffn_dim=swiglu_dim(1024)),
    "870M": ModelShape(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=swiglu_dim(2048)),
    "2B": ModelShape(dim=3072, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=swiglu_dim(3072)),
    "8B": ModelShape(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=swiglu_dim(4096)),
}


def check_shape(config: JobConfig) -> Iterator[tuple[str, str]]:
    """Contradictions between the model's dimensions, as (key, message): a check for `load_config`."""
    shape = ModelShape.from_config(config)
    if shape.dim % shape.n_heads:
        yield "model.n_heads", f"{shape.n_heads} does not divide model.dim = {shape.dim}"
    elif shape.head_dim % 8:
        yield "model.n_heads", f"{shape.n_heads} makes heads of {shape.head_dim}: attention needs a multiple of 8"
    if shape.n_heads % shape.n_kv_heads:
        yield "model.n_kv_heads", f"{shape.n_kv_heads} does not divide model.n_heads = {shape.n_heads}"
