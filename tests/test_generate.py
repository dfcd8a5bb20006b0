"""generate.py: from a checkpoint and a recording to files that are data again, and what is wrong with an input."""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.checkpoints import read_checkpoint, saved
from tests.helpers import random_recordings, write_recordings, write_rows
from tests.processes import run
from torchtitan.config.schema import Training
from torchtitan.data.index import load_index
from torchtitan.data.recordings import ID_COLUMNS, open_recordings
from torchtitan.distributed.world import World
from torchtitan.generation import room
from torchtitan.generation.arguments import parse_generate
from torchtitan.generation.cache import Cache
from torchtitan.generation.load import load_model, open_checkpoint
from torchtitan.generation.output import SAMPLES, SUMMARY, labels, output_folder
from torchtitan.generation.prompt import open_prompt
from torchtitan.generation.run import generate

Generate = Callable[..., Path]
CONTEXT = 64
ROWS = [(5, 20), (7, 30), (80, 4)]
"""(neurons, bins) of the recordings: 6, 8 and 81 tokens a bin."""


@pytest.fixture
def place(world: World, tmp_path: Path) -> Path:
    """A run with two checkpoints, beside recordings."""
    saved(world, tmp_path / "run", "--training.seq_len", str(CONTEXT), steps=(1, 2))
    (tmp_path / "run/config.toml").touch()
    write_recordings(tmp_path / "data", {"test": random_recordings(ROWS), "train": random_recordings([(3, 9)])})
    return tmp_path


@pytest.fixture
def generated(place: Path) -> Generate:
    """Runs generate.py's function on them, without pictures."""

    def call(*arguments: str, prompt: str = "0", bins: str = "3", plots: bool = False) -> Path:
        argv = ["--checkpoint", str(place / "run/checkpoint"), "--prompt", f"{place / 'data'}:{prompt}", "--bins", bins]
        return generate(parse_generate([*argv, *([] if plots else ["--no_plots"]), *arguments]))

    return call


def summary(folder: Path) -> dict:
    return json.loads((folder / SUMMARY).read_text())


def test_samples_are_recordings_again(generated: Generate, place: Path) -> None:
    folder = generated("--samples", "2", "--prompt", f"{place / 'data'}:1", "--seed", "3")
    assert folder == place / "run/generation/step-2/data-0+data-1"

    recordings = open_recordings(Training(dataset_path=str(folder)))
    index = load_index(recordings, "error")
    assert index.neurons.tolist() == [5, 5, 7, 7]
    assert index.bins.tolist() == [3] * 4
    rows = pq.read_table(folder / SAMPLES).to_pylist()
    assert [row["segment_id"] for row in rows] == [f"segment-{r}/sample-{s}" for r in (0, 1) for s in (0, 1)]
    assert [row["session_id"] for row in rows] == ["session-0", "session-0", "session-1", "session-1"]
    assert {row["source_dataset"] for row in rows} == {"generated:tests"}
    samples = [np.array(row["spike_counts"]) for row in rows]
    assert not np.array_equal(samples[0], samples[1])
    # Read back, they are what was generated.
    np.testing.assert_array_equal(samples[3], recordings.spike_counts(3, 7, 3))


def test_the_summary_says_what_was_done(generated: Generate, place: Path) -> None:
    folder = generated("--context_bins", "4", "--temperature", "0.5", "--top_k", "9", "--top_p", "0.8")
    said = summary(folder)
    assert said["checkpoint"] == str(place / "run/checkpoint/step-2")
    assert (said["step"], said["trained_context"]) == (2, CONTEXT)
    wanted = {"bins": 3, "samples": 1, "temperature": 0.5, "top_k": 9, "top_p": 0.8, "seed": 0}
    assert {key: said["settings"][key] for key in wanted} == wanted
    (prompt,) = said["prompts"]
    recordings = open_recordings(Training(dataset_path=str(place / "data")), "test")
    assert (prompt["recordings"], prompt["split"]) == (f"{place / 'data'}, split test", "test")
    assert prompt["fingerprint"] == recordings.cache_key
    assert (prompt["neurons"], prompt["context_bins"], prompt["context_tokens"], prompt["recorded_bins"]) == (
        5,
        4,
        24,
        3,
    )
    assert prompt["mean_count_generated"] == np.mean(pq.read_table(folder / SAMPLES).to_pylist()[0]["spike_counts"])
    assert said["speed"]["tokens"] == 18
    assert said["speed"]["tokens_per_second"] == pytest.approx(18 / said["speed"]["decode_seconds"])


