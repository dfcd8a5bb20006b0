"""An evaluation as it is written to JSON and shown as tables."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from torchtitan.evaluation.accumulator import Session, Totals
from torchtitan.evaluation.recording import BIN_SECONDS, NATS, POISSON, SPIKES, TOKENS, Sums
from torchtitan.plots.names import distinct_names

FORMAT = 2
Evaluation = dict[str, Any]


def results(totals: Totals) -> Evaluation:
    """What a pass has found, ready for JSON: the part of an evaluation that depends on model and data alone."""
    sessions_of: dict[str, int] = {}
    for session in totals.sessions:
        sessions_of[session.source_dataset] = sessions_of.get(session.source_dataset, 0) + 1
    return {
        "bin_seconds": BIN_SECONDS,
        "overall": group(totals.overall, len(totals.sessions)),
        "sources": {source: group(sums, sessions_of[source]) for source, sums in totals.sources.items()},
        "sessions": {
            _key(session): {**session._asdict(), **group(sums, 1)} for session, sums in totals.sessions.items()
        },
        "loss_by_position": bins(totals.by_position),
        "loss_by_time": bins(totals.by_time),
        "calibration": [
            {"count": count, "expected": _finite(float(expected)), "observed": int(observed)}
            for count, (expected, observed) in enumerate(zip(totals.expected, totals.observed, strict=True))
        ],
    }


def _key(session: Session) -> str:
    """Its columns as a path, a slash inside of one written as in an address: no two sessions have the same."""
    return "/".join(column.replace("%", "%25").replace("/", "%2F") for column in session)


def group(sums: Sums, sessions: int) -> Evaluation:
    """Figures of some recordings together; None where one is not defined. `neurons` counts those of each row."""
    all_tokens = sums.tokens + sums.bos_tokens
    return {
        "rows": sums.rows,
        "sessions": sessions,
        "neurons": sums.neurons,
        "bins": sums.bins,
        "tokens": sums.tokens,
        "tokens_with_bos": all_tokens,
        "spikes": sums.spikes,
        "clipped_counts": sums.clipped,
        "mean_rate_hz": _ratio(sums.spikes, sums.tokens * BIN_SECONDS),
        "nats_per_token": _ratio(sums.nats, sums.tokens),
        "nats_per_token_with_bos": _ratio(sums.nats + sums.bos_nats, all_tokens),
        "poisson_null_nats_per_token": _ratio(sums.poisson, sums.tokens),
        "histogram_null_nats_per_token": _ratio(sums.histogram, sums.tokens),
        "ngram_null_nats_per_token": _ratio(sums.ngram, sums.tokens),
        "bits_per_spike": bits_per_spike(sums.poisson, sums.nats, sums.spikes),
        "bits_per_spike_over_histogram": bits_per_spike(sums.histogram, sums.nats, sums.spikes),
        "bits_per_spike_over_ngram": bits_per_spike(sums.ngram, sums.nats, sums.spikes),
        "rate_r2": _finite(sums.rates.r2),
        "rate_correlation": _finite(sums.rates.correlation),
    }


def bits_per_spike(null: float, nats: float, spikes: float) -> float | None:
    """(null - model) / (spikes · ln 2), of total negative log likelihoods in nats; None without spikes.

    What a spike tells the model more than the null (Pei et al., Neural Latents Benchmark '21, 2021).
    """
    return _ratio(null - nats, spikes * math.log(2))


def bins(sums: NDArray[np.float64]) -> list[Evaluation]:
    """Figures by geometric bin (see `RecordingScore`), from the first one that is filled to the last."""
    filled = np.flatnonzero(sums[:, TOKENS])
    return [
        {
            "from": 2 ** (place - 1) if place else 0,
            "to": 2**place,
            "tokens": int(sums[place, TOKENS]),
            "spikes": int(sums[place, SPIKES]),
            "nats_per_token": _ratio(sums[place, NATS], sums[place, TOKENS]),
            "poisson_null_nats_per_token": _ratio(sums[place, POISSON], sums[place, TOKENS]),
            "bits_per_spike": bits_per_spike(sums[place, POISSON], sums[place, NATS], sums[place, SPIKES]),
        }
        for place in map(int, filled)
    ]


def tables(evaluation: Evaluation) -> str:
    """What it says of each source and of all: the size of the data, the losses, bits per spike."""
    groups = [*evaluation["sources"].items(), ("overall", evaluation["overall"])]
    data = _table(groups, _DATA)
    losses = _table(groups, _LOSSES)
    spikes = _table(groups, _SPIKES)
    context = tabulate(
        [
            (_span(b), f"{b['tokens']:,}", _show(b["nats_per_token"], 4), _show(b["bits_per_spike"], 3))
            for b in evaluation["loss_by_position"]
        ],
        ["position in the window", "counts", "nats a count", "bits a spike"],
        tablefmt="simple",
        colalign=("right", "right", "right", "right"),
        disable_numparse=True,
    )
    return "\n\n".join((data, losses, spikes, context))


def learning_curve(evaluations: Sequence[Evaluation]) -> str:
    """A row a checkpoint, oldest first; named by its run, too, where there are several."""
    of_steps = [evaluation["checkpoint"] for evaluation in evaluations if evaluation["step"] is not None]
    folders = sorted({str(PurePath(checkpoint).parent) for checkpoint in of_steps})
    runs = dict(zip(folders, distinct_names(folders), strict=True)) if len(folders) > 1 else {}
    return _table(
        [(_name(evaluation, runs), evaluation["overall"]) for evaluation in evaluations], _CURVE, "checkpoint"
    )


def _name(evaluation: Evaluation, runs: Mapping[str, str]) -> str:
    """What a checkpoint is called by, `runs` being names of folders of steps, where there are several."""
    if evaluation["checkpoint"] is None:
        return "random weights"
    if evaluation["step"] is None:
        return evaluation["checkpoint"]
    run = runs.get(str(PurePath(evaluation["checkpoint"]).parent))
    return f"step {evaluation['step']}" if run is None else f"{run}, step {evaluation['step']}"


Column = tuple[str, Callable[[Evaluation], str]]


def _figure(key: str, digits: int) -> Callable[[Evaluation], str]:
    return lambda group: _show(group[key], digits)


_DATA: list[Column] = [
    ("rows", _figure("rows", 0)),
    ("sessions", _figure("sessions", 0)),
    ("neurons of rows", _figure("neurons", 0)),
    ("bins", _figure("bins", 0)),
    ("counts", _figure("tokens", 0)),
    ("spikes", _figure("spikes", 0)),
    ("rate, Hz", _figure("mean_rate_hz", 2)),
]
_LOSSES: list[Column] = [
    ("nats a count", _figure("nats_per_token", 4)),
    ("Poisson", _figure("poisson_null_nats_per_token", 4)),
    ("histogram", _figure("histogram_null_nats_per_token", 4)),
    ("n-gram", _figure("ngram_null_nats_per_token", 4)),
    ("nats a token, with BOS", _figure("nats_per_token_with_bos", 4)),
]
_SPIKES: list[Column] = [
    ("bits a spike over Poisson", _figure("bits_per_spike", 3)),
    ("over histogram", _figure("bits_per_spike_over_histogram", 3)),
    ("over n-gram", _figure("bits_per_spike_over_ngram", 3)),
    ("R² of rates", lambda group: "< -10" if (group["rate_r2"] or 0) < -10 else _show(group["rate_r2"], 3)),
    ("correlation", _figure("rate_correlation", 3)),
]
_CURVE: list[Column] = [_LOSSES[0], _LOSSES[1], _LOSSES[3], *_SPIKES]


def _table(groups: Iterable[tuple[str, Evaluation]], columns: list[Column], first: str = "") -> str:
    rows = [(name, *(show(group) for _, show in columns)) for name, group in groups]
    alignment = ("left", *["right"] * len(columns))
    headers = [first, *(title for title, _ in columns)]
    return tabulate(rows, headers, tablefmt="simple", colalign=alignment, disable_numparse=True)


def _span(place: Mapping[str, int]) -> str:
    return f"{place['from']:,} - {place['to'] - 1:,}"


def _show(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _ratio(total: float, size: float) -> float | None:
    return _finite(float(total) / float(size)) if size else None


def _finite(value: float | None) -> float | None:
    """JSON has no nan."""
    return value if value is not None and math.isfinite(value) else None
