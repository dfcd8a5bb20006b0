"""Values of the configuration: the types and ranges of the file, and the same from the command line."""

from pathlib import Path

import pytest

from tests.test_config import DATA, problems_of
from torchtitan.config import ConfigError, load_config

WRONG_VALUES = {
    # What TOML says it is, it is: nothing is converted.
    "training.steps": ["2.0", "true", '"5"', "[5]", "{ a = 1 }", "2026-01-02", "0", "-1", "nan", "inf"],
    "training.seq_len": ["1.5", '"64"', "0", "-64"],
    "training.batch_size": ["0", "-1", "true"],
    "training.global_batch_size": ["0", "-2", "1.0"],
    "training.warmup_steps": ["-1", "0.5"],
    "training.stop_after_step": ["0", "-1"],
    "training.max_norm": ["0.0", "-1.0", "nan", "inf", "-inf", "true", '"1"'],
    "training.seed": ["-1", "9223372036854775808", "0.0"],
    "training.vocab_size": ["2", "257", "0", "-256", "256.0"],
    "training.num_workers": ["-1", "0.0"],
    "training.data_parallel_replicate_degree": ["0", "-1"],
    "training.data_parallel_shard_degree": ["0", "-2"],
    "training.dataset": ['"macaque"', '""', "1", '["primate"]'],
    "training.dataset_path": ['""', "3"],
    "training.split": ['""', "true"],
    "training.malformed_rows": ['"ignore"', "true"],
    "training.synthetic_kind": ['"gaussian"'],
    "training.shuffle": ["1", '"true"', "0.0"],
    "training.document_mask": ["0"],
    "training.compile": ['"yes"'],
    "training.mixed_precision_param": ['"float16"'],
    "training.gc_freq": ["0"],
    "optimizer.name": ['"SGD"'],
    "optimizer.lr": ["0.0", "-1e-4", "nan", "inf", '"3e-4"', "true"],
    "optimizer.beta1": ["1.0", "-0.1", "nan"],
    "optimizer.beta2": ["1.0", "-0.1", "inf"],
    "optimizer.eps": ["0.0", "-1e-8", "nan"],
    "optimizer.weight_decay": ["-0.1", "nan", "inf"],
    "model.name": ['"gpt2"'],
    "model.flavor": ['"7B"', "8"],
    "model.attention": ['"flash"'],
    "model.rope_scaling": ['"linear"', "8"],
    "model.dim": ["0", "-64", "64.0"],
    "model.n_layers": ["0"],
    "model.n_heads": ["0"],
    "model.n_kv_heads": ["0"],
    "model.ffn_dim": ["0"],
    "model.rope_theta": ["0.0", "nan", "-1.0"],
    "model.norm_eps": ["0.0", "nan"],
    "metrics.log_freq": ["0", "-1"],
    "metrics.enable_tensorboard": ["1"],
    "metrics.save_tb_folder": ['"/tb"', '"../tb"', '"."', '""'],
    "checkpoint.enable_checkpoint": ['"on"'],
    "checkpoint.folder": ['"/checkpoint"', '"../x"', '"a/../../x"', '"a/.."', '"."', '""', "1"],
    "checkpoint.interval": ["0", "-5", "1.0"],
    "checkpoint.keep_latest_k": ["-1"],
    "checkpoint.async_mode": ['"yes"', "true"],
    "checkpoint.load_step": ["0", "-2"],
    "checkpoint.init_from": ['""'],
    "checkpoint.init_missing_keys": ['"output.weight"', "[1]", '[""]'],
    "checkpoint.export_dtype": ['"int8"'],
    "activation_checkpoint.mode": ['"selective"'],
    "activation_checkpoint.projections_layers": ["-1", "1.5"],
    "activation_checkpoint.gate_up_layers": ["-1", '"all"'],
    "activation_checkpoint.offload_layers": ["-1", "true"],
    "activation_checkpoint.device_memory_gib": ["0", "nan", "inf"],
    "activation_checkpoint.host_memory_gib": ["-1"],
    "comm.init_timeout_seconds": ["0"],
    "comm.train_timeout_seconds": ["-1", "nan"],
    "profiling.profile_freq": ["0", "2"],
    "profiling.save_traces_folder": ['"/traces"'],
    "profiling.save_memory_snapshot_folder": ['"../snapshots"'],
    "float8.enable_float8_linear": ["1"],
    "float8.recipe": ['"fast"'],
    "training.reshard_after_forward": ['"never"'],
    "job.dump_folder": ['""', "1"],
    "job.description": ["1", "[]"],
}