def test_random_numbers_are_a_recordings_own(tmp_path: Path) -> None:
    """The same row of other recordings has another key; the recording itself keeps it where it lies elsewhere."""
    ids = {name: ["a", "b"] for name in ID_COLUMNS}
    keys = {}
    for name, source in (("one", "primate"), ("other", "rodent"), ("again", "primate")):
        path = tmp_path / f"{name}.parquet"
        columns = {"spike_counts": pa.array([[[1, 2]]] * 2, pa.list_(pa.list_(pa.uint8()))), **ids}
        pq.write_table(pa.table({**columns, "source_dataset": [source] * 2, "session_id": ["s"] * 2}), path)
        keys[name] = [open_prompt(f"{path}:{row}", None).key for row in (0, 1)]
    assert keys["one"] == keys["again"]
    assert len({*keys["one"], *keys["other"]}) == 4


def test_the_prompt_takes_what_the_context_holds_beside_the_bins(generated: Generate) -> None:
    assert summary(generated(bins="3"))["prompts"][0]["context_bins"] == CONTEXT // 6 - 3
    assert summary(generated(prompt="1", bins="7"))["prompts"][0]["context_bins"] == 1
    # Where the recording is longer than that, it leaves bins to compare with.
    assert summary(generated(prompt="0", bins="9"))["prompts"][0]["recorded_bins"] == 9


def test_a_second_generation_does_not_overwrite_the_first(generated: Generate, place: Path) -> None:
    first, second = generated("--seed", "1"), generated("--seed", "1")
    assert second == first.with_name("data-0.2")
    assert (first / SAMPLES).read_bytes() == (second / SAMPLES).read_bytes()
    assert generated("--output", str(place / "here")) == place / "here"
    with pytest.raises(ValueError, match="no empty folder; give a new one"):
        generated("--output", str(place / "here"))


def test_generations_at_the_same_time_take_folders_of_their_own(place: Path) -> None:
    prompts = [open_prompt(f"{place / 'data'}:0", None)]
    checkpoint = place / "run/checkpoint/step-2"

    def make(_: int) -> Path:
        with output_folder(None, checkpoint, prompts) as folder:
            (folder / "sample").touch(exist_ok=False)
            return folder

    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(make, range(40)))
    names = {"data-0", *(f"data-0.{number}" for number in range(2, 41))}
    assert {folder.name for folder in made} == names


def test_recordings_of_the_same_name_have_pictures_of_their_own(place: Path) -> None:
    write_recordings(place / "other/data", {"test": random_recordings(ROWS)})
    given = [f"{place / folder}:{row}" for folder, row in (("data", 0), ("other/data", 0), ("data", 1))]
    assert labels([open_prompt(one, None) for one in given]) == ["data-0", "data-0.2", "data-1"]


def test_a_sliding_window_goes_past_the_context(generated: Generate) -> None:
    folder = generated("--sliding_window", bins="40")
    assert np.array(pq.read_table(folder / SAMPLES).to_pylist()[0]["spike_counts"]).shape == (5, 40)
    assert summary(folder)["speed"]["prefills"] > 5


def test_pictures(generated: Generate) -> None:
    pytest.importorskip("torchtitan.plots.activity")
    folder = generated("--samples", "4", plots=True) / "plots"
    assert sorted(path.name for path in folder.iterdir()) == [
        "data-0-population_rate.png",
        "data-0-raster.png",
        "data-0-statistics.png",
    ]


