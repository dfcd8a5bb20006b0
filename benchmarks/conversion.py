"""How long conversions take and how much memory they hold, beside PyTorch's own tool and the straightforward way.

    python benchmarks/conversion.py --folder FOLDER --json benchmarks/results/conversion_1.5b.json
    python benchmarks/conversion.py --folder FOLDER --shape 8B --alone --json benchmarks/results/conversion_8b.json

Each conversion runs in a process of its own. Its time is that of the whole command until everything is on disk, and
the processors' time for it; its memory is the largest anonymous resident memory (RssAnon) seen, looked at every 5 ms.
FOLDER needs room for four copies of the model (with --alone two), which are removed. With --alone nothing is compared,
and what comes back is compared with what went in, bit for bit.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchtitan.convert.huggingface import open_hf, write_hf
from torchtitan.convert.meta import open_meta, write_meta
from torchtitan.convert.weights import Tensors, Weight, model_weights
from torchtitan.models.llama.shape import FLAVORS, ModelShape

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "1.5B": replace(FLAVORS["2B"], n_layers=12),
    "8B": replace(FLAVORS["8B"], vocab_size=128_256, rope_scaling="llama3.1"),  # Llama-3.1-8B as published
}
MARK, END = "<!-- written by `python benchmarks/conversion.py --table` -->", "<!-- end -->"
PLAIN = {
    "dcp to pth": """
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(source, f"{output}/consolidated.00.pth")
""",
    "pth to dcp": """
import torch, torch.distributed.checkpoint as dcp
weights = torch.load(f"{source}/consolidated.00.pth", weights_only=True)
dcp.save({f"model.{name}": weight for name, weight in weights.items()}, checkpoint_id=output, no_dist=True)
""",
    "hf to dcp": """
import json, torch.distributed.checkpoint as dcp
from pathlib import Path
from safetensors.torch import load_file
from torchtitan.convert.huggingface import from_hf, hf_name
from torchtitan.convert.weights import model_weights
from benchmarks.conversion import SHAPES
shape = SHAPES["1.5B"]
theirs = {name: weight for file in Path(source).glob("*.safetensors") for name, weight in load_file(file).items()}
weights = {name: from_hf(name, theirs[hf_name(name)], shape.head_dim) for name in model_weights(shape)}
dcp.save({f"model.{name}": weight for name, weight in weights.items()}, checkpoint_id=output, no_dist=True)
""",
    "dcp to hf": """
import torch, torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torchtitan.convert.huggingface import hf_name, to_hf
from torchtitan.convert.weights import model_weights
from benchmarks.conversion import SHAPES
shape = SHAPES["1.5B"]
weights = {f"model.{name}": torch.empty(s, dtype=torch.bfloat16) for name, s in model_weights(shape).items()}
dcp.load(weights, checkpoint_id=source, no_dist=True)
weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
theirs = {hf_name(name): to_hf(name, weight, shape.head_dim).contiguous() for name, weight in weights.items()}
save_file(theirs, f"{output}/model.safetensors")
""",
}
OURS = {
    "dcp to pth": ["dcp_to_llama.py"],
    "pth to dcp": ["llama_to_dcp.py", "--keep_embeddings"],
    "hf to dcp": ["llama_to_dcp.py", "--keep_embeddings"],
    "dcp to hf": ["dcp_to_llama.py", "--format", "hf"],
}


def random_weight(name: str, weight: Weight) -> torch.Tensor:
    """The same random bits for a name each time, none of them NaN."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(0, 0x7F00, weight.shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)


@dataclass(frozen=True)
class Run:
    """Seconds until everything is on disk, of them the processors', and the largest RssAnon in bytes."""

    seconds: float
    cpu_seconds: float
    peak: int


def measure(command: list[str]) -> Run:
    """Runs a command to its end; raises RuntimeError where it fails."""
    os.sync()
    begun, peak, before = time.perf_counter(), 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        while run.poll() is None:
            status = Path(f"/proc/{run.pid}/status").read_text()
            anonymous = [line for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *(1024 * int(line.split()[1]) for line in anonymous)])
            time.sleep(0.005)
        if run.returncode:
            assert run.stderr is not None
            raise RuntimeError(run.stderr.read().decode())
    os.sync()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(round(time.perf_counter() - begun, 2), round(cpu, 2), peak)


def ours(direction: str, source: Path, output: Path) -> Run:
    """Runs the project's command."""
    script, *flags = OURS[direction]
    return measure([sys.executable, script, "--input_dir", str(source), "--output_dir", str(output), *flags])


def plain(direction: str, source: Path, output: Path) -> Run:
    """Runs what one would write without it."""
    output.mkdir()
    program = f"source, output = {str(source)!r}, {str(output)!r}\n" + PLAIN[direction]
    return measure([sys.executable, "-c", program])


def compare(sources: dict[str, Path], output: Path, rounds: int) -> dict[str, Any]:
    """Both ways in each direction, in turns, from the same source."""
    figures: dict[str, Any] = {}
    for direction in OURS:
        source = sources[direction.partition(" ")[0]]
        runs: dict[str, list[Run]] = {"ours": [], "plain": []}
        for _ in range(rounds):
            for name, way in (("ours", ours), ("plain", plain)):
                runs[name].append(way(direction, source, output))
                shutil.rmtree(output)
        figures[direction] = {name: _summary(found) for name, found in runs.items()}
        print(direction, figures[direction], flush=True)
    return figures


