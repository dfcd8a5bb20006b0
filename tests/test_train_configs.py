"""The configurations that ship: each loads, and the four models are what the design says."""

import tomllib
from pathlib import Path

import pytest

from tests.processes import ROOT
from torchtitan.config import JobConfig, load_config
from torchtitan.models.llama.shape import ModelShape, check_shape

FILES = sorted((ROOT / "train_configs").glob("*.toml"))
#         dataset      starts from                            steps    lr    warm-up  interval
MODELS = {
    "primate": ("primate", None, 50_000, 3e-4, 1_000, 390),
    "synthetic": ("synthetic", None, 500_000, 3e-5, 2_000, 240),
    "synthetic_primate": ("primate", "./outputs/synthetic-8B-131k/checkpoint", 50_000, 3e-4, 1_000, 240),
    "lang_primate": ("primate", "./outputs/llama-3.1-8B-dcp", 30_000, 3e-4, 1_000, 235),
}


def load(path: Path) -> JobConfig:
    return load_config(["--job.config_file", str(path)], checks=[check_shape])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_loads(path: Path) -> None:
    load(path)


@pytest.mark.parametrize("name", MODELS)
def test_the_four_models(name: str) -> None:
    config = load(ROOT / f"train_configs/{name}_8b_131k.toml")
    training, checkpoint = config.training, config.checkpoint
    found = (training.dataset, checkpoint.init_from, training.steps, config.optimizer.lr)
    assert (*found, training.warmup_steps, checkpoint.interval) == MODELS[name]
    assert (training.seq_len, training.batch_size, training.max_norm) == (131_072, 1, 1.0)
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (config.metrics.log_freq, training.mixed_precision_param) == (10, "bfloat16")
    shape = ModelShape.from_config(config)
    assert (shape.num_params, shape.rope_scaling) == (6_981_685_248, "llama3.1")
    missing = ["tok_embeddings.weight", "output.weight"] if name == "lang_primate" else []
    assert checkpoint.init_missing_keys == missing


def test_the_synthetic_primate_model_starts_where_the_synthetic_one_writes() -> None:
    synthetic = load(ROOT / "train_configs/synthetic_8b_131k.toml")
    start = load(ROOT / "train_configs/synthetic_primate_8b_131k.toml").checkpoint.init_from
    assert start == f"{synthetic.job.dump_folder}/{synthetic.checkpoint.folder}"


def test_no_two_configurations_write_to_one_folder() -> None:
    folders = [tomllib.loads(path.read_text())["job"]["dump_folder"] for path in FILES]
    assert len(set(folders)) == len(folders)
