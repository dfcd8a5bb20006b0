"""Everything that can be wrong with what evaluate.py is told: one clear message each."""

from pathlib import Path

import pytest

from tests.checkpoints import saved
from tests.helpers import random_recordings, write_recordings
from tests.processes import run, train_command
from torchtitan.config import ConfigError
from torchtitan.distributed.world import World
from torchtitan.evaluation.arguments import parse
from torchtitan.evaluation.run import evaluate


@pytest.fixture
def recordings(tmp_path: Path) -> str:
    rows = random_recordings([(5, 30)])
    return str(write_recordings(tmp_path / "recordings", {"train": rows, "test": rows}))


def on(recordings: str, folder: Path, *more: str) -> list[str]:
    """Arguments for a small model, as `tests.models.small_model` has it."""
    small = ["--model.dim", "32", "--model.n_layers", "2", "--model.ffn_dim", "48", "--training.seq_len", "32"]
    small += ["--training.mixed_precision_param", "float32", "--training.num_workers", "0"]
    return ["--training.dataset_path", recordings, "--job.dump_folder", str(folder / "out"), *small, *more]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_windows", "0"], "argument --max_windows: 0 is not positive"),
        (["--max_windows", "many"], "argument --max_windows: 'many' is not a whole number"),
        (["--min_context", "-1"], "argument --min_context: -1 is negative"),
        (["--max_window", "3"], r"--max_window: unknown flag; did you mean --max_windows\?"),
        (["--sources", "x"], r"--sources: unknown flag; did you mean --source_dataset\?"),
        (["--checkpoint"], "argument --checkpoint: expected at least one argument"),
        (["--overlap"], "--overlap: needs a --min_context of at least 2"),
        (
            ["--min_context", "2", "--training.document_mask"],
            r"training\.document_mask: .* --min_context 2 counts from",
        ),
        (["--all_steps"], "--all_steps: needs a --checkpoint"),
        (["--training.stps", "3"], r"--training.stps: unknown key; did you mean training\.steps\?"),
        (["--model.n_heads", "3"], "model.n_heads: 3 does not divide"),
        (["--training.data_parallel_shard_degree", "2"], "but the run has 1 processes"),
        (["step-3"], "step-3: not a flag"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(["--training.dataset", "synthetic", *arguments], "")


def test_flags_that_are_given_twice_add_up() -> None:
    twice = ["--checkpoint", "a", "b", "--checkpoint", "c", "--source_dataset", "x", "--source_dataset", "y", "z"]
    for _ in range(2):
        arguments, _ = parse(["--training.dataset", "synthetic", *twice], "")
        assert arguments.checkpoints == [Path("a"), Path("b"), Path("c")]
        assert arguments.source_datasets == ["x", "y", "z"]


def test_what_only_training_needs_is_not_checked() -> None:
    _, config = parse(["--training.dataset", "synthetic", "--training.global_batch_size", "12"], "")
    parse(["--training.dataset", "synthetic", "--training.batch_size", "5", "--training.global_batch_size", "12"], "")
    assert config.training.global_batch_size == -1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "valid"], r'--split = "valid": .* has only train, test'),
        (["--source_dataset", "test"], r"--source_dataset test: .* did you mean tests\?"),
        (["--min_context", "33"], r"--min_context 33: no token has that much .*training\.seq_len = 32"),
        (["--checkpoint", "nowhere"], r'--checkpoint = "nowhere": no such folder'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_data_and_checkpoints(
    world: World, recordings: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(*parse(on(recordings, tmp_path, *arguments), ""), world)
    assert not list((tmp_path / "out/evaluation").iterdir())


def test_a_checkpoint_of_another_vocabulary_or_shape(world: World, recordings: str, tmp_path: Path) -> None:
    saved(world, tmp_path / "run")
    checkpoint = ("--checkpoint", str(tmp_path / "run/checkpoint"))
    for argv, difference in (
        (("--training.vocab_size", "64"), "vocab_size is 256 there and 64 here"),
        (("--model.n_layers", "1"), "n_layers is 2 there and 1 here"),
        (("--model.rope_scaling", "llama3.1"), "rope_scaling is none there and llama3.1 here"),
    ):
        with pytest.raises(ValueError, match=rf"step-1 does not fit the configured model; .*:\n  {difference}"):
            evaluate(*parse(on(recordings, tmp_path, *checkpoint, *argv), ""), world)


def test_two_checkpoints_that_would_be_written_to_one_file(world: World, recordings: str, tmp_path: Path) -> None:
    for name in ("one", "other"):
        saved(world, tmp_path / name)
    both = ("--checkpoint", str(tmp_path / "one/checkpoint"), str(tmp_path / "other/checkpoint"))
    with pytest.raises(ValueError, match=r"one/checkpoint/step-1, .*other/checkpoint/step-1 would all be written to"):
        evaluate(*parse(on(recordings, tmp_path, *both), ""), world)


def test_an_evaluation_of_another_run_is_not_overwritten(world: World, recordings: str, tmp_path: Path) -> None:
    for name in ("one", "other"):
        saved(world, tmp_path / name)
    one, other = (
        on(recordings, tmp_path, "--checkpoint", str(tmp_path / name / "checkpoint")) for name in ("one", "other")
    )
    evaluate(*parse(one, ""), world)
    with pytest.raises(
        ValueError, match=r"step-1\.json is .*: checkpoint is .*one.* there and .*other.* here; move it"
    ):
        evaluate(*parse(other, ""), world)


@pytest.mark.parametrize(("more", "status"), [(("--split", "valid"), 1), (("--max_window", "3"), 2)])
def test_exit_status(recordings: str, tmp_path: Path, more: tuple[str, ...], status: int) -> None:
    done = run([train_command()[0], "evaluate.py", *on(recordings, tmp_path, *more)])
    assert done.returncode == status, done.stdout
    assert done.stdout.count("error:") == 1
    assert "Traceback" not in done.stdout
