"""Evaluation on a GPU: compiled, in bf16, and in the middle of training."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run, train, train_command

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
RUN = ("--model.flavor", "250M", "--training.dataset", "synthetic", "--training.synthetic_kind", "poisson")
RUN += ("--training.seq_len", "8192", "--training.batch_size", "2", "--training.compile", "--training.deterministic")
RUN += ("--training.steps", "6", "--training.warmup_steps", "2", "--metrics.log_freq", "1")
RUN += ("--metrics.enable_tensorboard", "false")
VALIDATION = ("--validation.enable", "--validation.interval", "2", "--validation.max_windows", "7")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_validation_changes_no_bit_of_training_and_is_an_evaluation(tmp_path: Path) -> None:
    for name, more in (("plain", ()), ("validated", VALIDATION)):
        train(*RUN, *more, "--job.dump_folder", str(tmp_path / name), CUDA_VISIBLE_DEVICES=GPU)
    plain, validated = lines(tmp_path / "plain"), lines(tmp_path / "validated")
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in plain] == [line[key] for line in validated]
    checkpoint = ("--checkpoint", str(tmp_path / "validated/checkpoint"), "--max_windows", "7")
    command = train_command(*RUN, "--job.dump_folder", str(tmp_path / "validated"), *checkpoint)
    done = run([command[0], "evaluate.py", *command[2:]], CUDA_VISIBLE_DEVICES=GPU)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "validated/evaluation/step-6.max_windows-7.json").read_text())["overall"]
    for name in ("nats_per_token", "bits_per_spike"):
        assert found[name] == pytest.approx(validated[-1][f"validation_{name}"], rel=1e-6)
