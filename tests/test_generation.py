"""Cached generation against the model that computes everything anew, and against what sampling is."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.helpers import expected_tokens, random_recordings
from tests.test_model import SHAPE, build
from torchtitan.data.tokens import Counts, bos_token, encode
from torchtitan.generation import decode, session
from torchtitan.generation.cache import Cache
from torchtitan.generation.continuation import Generated, continue_prompts, groups, sessions
from torchtitan.generation.decode import Decoder
from torchtitan.generation.operations import PYTORCH
from torchtitan.generation.sampling import Sampling, uniforms
from torchtitan.models.llama.model import Transformer

GREEDY = Sampling(temperature=0)
VOCAB = SHAPE.vocab_size
SIZES = [(6, 5), (4, 9), (6, 3)]
"""(neurons, bins) of the prompts."""


def recordings(sizes: Sequence[tuple[int, int]] = SIZES) -> list[Counts]:
    return random_recordings(sizes, largest=VOCAB - 2)


def run(
    model: Transformer,
    prompts: list[Counts],
    sampling: Sampling,
    *,
    bins: int = 3,
    samples: int = 1,
    context: int = 256,
    keys: list[int] | None = None,
) -> Generated:
    """Continues recordings; where nothing else is said, their places in the list are their keys."""
    return continue_prompts(
        Decoder(model),
        [encode(prompt, VOCAB) for prompt in prompts],
        [len(prompt) + 1 for prompt in prompts],
        keys or list(range(len(prompts))),
        bins=bins,
        samples=samples,
        sampling=sampling,
        context=context,
    )


@torch.no_grad()
def uncached(model: Transformer, prompt: np.ndarray, neurons: int, bins: int) -> Counts:
    """The most likely counts, everything being computed anew for each of them; uint8 [neurons, bins]."""
    tokens = prompt.tolist()
    for _ in range(bins):
        tokens.append(bos_token(VOCAB))
        for _ in range(neurons):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1, : VOCAB - 1].argmax()))
    new = np.array(tokens[len(prompt) :], np.uint8).reshape(bins, neurons + 1)
    return new[:, 1:].T


@pytest.mark.parametrize("piece", [decode.PIECE, 7], ids=["whole", "in pieces"])
def test_greedy_tokens_are_those_of_the_uncached_model(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "PIECE", piece)
    model, prompts = build(SHAPE, 256), recordings()
    expected = [uncached(model, encode(prompt, VOCAB), len(prompt), 3) for prompt in prompts]
    found = run(model, prompts, GREEDY, samples=2)
    assert found.prefills == 3
    for counts, samples in zip(expected, found.counts, strict=True):
        assert len({tuple(row) for row in counts.tolist()}) > 1
        for sample in samples:
            np.testing.assert_array_equal(sample, counts)


@torch.no_grad()
def test_samples_of_one_prompt_see_their_own_tokens() -> None:
    """Logits of every step of samples that have drawn different counts, against the whole sequences."""
    model, prompts = build(SHAPE, 256), recordings()
    decoder = Decoder(model)
    lengths = [prompt.size + prompt.shape[1] for prompt in prompts]
    cache = Cache.empty(SHAPE, lengths, 2, 8, decoder.device, decoder.dtype)
    tokens = torch.randint(VOCAB, (6, 8), generator=torch.Generator().manual_seed(0))
    rope = decoder.rope(256)
    for number, prompt in enumerate(prompts):
        decoder.prefill(torch.from_numpy(encode(prompt, VOCAB)).long(), rope, cache, number)
    found = []
    for step in range(8):
        found.append(decoder.step(tokens[:, step], rope, cache, PYTORCH))
        cache.advance()
    for sequence in range(6):
        prompt = torch.from_numpy(expected_tokens([prompts[sequence // 2]], VOCAB)).long()
        whole = model(torch.cat((prompt, tokens[sequence]))[None])[0, len(prompt) :]
        torch.testing.assert_close(torch.stack(found)[:, sequence], whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_weights_of_a_decoder_are_the_models() -> None:
    model = build(SHAPE)
    tokens = torch.randint(VOCAB, (1, 20))
    before, names = model(tokens), {name: tuple(p.shape) for name, p in model.named_parameters()}
    decoder = Decoder(model)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == names
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=0)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {layer.qkv.untyped_storage().data_ptr() for layer in decoder.layers} <= own


def test_a_sample_depends_on_its_seed_recording_and_number_alone() -> None:
    model, prompts = build(SHAPE, 256), recordings()
    three = run(model, prompts, Sampling(seed=5), samples=3).counts
    one = run(model, prompts[:1], Sampling(seed=5), samples=1).counts
    longer = run(model, prompts[:1], Sampling(seed=5), bins=4).counts
    np.testing.assert_array_equal(three[0][0], one[0][0])
    np.testing.assert_array_equal(longer[0][0][:, :3], one[0][0])
    assert not np.array_equal(three[0][0], three[0][1])
    other = run(model, prompts[:1], Sampling(seed=6)).counts
    assert not np.array_equal(one[0][0], other[0][0])


def test_bos_is_never_drawn_and_every_bin_has_all_neurons() -> None:
    model = build(SHAPE, 256)
    with torch.no_grad():
        model.output.weight[-1] = 50 * model.output.weight[:-1].sum(0)  # BOS, where its logit is not the lowest
    prompts = recordings()
    with torch.no_grad():
        logits = model(torch.from_numpy(encode(prompts[0], VOCAB)).long()[None])[0]
    assert (logits.argmax(-1) == bos_token(VOCAB)).float().mean() > 0.2
    for prompt, samples in zip(prompts, run(model, prompts, Sampling(), samples=4).counts, strict=True):
        assert [sample.shape for sample in samples] == [(len(prompt), 3)] * 4
        assert max(sample.max() for sample in samples) < bos_token(VOCAB)


def test_past_the_context_the_newest_half_of_it_is_read_again() -> None:
    """Each stretch against the uncached model on the tokens of its window."""
    model, prompt, context = build(SHAPE, 256), recordings([(6, 5)])[0], 60  # 8 bins of 7 tokens
    found = run(model, [prompt], GREEDY, bins=12, context=context, samples=2)
    history, expected = encode(prompt, VOCAB), []
    for window, bins in ((5, 3), (4, 4), (4, 4), (4, 1)):
        expected.append(uncached(model, history[-7 * window :], 6, bins))
        history = np.append(history, encode(expected[-1], VOCAB))
    for sample in found.counts[0]:
        np.testing.assert_array_equal(sample, np.concatenate(expected, axis=1))
    assert found.prefills == 1 + 2 + 2 + 2


def test_where_the_window_slides_a_sample_does_not_depend_on_the_prompts_beside_it() -> None:
    """Of the five, two slide in step, two slide otherwise, and one fits."""
    model, prompts = build(SHAPE, 256), recordings([(6, 5), (4, 9), (6, 5), (6, 3), (1, 4)])
    together = run(model, prompts, Sampling(), bins=12, samples=2, context=60)
    assert groups([7 * 5, 5 * 9, 7 * 5, 7 * 3, 2 * 4], [7, 5, 7, 7, 2], 12, 60) == [[0, 2], [1], [3], [4]]
    assert together.steps == 12 * (7 + 5 + 7 + 2)
    for place, prompt in enumerate(prompts):
        alone = run(model, [prompt], Sampling(), bins=12, samples=2, context=60, keys=[place])
        np.testing.assert_array_equal(np.stack(together.counts[place]), np.stack(alone.counts[0]))


@pytest.mark.parametrize(("bins", "context"), [(3, 256), (12, 60), (30, 60)])
def test_the_largest_sessions_are_known_beforehand(bins: int, context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, seen = recordings([(6, 5), (4, 9), (6, 5), (6, 3)]), []
    monkeypatch.setattr(session, "check_room", lambda shape, dtype, device, *asked: seen.append(asked))
    run(build(SHAPE, 256), prompts, GREEDY, bins=bins, samples=2, context=context)
    lengths, widths = [prompt.size + prompt.shape[1] for prompt in prompts], [len(prompt) + 1 for prompt in prompts]
    known = list(sessions(lengths, widths, bins=bins, samples=2, context=context))
    assert all(one in seen for one in known)
    for sizes, samples, steps in seen:  # the last before the end may be shorter
        assert any((sizes, samples) == one[:2] and steps <= one[2] for one in known)


def naive_distribution(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float) -> np.ndarray:
    """What the words of `Sampling` say, one count after another."""
    weights = np.exp(logits[:-1] / temperature)
    kept = sorted(range(len(weights)), key=lambda count: -weights[count])[:top_k]
    weights /= weights[kept].sum()
    nucleus, mass = [], 0.0
    for count in kept:
        if mass >= top_p:
            break
        nucleus.append(count)
        mass += weights[count]
    return np.array([weights[count] / mass if count in nucleus else 0 for count in range(len(weights))])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, 1.0),
        (0.5, None, 1.0),
        (1.0, 3, 1.0),
        (1.0, None, 0.7),
        (2.0, 5, 0.8),
        (1.0, 1, 1.0),
        (1.0, None, 1e-9),
    ],
)
def test_counts_are_drawn_from_the_distribution(temperature: float, top_k: int | None, top_p: float) -> None:
    """The uniform numbers being a grid, every count's share is exact to one step of it."""
    logits = torch.tensor([1.0, 0.2, -0.5, 1.7, 0.0, -2.0, 0.9, 99.0])
    grid = (torch.arange(10_000) + 0.5) / 10_000
    drawn = Sampling(temperature, top_k, top_p).draw(logits.expand(10_000, -1), grid)
    shares = np.bincount(drawn.numpy(), minlength=7) / 10_000
    expected = naive_distribution(logits.numpy().astype(float), temperature, top_k, top_p)
    np.testing.assert_allclose(shares, expected, atol=2e-4)
    assert len(shares) == 7


def test_a_temperature_next_to_zero_takes_the_most_likely_count() -> None:
    logits = torch.tensor([[-3.0, 2.0, 1.0, 2.5, 9.0]])
    for temperature in (1e-3, 1e-40, 5e-324):
        for top_k in (None, 2):
            assert Sampling(temperature, top_k).draw(logits, torch.tensor([0.999])).item() == 3, temperature


def test_a_uniform_number_next_to_one_draws_no_count_that_is_left_out() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, 9.0]])
    almost = torch.tensor([np.nextafter(np.float32(1), np.float32(0))])
    assert Sampling(top_k=2).draw(logits, almost).item() == 1
    assert Sampling().draw(logits, almost).item() == 3


def test_random_numbers_do_not_depend_on_how_many_there_are() -> None:
    few, many = uniforms(3, [7], 1, 10), uniforms(3, [2, 7], 4, 25)
    np.testing.assert_array_equal(few[0], many[4, :10])
    assert len({row.tobytes() for row in many}) == 8
    assert many.min() >= 0
    assert many.max() < 1
