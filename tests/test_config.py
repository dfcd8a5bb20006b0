"""The configuration: what is read, what is refused and how, and what is written back."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from torchtitan.config import ConfigError, JobConfig, dump_toml, load_config
from torchtitan.config.retired import RETIRED_KEYS

ROOT = Path(__file__).resolve().parents[1]
DATA = '[training]\ndataset = "synthetic"\n'
FIELDS = [
    (table, name)
    for table, field in JobConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    for name in field.annotation.model_fields
]


def load(folder: Path, toml: str | bytes, *flags: str) -> JobConfig:
    """The configuration of this TOML text and these flags."""
    path = folder / "config.toml"
    path.write_bytes(toml if isinstance(toml, bytes) else toml.encode())
    return load_config(["--job.config_file", str(path), *flags])


def problems_of(folder: Path, toml: str | bytes, *flags: str) -> list[str]:
    """All problems of a configuration that must be refused, without the file's folder."""
    with pytest.raises(ConfigError) as caught:
        load(folder, toml, *flags)
    lines = [str(problem) for problem in caught.value.problems]
    assert str(caught.value).splitlines()[1:] == [f"  {line}" for line in lines]
    return [line.replace(str(folder) + "/", "") for line in lines]


class TestReading:
    def test_file_and_command_line_override_the_defaults(self, tmp_path: Path) -> None:
        toml = DATA + "steps = 7\nseq_len = 64\nmax_norm = 2\n[model]\nflavor = '8B'\n"
        config = load(tmp_path, toml, "--training.steps", "9", "--optimizer.lr=1e-5", "--training.seed", "3")
        assert (config.training.steps, config.training.seq_len, config.training.seed) == (9, 64, 3)
        assert (config.model.flavor, config.optimizer.lr, config.training.max_norm) == ("8B", 1e-5, 2.0)
        assert config.job.config_file == str(tmp_path / "config.toml")
        assert config.training.vocab_size == JobConfig().training.vocab_size

    def test_the_command_line_alone_will_do(self) -> None:
        assert load_config(["--training.dataset", "primate"]).training.dataset == "primate"
        assert load_config(["--training.dataset_path", "somewhere"]).training.dataset_path == "somewhere"

    def test_every_key_of_the_groups_files_is_known(self, tmp_path: Path) -> None:
        toml = """
            [job]
            dump_folder = "./outputs/primate"
            description = "8B model"
            [profiling]
            enable_profiling = true
            save_traces_folder = "profile_trace"
            profile_freq = 10
            [metrics]
            log_freq = 10
            enable_tensorboard = true
            save_tb_folder = "tb"
            [model]
            name = "llama3"
            flavor = "8B"
            [optimizer]
            name = "AdamW"
            lr = 3e-4
            [training]
            dataset = "primate"
            dataset_path = "somewhere"
            batch_size = 1
            seq_len = 131072
            vocab_size = 256
            warmup_steps = 1000
            max_norm = 1.0
            steps = 50000
            data_parallel_replicate_degree = 1
            data_parallel_shard_degree = -1
            compile = false
            [checkpoint]
            enable_checkpoint = true
            folder = "checkpoint"
            interval = 390
            keep_latest_k = 0
            model_weights_only = false
            export_dtype = "float32"
            async_mode = "disabled"
            [activation_checkpoint]
            mode = "full"
            [float8]
            enable_float8_linear = false
        """
        config = load(tmp_path, toml)
        assert (config.checkpoint.interval, config.activation_checkpoint.mode) == (390, "full")

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            (["--training.compile"], True),
            (["--training.compile", "--training.steps", "5"], True),
            (["--training.compile=true"], True),
            (["--training.compile", "True"], True),
            (["--training.compile", "false"], False),
            (["--training.compile", "no"], False),
        ],
    )
    def test_a_boolean_is_a_bare_switch_or_takes_a_value(
        self, tmp_path: Path, flags: list[str], expected: bool
    ) -> None:
        assert load(tmp_path, DATA + f"compile = {str(not expected).lower()}\n", *flags).training.compile is expected

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            (["--checkpoint.init_missing_keys", "a"], ["a"]),
            (["--checkpoint.init_missing_keys", "a,b"], ["a", "b"]),
            (["--checkpoint.init_missing_keys", '["a", "b"]'], ["a", "b"]),
            (["--checkpoint.init_missing_keys=a", "--checkpoint.init_missing_keys=b"], ["a", "b"]),
            (["--checkpoint.init_missing_keys", "[]"], []),
        ],
    )
    def test_a_list_can_be_given_on_the_command_line(
        self, tmp_path: Path, flags: list[str], expected: list[str]
    ) -> None:
        config = load(tmp_path, DATA + "[checkpoint]\ninit_missing_keys = ['x']\n", *flags)
        assert config.checkpoint.init_missing_keys == expected

    def test_the_last_of_two_equal_flags_counts(self, tmp_path: Path) -> None:
        assert load(tmp_path, DATA, "--training.steps", "5", "--training.steps", "6").training.steps == 6

    def test_none_unsets_a_key_of_the_file(self, tmp_path: Path) -> None:
        assert load(tmp_path, DATA + "[model]\ndim = 64\n", "--model.dim", "None").model.dim is None

    @settings(max_examples=40)
    @given(st.text().filter(lambda text: text != "None"))
    def test_any_text_passes_the_command_line_unchanged(self, text: str) -> None:
        flags = ["--training.dataset", "synthetic"]
        assert load_config([*flags, f"--job.description={text}"]).job.description == text
        if not text.startswith("--"):
            assert load_config(["--job.description", text, *flags]).job.description == text

    def test_a_configuration_cannot_be_changed(self) -> None:
        config = JobConfig()
        with pytest.raises(ValidationError, match="frozen"):
            config.training.steps = 5
        with pytest.raises(ValidationError, match="frozen"):
            config.training = config.training

    def test_loading_is_quick_and_imports_nothing_heavy(self, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text(DATA)
        program = (
            "import json, sys, time\n"
            "from torchtitan.config import dump_toml, load_config\n"
            "dump_toml(load_config(sys.argv[1:]))\n"
            "print(json.dumps([time.process_time(), sorted(sys.modules)]))\n"
        )
        command = [sys.executable, "-c", program, "--job.config_file", str(tmp_path / "config.toml")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds, modules = json.loads(done.stdout)  # of processor time: this machine may be busy with other things
        assert "torchtitan.config" in modules
        assert not {"torch", "numpy", "pyarrow", "datasets"} & set(modules)
        assert seconds < 0.8


class TestUnreadableFile:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"steps: 3\n", "not valid TOML: "),
            (b"[training\nsteps = 3\n", "not valid TOML: "),
            (b"[training]\nsteps = 3\nsteps = 4\n", "not valid TOML: "),
            (b"[training]\nsteps = 3\n[training]\nseed = 4\n", "not valid TOML: "),
            ('[job]\ndescription = "é"\n'.encode("latin-1"), "not UTF-8 text: "),
            (DATA.encode("utf-16"), "not UTF-8 text: "),
        ],
    )
    def test_not_toml_or_not_utf8(self, tmp_path: Path, content: bytes, message: str) -> None:
        [problem] = problems_of(tmp_path, content)
        assert problem.startswith(f"config.toml: {message}")

    def test_absent_or_a_folder_and_what_else_is_wrong(self, tmp_path: Path) -> None:
        for path, reason in ((tmp_path / "none.toml", "No such file or directory"), (tmp_path, "Is a directory")):
            with pytest.raises(ConfigError) as caught:
                load_config(["--job.config_file", str(path), "--training.stepz", "4"])
            unknown, unreadable = map(str, caught.value.problems)
            assert unreadable == f"{path}: the file of job.config_file cannot be read: {reason}"
            assert unknown == "command line: --training.stepz: unknown key; did you mean training.steps?"


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("toml", "expected"),
        [
            ("[training]\nstepz = 3\n", "training.stepz = 3: unknown key; did you mean training.steps?"),
            ("[optimizer]\nLR = 1.0\n", "optimizer.LR = 1.0: unknown key; did you mean optimizer.lr?"),
            ("[training]\nlr = 1e-4\n", "training.lr = 0.0001: unknown key; did you mean optimizer.lr?"),
            ("[training]\nintervall = 4\n", "training.intervall = 4: unknown key; did you mean checkpoint.interval?"),
            ("[optimiser]\nname = 'AdamW'\n", 'optimiser.name = "AdamW": unknown key; did you mean optimizer.name?'),
            ("[trainin]\nseq_len = 4\n", "trainin.seq_len = 4: unknown key; did you mean training.seq_len?"),
            ("[trainin]\n", "[trainin]: unknown table; did you mean training?"),
            ("steps = 3\n", "steps = 3: stands outside a table; did you mean training.steps?"),
            ("optimizer = 3\n", "optimizer = 3: is a table, written [optimizer]"),
            ("[[model]]\ndim = 8\n", 'model = [{"dim": 8}]: is a table, written [model]'),
            ("[model.sub]\ndim = 8\n", 'model.sub = {"dim": 8}: unknown key'),
            ("[training]\n'a.b' = 1\n", "training.a.b = 1: unknown key"),
            ("[training]\nwhen = 2026-01-02\n", "training.when = 2026-01-02: unknown key"),
        ],
    )
    def test_in_the_file_get_the_nearest_name(self, tmp_path: Path, toml: str, expected: str) -> None:
        [problem] = problems_of(tmp_path, toml, "--training.dataset", "synthetic")
        assert problem.startswith(f"config.toml: {expected}")
        # No name is offered where none is near.
        assert ("did you mean" in problem) == ("did you mean" in expected)
        assert ("--help` lists all" in problem) == ("unknown" in expected and "did you mean" not in expected)

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            (["--training.stepz", "3"], "--training.stepz: unknown key; did you mean training.steps?"),
            (["--training.step=3"], "--training.step: unknown key; did you mean training.steps?"),
            (["--optimizer.lrr", "-3"], "--optimizer.lrr: unknown key; did you mean optimizer.lr?"),
            (["--training.no-compile"], "--training.no-compile: unknown key; did you mean training.compile?"),
            (["--steps", "3"], "--steps: unknown table; did you mean training.steps?"),
            (["--zzz"], "--zzz: unknown table; "),
            (["3"], "3: not a flag; "),
            (["-x"], "-x: not a flag; "),
            (["--training.steps", "3", "4"], "4: not a flag; "),
            (["--training.steps=3", "4"], "4: not a flag; "),
            (["--training"], "--training: is a table; "),
            (['--training={"steps": 3}'], "--training: is a table; "),
        ],
    )
    def test_on_the_command_line(self, tmp_path: Path, flags: list[str], expected: str) -> None:
        [problem] = problems_of(tmp_path, DATA, *flags)
        assert problem.startswith(f"command line: {expected}")

    @pytest.mark.parametrize("name", sorted(RETIRED_KEYS))
    def test_retired_keys_say_why_and_what_to_do(self, tmp_path: Path, name: str) -> None:
        expected = f"has no meaning here: {RETIRED_KEYS[name]}"
        toml = f"{DATA}{name} = 2\n[experimental]\n{name} = 2\n"
        assert problems_of(tmp_path, toml, f"--training.{name}", "2") == [
            f"command line: --training.{name}: {expected}",
            f"config.toml: training.{name} = 2: {expected}",
            f"config.toml: experimental.{name} = 2: {expected}",
        ]

    def test_retired_keys_are_those_that_were_asked_for_and_none_is_in_use(self) -> None:
        asked = {"tensor_parallel_degree", "pipeline_parallel_degree", "norm_type", "selective_ac_option"}
        assert asked | {"interval_type"} <= set(RETIRED_KEYS)
        assert not set(RETIRED_KEYS) & {name for _, name in FIELDS}


