"""Made-up evaluations, for tests of what is drawn of them."""

from itertools import pairwise
from typing import Any

import numpy as np


def group(bits_per_spike: float | None, sessions: int = 1) -> dict[str, Any]:
    """The numbers of one source or session."""
    bits = bits_per_spike or 0.0
    stronger = {"histogram": bits - 0.1, "ngram": bits - 0.2}
    return {
        "sessions": sessions,
        "bits_per_spike": bits_per_spike,
        "nats_per_token": 0.1 - 0.02 * bits,
        "poisson_null_nats_per_token": 0.1,
        **{f"bits_per_spike_over_{name}": value if bits_per_spike else None for name, value in stronger.items()},
    }


def intervals(edges: list[float]) -> list[dict[str, Any]]:
    """Losses that fall from interval to interval."""
    return [
        {
            "from": start,
            "to": stop,
            "tokens": 100 * (i + 1),
            "nats_per_token": 0.2 - 0.01 * i,
            "poisson_null_nats_per_token": 0.15,
            "bits_per_spike": 0.1 * i,
        }
        for i, (start, stop) in enumerate(pairwise(edges))
    ]


def evaluation(
    step: int | None = 90,
    sources: dict[str, list[float | None]] | None = None,
    run: str = "outputs/demo",
    gain: float = 0.4,
    **more: Any,
) -> dict[str, Any]:
    """An evaluation with these sources, each with the sessions' bits per spike; their mean is the pooled value."""
    sources = {"demo": [0.3, 0.5]} if sources is None else sources
    known = {name: [bits for bits in sessions if bits is not None] for name, sessions in sources.items()}
    return {
        "format": 2,
        "checkpoint": None if step is None else f"{run}/checkpoint/step-{step}",
        "step": step,
        "data": {"description": "recordings", "split": "test", "fingerprint": "f", "source_datasets": None},
        "settings": {"seq_len": 64, "min_context": 0, "overlap": False, "max_windows": None, "batch_size": 2},
        "overall": group(gain, sum(map(len, sources.values()))),
        "sources": {
            name: group(float(np.mean(bits)) if bits else None, len(sources[name])) for name, bits in known.items()
        },
        "sessions": {
            f"{name}/subject/{i}": {"source_dataset": name, **group(bits)}
            for name, sessions in sources.items()
            for i, bits in enumerate(sessions)
        },
        "loss_by_position": intervals([0, 1, 2, 4, 8, 16]),
        "loss_by_time": intervals([0, 0.5, 1, 2]),
        "calibration": [
            {"count": 0, "expected": 900.0, "observed": 910},
            {"count": 1, "expected": 90.0, "observed": 80},
            {"count": 2, "expected": 8.0, "observed": 0},
            {"count": 3, "expected": 0.01, "observed": 0},
            {"count": 4, "expected": 2.0, "observed": 16},
            {"count": 5, "expected": 0.5, "observed": 4},
        ],
        **more,
    }
