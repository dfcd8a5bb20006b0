#!/usr/bin/env python3
"""The whole way at a small scale: `make demo`.

Writes made-up recordings, trains train_configs/debug.toml on them, stops halfway, goes on from the checkpoint in fresh
processes, and says what the model has learned about recordings that it has not seen.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tabulate import tabulate  # noqa: E402

from torchtitan.checkpoint.init_from import find_weights, load_weights  # noqa: E402
from torchtitan.config import JobConfig, load_config  # noqa: E402
from torchtitan.data.index import load_index  # noqa: E402
from torchtitan.data.recordings import open_recordings  # noqa: E402
from torchtitan.data.windows import RecordedWindows  # noqa: E402
from torchtitan.distributed.degrees import Degrees  # noqa: E402
from torchtitan.distributed.parallelize import build_model, init_weights  # noqa: E402
from torchtitan.distributed.world import build_mesh, init_world  # noqa: E402
from torchtitan.evaluation.nulls import histogram_entropy, unigram_entropy  # noqa: E402
from torchtitan.evaluation.score import Score, score  # noqa: E402
from torchtitan.metrics import read_metrics  # noqa: E402

ARGUMENTS = ("--job.config_file", "train_configs/debug.toml", "--job.dump_folder", "outputs/demo")
CLEARLY_BELOW = 0.95
"""Share of the unigram entropy that the model has to fall below: where BOS stands is not all there is to learn."""


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


def score_on_test_split(checkpoint: Path) -> tuple[Score, float, float]:
    """The trained model on the held-out recordings, and two rate models on the same counts, nats a count."""
    config = load_config([*ARGUMENTS, "--training.split", "test", "--checkpoint.init_from", str(checkpoint)])
    training, world = config.training, init_world(config.comm.init_timeout_seconds)
    model = build_model(config, build_mesh(Degrees.of(training, world.size), world.device), world.device)
    source = find_weights(model, config.checkpoint)
    init_weights(model, world.device, training.seed)
    load_weights(model, source)

    recordings = open_recordings(training)
    index = load_index(recordings, training.malformed_rows)
    windows = RecordedWindows(recordings, index, seq_len=training.seq_len, vocab_size=training.vocab_size)
    reached = score(model, windows, world.device, training.batch_size)
    sizes = zip(index.rows.tolist(), index.neurons.tolist(), index.bins.tolist(), strict=True)
    held_out = [recordings.spike_counts(*size) for size in sizes]
    torch.distributed.destroy_process_group()
    return reached, unigram_entropy(held_out), histogram_entropy(held_out)


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
    reached, unigram, histogram = score_on_test_split(checkpoints)

    steps = read_metrics(dump_folder / "metrics.jsonl")
    last = steps[-3:]
    speed = sorted(step["tokens_per_second_per_gpu"] for step in steps)[len(steps) // 2]
    rows = [
        ("loss at step 1", f"{steps[0]['loss']:.4f} nats a token"),
        (f"loss at steps {last[0]['step']}-{last[-1]['step']}", f"{sum(s['loss'] for s in last) / len(last):.4f}"),
        ("test split, BOS left out", f"{reached.nats_per_count:.4f} nats a count over {reached.counts:,} counts"),
        ("unigram entropy of the same counts", f"{unigram:.4f}"),
        ("each neuron's own histogram, fitted to them", f"{histogram:.4f}"),
        ("speed", f"{speed:,.0f} tokens/s a process"),
        ("metrics", str(dump_folder / "metrics.jsonl")),
        ("checkpoints", str(checkpoints)),
        ("TensorBoard", f"tensorboard --logdir {dump_folder / config.metrics.save_tb_folder}"),
        ("the demo took", f"{time.perf_counter() - started:.0f} s"),
    ]
    print("\n" + tabulate(rows, tablefmt="simple_outline"))
    if reached.nats_per_count > CLEARLY_BELOW * unigram:
        sys.exit("the model has learned less than it should have: its loss is not clearly below the unigram entropy")


if __name__ == "__main__":
    main()
