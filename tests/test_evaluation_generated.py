"""A trained model on data whose exact probabilities are known: it comes close to them, and cannot beat them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.helpers import in_memory
from tests.models import small_model
from torchtitan.data.tokens import encode
from torchtitan.distributed.world import World
from torchtitan.evaluation.accumulator import Accumulator
from torchtitan.evaluation.passes import Pass
from torchtitan.evaluation.report import results
from torchtitan.evaluation.scoring import Scorer
from torchtitan.models.llama.model import Transformer, token_losses

NEURONS, VOCAB, SEQ_LEN, BATCH, STEPS = 3, 16, 64, 16, 500
LR, WARMUP = 6e-3, 20
STARTS, STAYS = np.array([0.05, 0.3, 0.15]), np.array([0.8, 0.05, 0.5])
"""The Markov neurons: probabilities of a spike after none, and after one."""
RATES = np.array([0.1, 0.7, 2.5])
"""The Poisson neurons' mean counts a bin."""

Generator = Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""Makes so many bins: counts, uint8 [neurons, bins], and the nats of each by the process that has made it."""


def markov(bins: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    counts, nats = np.zeros((NEURONS, bins), np.uint8), np.zeros((NEURONS, bins))
    before = random.random(NEURONS) < STARTS / (1 + STARTS - STAYS)
    for t in range(bins):
        fires = np.where(before, STAYS, STARTS)
        before = random.random(NEURONS) < fires
        counts[:, t], nats[:, t] = before, -np.log(np.where(before, fires, 1 - fires))
    return counts, nats


def poisson(bins: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    counts = random.poisson(RATES[:, None], (NEURONS, bins)).astype(np.uint8)
    log_factorials = np.cumsum(np.log(np.maximum(np.arange(256), 1)))
    return counts, RATES[:, None] - counts * np.log(RATES)[:, None] + log_factorials[counts]


def train_on(model: Transformer, optimizer: torch.optim.Optimizer, generate: Generator) -> None:
    """Trains on data that are new in every step."""
    random = np.random.default_rng(1)
    for step in range(STEPS):
        counts, _ = generate(BATCH * SEQ_LEN // (NEURONS + 1) + 1, random)
        stream = torch.from_numpy(encode(counts, VOCAB)[: BATCH * SEQ_LEN + 1].astype(np.int64))
        inputs, labels = stream[:-1].view(BATCH, SEQ_LEN), stream[1:].view(BATCH, SEQ_LEN)
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / WARMUP, 1 - step / STEPS)
        optimizer.zero_grad()
        token_losses(model(inputs), labels).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("generate", [markov, poisson])
def test_a_trained_model_comes_close_to_the_generator(world: World, generate: Generator) -> None:
    argv = (
        "--model.dim",
        "64",
        "--model.ffn_dim",
        "128",
        "--training.seq_len",
        str(SEQ_LEN),
        "--training.vocab_size",
        str(VOCAB),
    )
    _, model, optimizer = small_model(world, *argv)
    train_on(model, optimizer, generate)

    counts, nats = generate(6000, np.random.default_rng(2))
    # Two bins of context tell the model where it is, and each neuron's last count.
    over = Pass(*in_memory([counts]), seq_len=SEQ_LEN, vocab_size=VOCAB, min_context=2 * (NEURONS + 1), overlap=True)
    stream_nats = np.insert(nats.T, 0, np.nan, axis=1).reshape(-1)
    accumulator = Accumulator(over)
    models, generators = [], []
    for window in Scorer(model, over, world, batch_size=8, document_mask=False).score():
        accumulator.add(window)
        is_count = window.labels != VOCAB - 1
        models.append(window.nats[is_count])
        generators.append(stream_nats[slice(*over.scored(window.window))][is_count])
    found = results(accumulator.finish())["overall"]
    difference = np.concatenate(models) - np.concatenate(generators)
    own = float(np.concatenate(generators).mean())
    assert found["tokens"] == len(difference) == NEURONS * (6000 - 2)
    assert found["nats_per_token"] == pytest.approx(own + difference.mean(), rel=1e-6)

    standard_error = difference.std() / np.sqrt(len(difference))
    assert difference.mean() > -3 * standard_error, "it beats the process that has made the data"
    assert found["nats_per_token"] < 1.01 * own
    bits = (found["poisson_null_nats_per_token"] - own) * found["tokens"] / found["spikes"] / np.log(2)
    assert found["bits_per_spike"] == pytest.approx(bits, abs=0.02)
    if generate is markov:
        assert bits > 0.3
        assert found["ngram_null_nats_per_token"] == pytest.approx(own, rel=0.05)
        assert found["ngram_null_nats_per_token"] > own