class TestContradictions:
    def test_no_data(self, tmp_path: Path) -> None:
        [problem] = problems_of(tmp_path, "[training]\nsteps = 3\n")
        assert "neither training.dataset nor training.dataset_path" in problem
        with pytest.raises(ConfigError, match=r"give a configuration with --job\.config_file FILE"):
            load_config([])

    def test_synthetic_data_and_a_path(self, tmp_path: Path) -> None:
        [problem] = problems_of(tmp_path, DATA, "--training.dataset_path", "somewhere")
        assert problem.startswith("command line: training.dataset_path: contradicts training.dataset")

    def test_a_step_to_load_without_checkpoints(self, tmp_path: Path) -> None:
        [problem] = problems_of(
            tmp_path, DATA, "--checkpoint.load_step", "5", "--checkpoint.enable_checkpoint", "false"
        )
        assert "checkpoint.load_step: has no effect with checkpoint.enable_checkpoint = false" in problem

    def test_checks_of_the_caller_see_the_values_that_remain(self, tmp_path: Path) -> None:
        def more_warmup_than_steps(config: JobConfig) -> Iterable[tuple[str, str]]:
            if config.training.warmup_steps > config.training.steps:
                yield "training.warmup_steps", f"{config.training.warmup_steps} > {config.training.steps}"

        (tmp_path / "config.toml").write_text(DATA + "steps = 3\nwarmup_steps = 4\n")
        flags = ["--job.config_file", str(tmp_path / "config.toml")]
        with pytest.raises(ConfigError) as caught:
            load_config(flags, checks=[more_warmup_than_steps])
        assert [str(problem) for problem in caught.value.problems] == [
            f"{tmp_path}/config.toml: training.warmup_steps: 4 > 3"
        ]
        # One problem a key: a value that is wrong by itself is not also called a contradiction.
        with pytest.raises(ConfigError) as caught:
            load_config([*flags, "--training.warmup_steps", "x", "--training.steps", "2"], [more_warmup_than_steps])
        assert len(caught.value.problems) == 1
        load_config([*flags, "--training.warmup_steps", "3"], checks=[more_warmup_than_steps])