def test_a_checkpoint_without_its_shape_needs_it_from_the_command_line(generated: Generate, place: Path) -> None:
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in read_checkpoint(place / "run/checkpoint/step-2").items()
        if name.startswith("model.")
    }
    old = place / "old"
    dcp.save(weights, checkpoint_id=old, no_dist=True)
    with pytest.raises(ValueError, match="give --flavor and --rope_scaling"):
        generated("--checkpoint", str(old))
    with pytest.raises(ValueError, match="does not hold the 4 layers of --flavor debug"):
        generated("--checkpoint", str(old), "--flavor", "debug", "--rope_scaling", "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "{data}:3"], "has 3 rows, 0 to 2"),
        (["--prompt", "{data}:-1"], "not DATASET:ROW"),
        (["--prompt", "{data}"], "not DATASET:ROW"),
        (["--prompt", "primat:0"], "no such dataset, file or folder: primat; did you mean primate?"),
        (["--prompt", "{data}/nothing:0"], "no such dataset, file or folder"),
        (
            ["--prompt", "{data}:0", "--split", "validation"],
            '--prompt {data}:0: --split = "validation": {data} has only train, test',
        ),
        (["--prompt", "{run}:0"], '--prompt {run}:0: DATASET = "{run}": holds neither parquet files nor'),
        (["--prompt", "{data}:0", "--context_bins", "21"], "--context_bins 21: the recording of .* has 20 bins"),
        (["--prompt", "{data}:1", "--context_bins", "8"], "--context_bins 8 of them 64: .* trained with 64; at most 7"),
        (
            ["--prompt", "{data}:1", "--context_bins", "6"],
            "--context_bins 6 and --bins 3 together 72: .* at most 8 bins",
        ),
        (["--prompt", "{data}:1", "--bins", "8"], "generate at most 7, or give --sliding_window"),
        (["--prompt", "{data}:2", "--sliding_window"], "do not hold two bins"),
        (["--prompt", "{data}:2"], "do not hold two bins"),
        (["--checkpoint", "{data}"], "holds neither a DCP checkpoint nor steps of one"),
        (["--attention", "fa3"], "--attention fa3 cannot run: there is no GPU"),
        (["--device", "cuda"], "--device cuda: there is no GPU"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(place / "data")
    *given, message = (
        text.replace("{data}", data).replace("{run}", str(place / "run")) for text in (*arguments, message)
    )
    argv = ["--checkpoint", str(place / "run/checkpoint"), "--bins", "3", "--no_plots", *given]
    argv += [] if "--prompt" in given else ["--prompt", f"{data}:0"]
    with pytest.raises(ValueError, match=message) as raised:
        generate(parse_generate(argv))
    assert "\n" not in str(raised.value)
    assert not list((place / "run").glob("generation/*/*"))


def test_without_a_split_it_is_test_else_train_and_what_is_wrong_with_that_is_said(tmp_path: Path) -> None:
    pieces = {name: random_recordings([(3, bins)]) for name, bins in (("test", 4), ("train", 5), ("validation", 6))}
    for names, bins in ((("test", "train"), 4), (("train", "validation"), 5)):
        folder = write_recordings(tmp_path / names[0], {name: pieces[name] for name in names})
        prompt = open_prompt(f"{folder}:0", None)
        assert (prompt.split, prompt.counts.shape[1]) == (names[0], bins)
    folder = write_recordings(tmp_path / "other", {"validation": pieces["validation"]})
    with pytest.raises(ValueError, match="other has only validation: say which by --split"):
        open_prompt(f"{folder}:0", None)
    # A test split that cannot be used is no reason to take another.
    broken = write_recordings(tmp_path / "broken", {name: pieces[name] for name in ("test", "train")})
    for path in broken.rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns("session_id").replace_schema_metadata(), path)
    with pytest.raises(ValueError, match="session_id"):
        open_prompt(f"{broken}:0", None)


def test_a_pile_that_is_not_there_is_named_by_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda repository: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(ValueError, match=r'^--prompt primate:0: DATASET = "primate": eminorhan/neural-pile-'):
        open_prompt("primate:0", None)


def test_a_gpu_without_room_is_told_before_the_weights_are_read(
    generated: Generate, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, length, steps = (
        open_checkpoint(str(place / "run/checkpoint"), None, None)[1].shape,
        6 * (CONTEXT // 6 - 3),
        3 * 6,
    )
    needed = 4 * shape.num_params + Cache.nbytes(shape, [length], 2, steps, torch.float32)
    needed += 4 * length * (3 * shape.dim + 2 * shape.dim + 4 * shape.ffn_dim)
    monkeypatch.setattr(room, "free_bytes", lambda device: needed)
    generated("--samples", "2")
    monkeypatch.setattr(room, "free_bytes", lambda device: needed - 1)
    monkeypatch.setattr("torchtitan.generation.run.load_model", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"^the weights, and keys and values of 1 .* 2 samples .* take fewer prompts"):
        generated("--samples", "2")


def test_full_memory_is_one_line(generated: Generate, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of\n…")

    monkeypatch.setattr("torchtitan.generation.run.load_model", full)
    with pytest.raises(ValueError, match=r"memory is full \(CUDA .* allocate 2.00 GiB\): take fewer prompts, .* bins$"):
        generated()
    assert not list((place / "run").glob("generation/*/*"))


def test_a_malformed_row_is_not_a_prompt(place: Path, generated: Generate) -> None:
    folder = write_rows(place / "ragged", {"test": [[[1, 2], [3, 4]], [[1, 2], [3]], [[1, 1], [0, 1]]]})
    with pytest.raises(ValueError, match="ragged:1: that row is ragged, empty or lacks counts"):
        generated("--prompt", f"{folder}:1")


def test_a_model_of_words_is_refused(
    world: World, place: Path, generated: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchtitan.generation.load.LARGEST_VOCABULARY", 255)
    with pytest.raises(ValueError, match="its vocabulary has 256 tokens, and recordings are written in at most 255"):
        generated()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--bins", "0"),
        ("--bins", "2.5"),
        ("--context_bins", "-3"),
        ("--samples", "0"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top_k", "0"),
        ("--top_p", "0"),
        ("--top_p", "1.1"),
        ("--seed", "-1"),
    ],
)
def test_numbers_out_of_range(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_generate(["--checkpoint", "c", "--prompt", "d:0", "--bins", "1", flag, value])
    assert ended.value.code == 2
    assert f"argument {flag}: '{value}' is not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--checkpont", "c"], "--checkpont: unknown flag; did you mean --checkpoint?"),
        (
            ["--smaples=2", "--zzz"],
            "--smaples: unknown flag; did you mean --samples?; --zzz: unknown flag; --help lists",
        ),
        (["--checkpoint", "c"], "the following arguments are required: --prompt, --bins"),
    ],
)
def test_a_misspelt_flag_is_answered_with_the_nearest(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_generate(argv)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


def test_the_script_ends_with_two_and_one_line(place: Path) -> None:
    argv = ["--checkpoint", str(place / "run/checkpoint"), "--prompt", f"{place / 'data'}:9", "--bins", "2"]
    done = run([sys.executable, "generate.py", *argv])
    assert done.returncode == 2
    assert "Traceback" not in done.stdout
    assert done.stdout.splitlines()[-1].endswith("has 3 rows, 0 to 2")


def test_a_vocabulary_that_is_smaller_clips_the_prompt(world: World, place: Path, generated: Generate) -> None:
    saved(world, place / "small", "--training.seq_len", str(CONTEXT), "--training.vocab_size", "6")
    (place / "small/config.toml").touch()
    folder = generated("--checkpoint", str(place / "small/checkpoint"), "--samples", "3", "--temperature", "3")
    counts = [np.array(row["spike_counts"]) for row in pq.read_table(folder / SAMPLES).to_pylist()]
    assert max(sample.max() for sample in counts) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loaded_model_is_the_saved_one(dtype: str, place: Path) -> None:
    folder, source = open_checkpoint(str(place / "run/checkpoint"), None, None)
    model = load_model(source, torch.device("cpu"), getattr(torch, dtype))
    stored = read_checkpoint(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[f"model.{name}"].to(getattr(torch, dtype))), name
    assert model.rope_cache.dtype == torch.float32
    assert model(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()
