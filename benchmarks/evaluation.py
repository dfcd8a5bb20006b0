"""How many tokens a second rank 0 adds up in an evaluation, on one core: it has to keep up with all GPUs.

Scores are made up; recordings have the Neural Pile's size: 395 neurons, 21,000 bins, 92 % zeros.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py [--json FILE]
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchtitan.data.tokens import encode
from torchtitan.evaluation.nulls import histogram_nats, ngram_nats, poisson_nats
from torchtitan.evaluation.rates import rate_sums
from torchtitan.evaluation.recording import BIN_SECONDS, Matrices, Piece, assemble, score_recording

NUM_NEURONS, NUM_BINS, MEAN_COUNT, WINDOW = 395, 21_000, 0.08, 131_072


def main() -> None:
    """Times a recording, and each part of the work on it; writes the figures where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    rates = MEAN_COUNT * random.lognormal(-0.5, 1, (NUM_NEURONS, 1))
    tokens = encode(random.poisson(rates, (NUM_NEURONS, NUM_BINS)).astype(np.uint8))
    scores = random.random(len(tokens), dtype=np.float32)
    windows = [slice(start, start + WINDOW) for start in range(0, len(tokens), WINDOW)]
    pieces = [Piece(at.start, 0, tokens[at], scores[at], scores[at]) for at in windows]
    m: Matrices = assemble(NUM_NEURONS, pieces)
    mtokens_per_second: dict[str, float] = {}
    for name, work in (
        ("a recording", lambda: score_recording(NUM_NEURONS, pieces)),
        ("a recording, for a validation", lambda: score_recording(NUM_NEURONS, pieces, nulls=False)),
        ("  its matrices", lambda: assemble(NUM_NEURONS, pieces)),
        ("  Poisson", lambda: poisson_nats(m.counts, m.scored)),
        ("  histogram", lambda: histogram_nats(m.counts, m.scored)),
        ("  n-gram", lambda: ngram_nats(m.counts, m.scored)),
        ("  rates", lambda: rate_sums(m.rates, m.counts, m.scored, m.stretches, BIN_SECONDS)),
    ):
        took = []
        for _ in range(3):
            started = time.perf_counter()
            work()
            took.append(time.perf_counter() - started)
        mtokens_per_second[name.strip()] = len(tokens) / min(took) / 1e6
        print(f"{name:<30} {mtokens_per_second[name.strip()]:6.1f} million tokens a second")
    if arguments.json:
        figures = {"mtokens_per_second": mtokens_per_second, "neurons": NUM_NEURONS, "bins": NUM_BINS}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
