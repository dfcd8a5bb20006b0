"""What docs/conversion.md says of time, memory and sizes is what was measured and what the shapes are."""

import torch

from benchmarks.conversion import END, MARK, SHAPES, table
from tests.processes import ROOT
from torchtitan.convert.weights import Weight, model_weights

PAGE = (ROOT / "docs/conversion.md").read_text()


def test_the_table_is_that_of_the_results() -> None:
    assert f"{MARK}\n{table(ROOT / 'benchmarks/results')}\n{END}" in PAGE


def test_the_sizes_of_llama_8b() -> None:
    shape = SHAPES["8B"]
    weights = {name: Weight(size, torch.bfloat16).nbytes for name, size in model_weights(shape).items()}
    inner = {name: size for name, size in weights.items() if name.startswith("layers.")} | {
        "norm.weight": 2 * shape.dim
    }
    said = " ".join(PAGE.split())
    assert f"{shape.num_params:,} parameters, {sum(weights.values()) / 1e9:.2f} GB in bf16" in said
    assert f"{sum(inner.values()) / 1e9:.2f} GB without input and output layer" in said
    assert (
        f"largest tensor has {max(weights.values()) / 1e9:.2f} GB ({max(inner.values()) / 1e9:.2f} GB without" in said
    )
    assert f"{2 * max(weights.values()) / 1e9:.2f} GB in float32" in said
