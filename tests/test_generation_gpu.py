"""What only a GPU can show of generation: recorded steps with each attention, against the uncached model."""

import pytest
import torch

from benchmarks.generation import CASES, LARGEST_ERROR, largest_error, random_model, random_prompts, session
from torchtitan.generation.arguments import ATTENTION
from torchtitan.generation.choose import choose_attention
from torchtitan.generation.decode import Decoder
from torchtitan.models.llama.shape import FLAVORS, ModelShape

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CUDA = torch.device("cuda")
SHAPES = {
    "heads of 128": ModelShape(dim=1024, n_layers=2, n_heads=8, n_kv_heads=2, ffn_dim=2048),
    "heads of 96": ModelShape(dim=768, n_layers=2, n_heads=8, n_kv_heads=2, ffn_dim=2048),
    "debug": FLAVORS["debug"],
}


def requires(attention: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Skips where it cannot run."""
    try:
        choose_attention(attention, CUDA, dtype)
    except ValueError as problem:
        pytest.skip(str(problem))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("attention", ATTENTION)
@torch.inference_mode()
def test_logits_are_those_of_the_uncached_model(attention: str, shape: ModelShape) -> None:
    requires(attention)
    model = random_model(shape, 1024, CUDA, torch.bfloat16)
    for case in CASES:
        assert largest_error(model, Decoder(model), attention, *case) < LARGEST_ERROR


@pytest.mark.parametrize("attention", ["triton", "pytorch"])
@torch.inference_mode()
def test_greedy_tokens_in_float32_are_those_of_the_uncached_model(attention: str) -> None:
    requires(attention, torch.float32)
    model = random_model(FLAVORS["debug"], 1024, CUDA, torch.float32)
    decoder = Decoder(model)
    for numbers in (1, 3):
        prompts = random_prompts(numbers, 300, 256, CUDA)
        running = session(decoder, prompts, 1, 40, attention, temperature=0)
        running.run(40)
        for prompt, tokens in zip(prompts, running.continuations.tokens_NT, strict=True):
            whole = torch.cat((prompt, tokens[:40]))
            logits = model(whole[None])[0, len(prompt) :, :-1]
            assert torch.equal(logits.argmax(-1), tokens[1:])


@torch.inference_mode()
def test_a_recorded_graph_can_be_restarted() -> None:
    model = random_model(FLAVORS["debug"], 1024, CUDA, torch.bfloat16)
    running = session(Decoder(model), random_prompts(1, 300, 256, CUDA), 4, 40, "auto")
    running.run(40)
    tokens = running.continuations.tokens_NT.clone()
    running.restart("auto")
    running.run(40)
    assert torch.equal(running.continuations.tokens_NT, tokens)
