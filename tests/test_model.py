"""The model against `transformers`' Llama, which is the judge of what a Llama is."""

import pytest
import torch
from torch import nn

from tests.llamas import llama
from torchtitan.convert.huggingface import hf_name, to_hf
from torchtitan.models.llama.attention import BACKENDS, Attention, Documents
from torchtitan.models.llama.model import Transformer, token_losses
from torchtitan.models.llama.rope import frequencies
from torchtitan.models.llama.shape import FLAVORS, ModelShape

SHAPE = ModelShape(dim=64, n_layers=3, n_heads=8, n_kv_heads=2, ffn_dim=160, vocab_size=96)


def build(shape: ModelShape, length: int = 64) -> Transformer:
    """A model with random weights, norms included, that no symmetry makes easy."""
    torch.manual_seed(0)
    model = Transformer(shape, Attention(BACKENDS["sdpa"], ""), max_length=length)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def to_reference(name: str, weight: torch.Tensor, shape: ModelShape) -> tuple[str, torch.Tensor]:
    """A weight or gradient as transformers has it."""
    return hf_name(name), to_hf(name, weight, shape.head_dim)


@pytest.mark.parametrize("rope_scaling", ["none", "llama3.1"])
def test_logits_and_gradients_are_those_of_transformers(rope_scaling: str) -> None:
    shape = ModelShape(**{**vars(SHAPE), "rope_scaling": rope_scaling})
    model, other = build(shape), llama(shape)
    other.load_state_dict(dict(to_reference(name, p.data, shape) for name, p in model.named_parameters()))
    tokens = torch.randint(shape.vocab_size, (2, 65))

    logits = model(tokens[:, :-1])
    theirs = other(tokens[:, :-1])
    torch.testing.assert_close(logits, theirs.logits, rtol=1e-4, atol=1e-4)

    token_losses(logits, tokens[:, 1:]).mean().backward()
    nn.functional.cross_entropy(theirs.logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    their_gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        their_name, gradient = to_reference(name, parameter.grad, shape)
        torch.testing.assert_close(gradient, their_gradients[their_name], rtol=1e-3, atol=1e-5, msg=name)


def test_rope_scaling_changes_the_logits() -> None:
    """Else the test above would pass with the scaling left out on both sides."""
    tokens = torch.randint(SHAPE.vocab_size, (1, 64))
    plain, scaled = build(SHAPE), build(ModelShape(**{**vars(SHAPE), "rope_scaling": "llama3.1"}))
    assert (plain(tokens) - scaled(tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_scaled_frequencies_are_those_of_transformers(head_dim: int) -> None:
    shape = ModelShape(dim=8 * head_dim, n_layers=1, n_heads=8, n_kv_heads=8, ffn_dim=64, rope_scaling="llama3.1")
    torch.testing.assert_close(frequencies(shape), llama(shape).model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


def test_a_packed_window_equals_its_recordings_one_by_one() -> None:
    model = build(SHAPE)
    tokens = torch.randint(SHAPE.vocab_size, (2, 64))
    starts = [0, 17, 18, 64, 100]
    documents = Documents.from_starts(torch.tensor(starts, dtype=torch.int32), 128, tokens.device)
    packed = model(tokens, documents).flatten(0, 1)
    packed_gradients = torch.autograd.grad(packed.square().mean(), list(model.parameters()))

    pieces = tokens.flatten().tensor_split(starts[1:])
    alone = torch.cat([model(piece[None])[0] for piece in pieces])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(alone.square().mean(), list(model.parameters()))
    for ours, theirs in zip(packed_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (packed - model(tokens).flatten(0, 1)).abs().max() > 1e-2


def test_positions_move_the_rotation_and_nothing_else() -> None:
    model = build(SHAPE, length=200)
    tokens = torch.randint(SHAPE.vocab_size, (1, 50))
    plain = model(tokens)
    torch.testing.assert_close(model(tokens, positions=torch.arange(50)), plain)
    torch.testing.assert_close(model(tokens, positions=torch.arange(50)[None] + 120), plain, rtol=1e-3, atol=1e-3)
    assert (model(tokens, positions=2 * torch.arange(50)) - plain).abs().max() > 1e-2


def test_initial_weights() -> None:
    shape = FLAVORS["250M"]
    with torch.device("meta"):
        model = Transformer(shape, Attention(BACKENDS["sdpa"], ""), max_length=8)
    generator = torch.Generator().manual_seed(0)

    def draw(name: str) -> torch.Tensor:
        weight = torch.empty(model.get_parameter(name).shape)
        model.init_parameter(name, weight, generator)
        return weight

    assert draw("tok_embeddings.weight").std() == pytest.approx(1, rel=0.01)
    assert draw("layers.3.attention.wq.weight").std() == pytest.approx(0.02, rel=0.02)
    assert draw("layers.0.attention.wo.weight").std() == pytest.approx(0.02 / 2**0.5, rel=0.02)
    assert draw("layers.7.feed_forward.w2.weight").std() == pytest.approx(0.02 / 4, rel=0.02)
    output = draw("output.weight")
    assert output.std() == pytest.approx(1 / 32, rel=0.02)
    assert output.abs().max() <= 3 / 32
    assert (draw("norm.weight") == 1).all()


def test_losses_are_unreduced_and_in_float32() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.bfloat16)
    labels = torch.randint(7, (2, 5))
    losses = token_losses(logits, labels)
    assert (losses.dtype, losses.shape) == (torch.float32, labels.shape)
    torch.testing.assert_close(losses, -logits.float().log_softmax(-1).gather(2, labels[..., None])[..., 0])