def test_all_problems_come_in_one_list(tmp_path: Path) -> None:
    toml = """
        steps = 3
        [training]
        dataset = "primate"
        stepz = 4
        seq_len = -1
        max_norm = nan
        vocab_size = "256"
        [optimizr]
        lr = 1e-4
        [experimental]
        pipeline_parallel_degree = 2
        [checkpoint]
        folder = "/somewhere"
        init_missing_keys = ["", ""]
    """
    flags = ["--training.batch_size", "x", "--model.flavour", "8B", "--optimizer.lr", "nan", "stray", "--model.dim"]
    problems = problems_of(tmp_path, toml, *flags)
    subjects = [problem.split(": ")[:2] for problem in problems]
    assert sorted(subjects) == sorted(
        [
            ["command line", "--model.flavour"],
            ["command line", "stray"],
            ["command line", "--model.dim"],
            ["command line", 'training.batch_size = "x"'],
            ["command line", "optimizer.lr = nan"],
            ["config.toml", "steps = 3"],
            ["config.toml", "training.stepz = 4"],
            ["config.toml", "training.seq_len = -1"],
            ["config.toml", "training.max_norm = nan"],
            ["config.toml", 'training.vocab_size = "256"'],
            ["config.toml", "optimizr.lr = 0.0001"],
            ["config.toml", "experimental.pipeline_parallel_degree = 2"],
            ["config.toml", 'checkpoint.folder = "/somewhere"'],
            ["config.toml", 'checkpoint.init_missing_keys = ""'],
            ["config.toml", 'checkpoint.init_missing_keys = ""'],
        ]
    )


