#!/usr/bin/env python3
"""The whole way at a small scale: `make demo`.

Writes made-up recordings, trains train_configs/debug.toml on them, stops halfway, goes on from the checkpoint in fresh
processes, says what the model has learned about recordings that it has not seen, and continues one of them.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tabulate import tabulate  # noqa: E402

from torchtitan.config import JobConfig, load_config  # noqa: E402
from torchtitan.metrics import read_metrics  # noqa: E402

ARGUMENTS = ("--job.config_file", "train_configs/debug.toml", "--job.dump_folder", "outputs/demo")


def run(*arguments: str) -> None:
    """Runs a Python command, showing it as one would type it."""
    typed = " ".join(arguments).replace("-m torch.distributed.run", "torchrun")
    print(f"\n$ {typed if typed.startswith('torchrun') else f'python {typed}'}", flush=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    status = subprocess.run([sys.executable, *arguments], env=environment).returncode
    if status:
        sys.exit(f"that command ended with exit status {status}")


def train_in_two_sessions(config: JobConfig) -> None:
    """One process a GPU, or two on a CPU; the second session goes on from the first one's checkpoint."""
    processes = str(torch.cuda.device_count() or 2)
    command = ("-m", "torch.distributed.run", "--nproc_per_node", processes, "train.py", *ARGUMENTS)
    run(*command, "--training.stop_after_step", str(config.training.steps // 2))
    run(*command)


def evaluate(config: JobConfig) -> dict[str, Any]:
    """The trained model on the held-out recordings, as evaluate.py finds it."""
    folder = Path(config.job.dump_folder)
    run("evaluate.py", *ARGUMENTS, "--checkpoint", str(folder / config.checkpoint.folder))
    return json.loads((folder / f"evaluation/step-{config.training.steps}.json").read_text())["overall"]


def generate(config: JobConfig) -> Path:
    """Continues a held-out recording, far beyond the few bins that the model sees at a time; where the pictures are."""
    folder = Path(config.job.dump_folder)
    output = folder / "generation" / "demo"
    prompt = ("--prompt", f"{config.training.dataset_path}:0", "--bins", "100")
    prompt += ("--samples", "2", "--sliding_window", "--output", str(output))
    run("generate.py", "--checkpoint", str(folder / config.checkpoint.folder), *prompt)
    return output / "plots"


def main() -> None:
    """Runs the demo from scratch."""
    started = time.perf_counter()
    os.chdir(ROOT)
    config = load_config([*ARGUMENTS])
    dump_folder = Path(config.job.dump_folder)
    checkpoints = dump_folder / config.checkpoint.folder
    shutil.rmtree(dump_folder, ignore_errors=True)
    run("scripts/demo_data.py", str(config.training.dataset_path))
    train_in_two_sessions(config)
    reached = evaluate(config)
    pictures = generate(config)

    steps = read_metrics(dump_folder / "metrics.jsonl")
    last = steps[-3:]
    speed = sorted(step["tokens_per_second_per_gpu"] for step in steps)[len(steps) // 2]
    rows = [
        ("loss at step 1", f"{steps[0]['loss']:.4f} nats a token"),
        (f"loss at steps {last[0]['step']}-{last[-1]['step']}", f"{sum(s['loss'] for s in last) / len(last):.4f}"),
        ("test split, BOS left out", f"{reached['nats_per_token']:.4f} over {reached['tokens']:,} counts"),
        ("Poisson with each neuron's mean of them", f"{reached['poisson_null_nats_per_token']:.4f}"),
        ("bits a spike above it", f"{reached['bits_per_spike']:.4f}"),
        ("speed", f"{speed:,.0f} tokens/s a process"),
        ("metrics", str(dump_folder / "metrics.jsonl")),
        ("checkpoints", str(checkpoints)),
        ("evaluation", str(dump_folder / "evaluation")),
        ("generated activity", str(pictures / "demo_data-0-raster.png")),
        ("TensorBoard", f"tensorboard --logdir {dump_folder}"),
        ("the demo took", f"{time.perf_counter() - started:.0f} s"),
    ]
    print("\n" + tabulate(rows, tablefmt="simple_outline"))
    if reached["bits_per_spike"] <= 0:
        sys.exit("the model has learned less than it should have: it predicts no better than each neuron's mean rate")


if __name__ == "__main__":
    main()
