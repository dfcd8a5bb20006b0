"""Traces of single steps, on request."""

import gzip
import json
from pathlib import Path

from tests.processes import train


def test_a_trace_every_so_many_steps(tmp_path: Path) -> None:
    train(
        *("--training.dataset", "synthetic", "--training.seq_len", "64", "--training.steps", "7"),
        *("--profiling.enable_profiling", "--profiling.profile_freq", "3", "--job.dump_folder", str(tmp_path)),
        *("--checkpoint.enable_checkpoint", "false"),
    )
    traces = sorted((tmp_path / "profile_traces").iterdir())
    assert [trace.name for trace in traces] == ["step-3-rank-0.json.gz", "step-6-rank-0.json.gz"]
    with gzip.open(traces[0], "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names