class TestHelp:
    def test_shows_the_docstring_of_every_key(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "10000")
        with pytest.raises(SystemExit) as stopped:
            load_config(["--help"])
        assert stopped.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        for table, name in FIELDS:
            table_type = JobConfig.model_fields[table].annotation
            assert isinstance(table_type, type)
            assert issubclass(table_type, BaseModel)
            description = table_type.model_fields[name].description
            assert description, f"{table}.{name} has no docstring"
            _, found, rest = shown.partition(f" --{table}.{name} ")
            assert found
            assert " ".join(description.split()) in rest

    def test_goes_before_any_problem(self) -> None:
        with pytest.raises(SystemExit):
            load_config(["--training.stepz", "3", "--help"])


texts = st.text(max_size=30) | st.text(st.sampled_from("\"\\\n\r\t\x00\x1f\x7f\x80 #=[]'éπ😀\u2028\ufeff"), max_size=9)
tables = st.fixed_dictionaries(
    {
        "job": st.fixed_dictionaries({"description": texts, "dump_folder": texts.filter(bool)}),
        "training": st.fixed_dictionaries(
            {
                "dataset_path": texts.filter(bool),
                "seed": st.integers(0, 2**63 - 1),
                "shuffle": st.booleans(),
                "max_norm": st.floats(0, exclude_min=True, allow_infinity=False),
            }
        ),
        "optimizer": st.fixed_dictionaries({"lr": st.floats(0, exclude_min=True, allow_infinity=False)}),
        "checkpoint": st.fixed_dictionaries({"init_missing_keys": st.lists(texts.filter(bool), max_size=3)}),
    },
    optional={"model": st.fixed_dictionaries({"dim": st.integers(1, 2**40)})},
)


@given(tables)
def test_what_is_written_is_read_back(values: dict[str, dict[str, object]]) -> None:
    config = JobConfig.model_validate(values)
    with tempfile.TemporaryDirectory() as folder:
        read = load(Path(folder), dump_toml(config))
    written = config.model_dump()
    assert read.model_dump() == {**written, "job": {**written["job"], "config_file": read.job.config_file}}