class TestWrongValues:
    @pytest.mark.parametrize("key", WRONG_VALUES)
    def test_in_the_file(self, tmp_path: Path, key: str) -> None:
        table, name = key.split(".")
        for value in WRONG_VALUES[key]:
            data = () if key == "training.dataset" else ("--training.dataset", "synthetic")
            [problem] = problems_of(tmp_path, f"[{table}]\n{name} = {value}\n", *data)
            assert problem.startswith(f"config.toml: {key}")
            assert " = " in problem

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("training.steps", "abc"),
            ("training.steps", "1.5"),
            ("training.steps", "0"),
            ("training.steps", "-1"),
            ("training.steps", "nan"),
            ("training.steps", ""),
            ("training.max_norm", "nan"),
            ("training.max_norm", "inf"),
            ("training.max_norm", "big"),
            ("training.compile", "maybe"),
            ("training.dataset", "Primat"),
            ("training.vocab_size", "257"),
            ("model.dim", "-1"),
            ("optimizer.lr", "-0.5"),
            ("optimizer.beta1", "1"),
            ("checkpoint.folder", "/checkpoint"),
            ("checkpoint.folder", "../checkpoint"),
            ("checkpoint.init_missing_keys", ""),
            ("float8.enable_float8_linear", "2"),
            ("job.config_file", ""),
        ],
    )
    def test_on_the_command_line(self, key: str, value: str) -> None:
        data = [] if key == "training.dataset" else ["--training.dataset", "synthetic"]
        for flags in ([f"--{key}", value], [f"--{key}={value}"]):
            with pytest.raises(ConfigError) as caught:
                load_config([*data, *flags])
            [problem] = map(str, caught.value.problems)
            assert problem.startswith(f"command line: {key} = ")
            assert value in problem

    @pytest.mark.parametrize("flags", [["--training.steps"], ["--training.steps", "--training.seed", "1"]])
    def test_a_flag_without_its_value(self, tmp_path: Path, flags: list[str]) -> None:
        assert problems_of(tmp_path, DATA, *flags) == ["command line: --training.steps: needs a value"]

    def test_bytes_that_are_not_utf8(self, tmp_path: Path) -> None:
        [problem] = problems_of(tmp_path, DATA, "--job.description", b"\xff".decode("utf-8", "surrogateescape"))
        assert problem == r"command line: '\udcff': not UTF-8 text"

    @pytest.mark.parametrize(
        ("key", "value", "meant"),
        [
            ("training.dataset", "primat", "primate"),
            ("training.dataset", "RODENT", "rodent"),
            ("model.flavor", "8b", "8B"),
            ("optimizer.name", "adamw", "AdamW"),
            ("checkpoint.async_mode", "async_pinned_mem", "async_with_pinned_mem"),
        ],
    )
    def test_the_nearest_of_the_allowed_values(self, tmp_path: Path, key: str, value: str, meant: str) -> None:
        table, name = key.split(".")
        data = [] if key == "training.dataset" else ["--training.dataset", "synthetic"]
        [in_file] = problems_of(tmp_path, f'[{table}]\n{name} = "{value}"\n', *data)
        with pytest.raises(ConfigError) as caught:
            load_config([*data, f"--{key}", value])
        [on_command_line] = map(str, caught.value.problems)
        assert in_file.endswith(f"; did you mean '{meant}'?")
        assert on_command_line.endswith(f"; did you mean '{meant}'?")

    def test_a_wrong_value_on_the_command_line_is_not_laid_at_the_files_door(self, tmp_path: Path) -> None:
        [problem] = problems_of(tmp_path, DATA + "seq_len = 64\n", "--training.seq_len", "-64")
        assert problem.startswith("command line: training.seq_len = -64: ")