def alone(source: Path, output: Path, same: Callable[[Path], None]) -> dict[str, Any]:
    """From Meta's format to DCP, Hugging Face's, DCP and Meta's, with never more than two copies on disk."""
    figures: dict[str, Any] = {}
    there, back = output.with_name("dcp"), output.with_name("dcp-again")
    for direction, begin, end in (
        ("pth to dcp", source, there),
        ("dcp to hf", there, output / "hf"),
        ("hf to dcp", output / "hf", back),
        ("dcp to pth", back, output / "pth"),
    ):
        figures[direction] = {"ours": _summary([ours(direction, begin, end)])}
        print(direction, figures[direction], flush=True)
        shutil.rmtree(begin)
        if end.parent == output:
            same(end)
    return figures


def table(results: Path) -> str:
    """The figures of both shapes, as they stand in docs/conversion.md."""
    lines = ["| model | from, to | | seconds | of processors | peak RssAnon |", "|---|---|---|---|---|---|"]
    for shape in SHAPES:
        facts = json.loads((results / f"conversion_{shape.lower()}.json").read_text())
        model = f"{facts['parameters'] / 1e9:.2f} G parameters, bf16, {facts['bytes'] / 1e9:.1f} GB"
        for direction, ways in facts["directions"].items():
            for name, run in ways.items():
                way = name if (name, direction) != ("plain", "dcp to pth") else "`dcp_to_torch_save`"
                figures = f"{run['seconds']:.1f} | {run['cpu_seconds']:.1f} | {run['peak_gib']:.2f} GiB"
                lines.append(f"| {model} | {direction} | {way} | {figures} |")
    return "\n".join(lines)


def _summary(runs: list[Run]) -> dict[str, Any]:
    return {
        "seconds": statistics.median(run.seconds for run in runs),
        "cpu_seconds": statistics.median(run.cpu_seconds for run in runs),
        "peak_gib": round(max(run.peak for run in runs) / 2**30, 3),
        "runs": [run.seconds for run in runs],
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Runs the benchmark and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing; write the table of docs/conversion.md")
    parser.add_argument("--folder", type=Path, help="where the models are made, and removed")
    parser.add_argument("--shape", choices=SHAPES, default="1.5B")
    parser.add_argument("--alone", action="store_true", help="compare with nothing but what went in")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    if arguments.table:
        page = ROOT / "docs/conversion.md"
        head, end = page.read_text().split(MARK)[0], page.read_text().split(END)[1]
        page.write_text(f"{head}{MARK}\n{table(ROOT / 'benchmarks/results')}\n{END}{end}")
        return
    if arguments.folder is None:
        parser.error("--folder is needed")
    shape: ModelShape = SHAPES[arguments.shape]
    weights = {name: Weight(dims, torch.bfloat16) for name, dims in model_weights(shape).items()}
    tensors = Tensors(weights, lambda name: random_weight(name, weights[name]))

    def same(folder: Path) -> None:
        found = (open_hf if (folder / "config.json").is_file() else open_meta)(folder).tensors
        different = [name for name in weights if not torch.equal(found.read(name), tensors.read(name))]
        if different:
            raise RuntimeError(f"{folder} is not what went in: {different}")

    work = arguments.folder / "conversion-benchmark"
    work.mkdir(parents=True)
    try:
        (work / "pth").mkdir()
        write_meta(work / "pth", shape, tensors)
        if arguments.alone:
            figures = alone(work / "pth", work / "out", same)
        else:
            (work / "hf").mkdir()
            write_hf(work / "hf", shape, tensors, 8192, 5 * 10**9)
            plain("pth to dcp", work / "pth", work / "dcp")
            shutil.copy(_record(work, shape), work / "dcp")
            figures = compare({name: work / name for name in ("pth", "hf", "dcp")}, work / "out", arguments.rounds)
    finally:
        shutil.rmtree(work)

    rows = [
        [direction, name, *(f"{run[key]:.1f}" for key in ("seconds", "cpu_seconds")), f"{run['peak_gib']:.2f}"]
        for direction, ways in figures.items()
        for name, run in ways.items()
    ]
    print(tabulate(rows, headers=["", "", "seconds", "of processors", "peak RssAnon, GiB"], disable_numparse=True))
    if arguments.json:
        facts = {
            "shape": arguments.shape,
            "parameters": shape.num_params,
            "bytes": tensors.nbytes,
            "largest_tensor_bytes": max(weight.nbytes for weight in weights.values()),
            "directions": figures,
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "safetensors")},
        }
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


def _record(work: Path, shape: ModelShape) -> Path:
    """A record of the shape, for the checkpoint that PyTorch has written."""
    path = work / "checkpoint.json"
    path.write_text(json.dumps({"format": 1, "model": vars(shape)}))
    return path


if __name__ == "__main__":
    main()
