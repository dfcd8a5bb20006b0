"""Writes the tables of docs/performance.md from the results: `python -m benchmarks.table`."""

import json
import shlex
from pathlib import Path
from typing import Any

from tabulate import tabulate

from torchtitan.config import load_config
from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.distributed.degrees import Degrees
from torchtitan.plan.costs import GIB, Step, memory, time
from torchtitan.plan.hardware import find_gpu

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"


def load_results() -> dict[str, dict[str, Any]]:
    """All results of `train_step.py` by the name of their file, which is that of the row."""
    paths = sorted(RESULTS.glob("train_step_*.json"))
    return {path.stem.removeprefix("train_step_"): json.loads(path.read_text(encoding="utf-8")) for path in paths}


def planned(result: dict[str, Any]) -> tuple[float, float]:
    """Seconds a step and GiB of the GPU that the plan expects for a result's configuration."""
    config = load_config(shlex.split(result["command"].partition(" -- ")[2]))
    degrees = Degrees.of(config.training, result["num_gpus"])
    step = Step.of(config, degrees, result["num_gpus"], result["document_lengths"])
    recompute, gpu = ActivationCheckpoint(**result["activation_checkpoint"]), find_gpu(result["gpu"])
    assert gpu is not None, result["gpu"]
    return time(step, recompute, gpu).total, memory(step, recompute).device / GIB


def tokens_in_short(result: dict[str, Any]) -> str:
    """Sequences and tokens of a GPU's step."""
    passes = result.get("accumulation_steps", 1)
    return (f"{passes} × " if passes > 1 else "") + f"{result['batch_size']} × {result['seq_len']:,}"


def recompute_in_short(result: dict[str, Any]) -> str:
    """The recomputation as its mode and the three numbers of layers."""
    kept = result["activation_checkpoint"]
    counts = [kept[f"{name}_layers"] for name in ("projections", "gate_up", "offload")]
    return kept["mode"] + (f" {counts[0]}/{counts[1]}/{counts[2]}" if any(counts) else "")


def measured_table() -> str:
    """A row for each result."""
    rows = []
    for name, result in load_results().items():
        seconds, gib = planned(result)
        ratio, mfu = result["kernel_sum_ratio"], result["mfu_causal"]
        reference = None if result["float8"] else result["reference_kernel_sum_seconds"]
        rows.append(
            {
                "result": name,
                "tokens": tokens_in_short(result),
                "recompute": recompute_in_short(result),
                "tokens/s/GPU": f"{result['tokens_per_second_per_gpu']:,.0f}",
                "steps": len(result["steps"]),
                "s/step": f"{result['step_seconds']:.2f}",
                "plan": f"{seconds:.2f}",
                "of the kernels": "" if ratio is None or result["float8"] else f"{ratio:.3f}",
                "elsewhere": "" if reference is None else f"{result['step_seconds'] / reference:.3f}",
                "MFU": "" if mfu is None else f"{mfu:.1%}",
                "GiB": f"{result['peak_reserved_gib']:.1f}",
                "plan ": f"{gib:.1f}",
                "whole GPU": f"{result['device_used_gib']:.1f}",
                "host GiB": f"{result['host_offload_gib']:.1f}",
                "MHz, W": f"{result['clock_mhz']:.0f}, {result['power_watts']:.0f}",
            }
        )
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def profile_table() -> str:
    """A column for each profiled result: shares of the step by family of kernels."""
    profiled = {name: result["profile"] for name, result in load_results().items() if result["profile"]}
    families = list(dict.fromkeys(family for profile in profiled.values() for family in profile["families"]))
    rows = [
        {"kernels": family, **{name: f"{profile['families'].get(family, 0):.2%}" for name, profile in profiled.items()}}
        for family in families
    ]
    rows.append({"kernels": "none: idle", **{name: f"{profile['idle']:.2%}" for name, profile in profiled.items()}})
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def with_tables(page: str) -> str:
    """The page with what stands between its markers made anew."""
    for marker, table in {"measured": measured_table(), "profile": profile_table()}.items():
        start, end = f"<!-- {marker}: by python -m benchmarks.table -->\n", f"<!-- end of {marker} -->"
        before, _, rest = page.partition(start)
        assert rest, f"{start.strip()} is missing"
        page = f"{before}{start}\n{table}\n\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
