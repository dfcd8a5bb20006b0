#!/usr/bin/env python3
"""The whole way at a small scale: `make demo`.

Writes made-up recordings, trains train_configs/debug.toml on them, stops halfway, goes on from the checkpoint in fresh
processes, and says what the model has learned.
"""

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from torchtitan.config import JobConfig, load_config  # noqa: E402
from torchtitan.metrics import read_metrics  # noqa: E402

CONFIG = "train_configs/debug.toml"


def run(*arguments: str) -> None:
    """Runs a Python command, showing it as one would type it."""
    typed = " ".join(arguments).replace("-m torch.distributed.run", "torchrun")
    print(f"\n$ {typed if typed.startswith('torchrun') else f'python {typed}'}", flush=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    status = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT).returncode
    if status:
        sys.exit(f"that command ended with exit status {status}")


def train_in_two_sessions(config: JobConfig) -> None:
    """One process a GPU, or two on a CPU; the second session starts from the first one's checkpoint."""
    import torch

    processes = str(torch.cuda.device_count() or 2)
    command = ("-m", "torch.distributed.run", "--nproc_per_node", processes, "train.py", "--job.config_file", CONFIG)
    run(*command, "--training.stop_after_step", str(config.training.steps // 2))
    run(*command)


def score_on_test_split() -> list[tuple[str, str]]:
    """The trained model and two rate models on the held-out recordings, as rows of the table."""
    import torch

    from torchtitan.checkpoint.init_from import init_from
    from torchtitan.data.index import load_index
    from torchtitan.data.recordings import open_recordings
    from torchtitan.data.windows import RecordedWindows
    from torchtitan.distributed.parallelize import init_weights, parallelize
    from torchtitan.distributed.world import build_mesh, init_world
    from torchtitan.evaluation.nulls import histogram_entropy, unigram_entropy
    from torchtitan.evaluation.score import score
    from torchtitan.models.llama.attention import choose_attention
    from torchtitan.models.llama.model import Transformer
    from torchtitan.models.llama.shape import ModelShape

    trained = load_config(["--job.config_file", CONFIG])
    newest = str(Path(trained.job.dump_folder) / trained.checkpoint.folder)
    config = load_config(["--job.config_file", CONFIG, "--training.split", "test", "--checkpoint.init_from", newest])
    world = init_world(config.comm.init_timeout_seconds)
    attention = choose_attention(
        config.model.attention, world.device, getattr(torch, config.training.mixed_precision_param)
    )
    with torch.device("meta"):
        model = Transformer(ModelShape.from_config(config), attention, max_length=config.training.seq_len)
    parallelize(model, build_mesh(config.training, world), config)
    init_weights(model, world.device, config.training.seed)
    init_from(model, config.checkpoint)

    recordings = open_recordings(config.training)
    index = load_index(recordings, config.training.malformed_rows)
    windows = RecordedWindows(recordings, index, seq_len=config.training.seq_len, vocab_size=config.training.vocab_size)
    reached = score(model, windows, world.device, config.training.batch_size)
    held_out = [
        recordings.spike_counts(int(row), int(neurons), int(bins))
        for row, neurons, bins in zip(index.rows, index.neurons, index.bins, strict=True)
    ]
    torch.distributed.destroy_process_group()
    return [
        ("test split, BOS left out", f"{reached.nats_per_count:.4f} nats a count over {reached.counts:,} counts"),
        ("  unigram entropy of the same counts", f"{unigram_entropy(held_out):.4f}"),
        ("  histogram of each neuron, fitted to them", f"{histogram_entropy(held_out):.4f}"),
    ]


def main() -> None:
    """Runs the demo from scratch."""
    started = time.perf_counter()
    os.chdir(ROOT)
    config = load_config(["--job.config_file", CONFIG])
    dump_folder = Path(config.job.dump_folder)
    shutil.rmtree(dump_folder, ignore_errors=True)
    run("scripts/demo_data.py", str(config.training.dataset_path))
    train_in_two_sessions(config)

    logging.disable(logging.INFO)
    steps = read_metrics(dump_folder / "metrics.jsonl")
    first, last = steps[0], steps[-3:]
    speed = sorted(step["tokens_per_second_per_gpu"] for step in steps)[len(steps) // 2]
    rows = [
        ("loss at step 1", f"{first['loss']:.4f} nats a token"),
        (f"loss at steps {last[0]['step']}-{last[-1]['step']}", f"{sum(s['loss'] for s in last) / len(last):.4f}"),
        *score_on_test_split(),
        ("speed", f"{speed:,.0f} tokens/s a process"),
        ("metrics", str(dump_folder / "metrics.jsonl")),
        ("checkpoints", str(dump_folder / config.checkpoint.folder)),
        ("TensorBoard", f"tensorboard --logdir {dump_folder / config.metrics.save_tb_folder}"),
        ("the demo took", f"{time.perf_counter() - started:.0f} s"),
    ]
    from tabulate import tabulate

    print("\n" + tabulate(rows, tablefmt="simple_outline"))


if __name__ == "__main__":
    main()
