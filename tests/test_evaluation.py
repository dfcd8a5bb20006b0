"""What evaluate.py finds, against the same figures computed from logits and counts with nothing of its own code."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.checkpoints import saved, whole
from tests.helpers import in_memory, random_recordings, write_recordings
from tests.models import SMALL, small_model, train_a_little
from tests.processes import run, train, train_command
from torchtitan.checkpoint.checkpointer import Checkpointer
from torchtitan.checkpoint.state import model_tensors
from torchtitan.config.schema import Training
from torchtitan.data.index import RecordingIndex, load_index
from torchtitan.data.recordings import open_recordings
from torchtitan.data.windows import Rows
from torchtitan.distributed.world import World
from torchtitan.evaluation.accumulator import Accumulator, Session, warn_of_clipped
from torchtitan.evaluation.arguments import parse
from torchtitan.evaluation.passes import Pass
from torchtitan.evaluation.report import Evaluation, results
from torchtitan.evaluation.run import evaluate, score
from torchtitan.evaluation.scoring import WindowScore
from torchtitan.models.llama.attention import Documents
from torchtitan.models.llama.model import Transformer

SAME = ("overall", "sources", "sessions", "loss_by_position", "loss_by_time", "calibration")


def open_real(folder: Path) -> tuple[Rows, RecordingIndex]:
    recordings = open_recordings(Training(dataset_path=str(folder)))
    return recordings, load_index(recordings, "error")


class Stream:
    """All tokens of some recordings, and what each is: for each place in the stream row, neuron (-1: BOS) and bin."""

    def __init__(self, rows: list[np.ndarray]) -> None:
        self.tokens = np.concatenate([np.insert(row.T, 0, 255, axis=1).reshape(-1) for row in rows])
        self.row = np.concatenate([np.full((row.shape[0] + 1) * row.shape[1], i) for i, row in enumerate(rows)])
        self.neuron = np.concatenate([np.tile(np.arange(-1, row.shape[0]), row.shape[1]) for row in rows])
        self.bin = np.concatenate([np.repeat(np.arange(row.shape[1]), row.shape[0] + 1) for row in rows])


def scored_by_hand(model: Transformer, stream: Stream, starts: list[int], seq_len: int, lead: int) -> dict[str, Any]:
    """The model's logits of windows that begin at these places, and from them every figure, with NumPy alone."""
    places, nats, rates, positions = [], [], [], []
    expected = np.zeros(255)
    for start in starts:
        tokens = stream.tokens[start : start + seq_len + 1]
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens[None, :-1].astype(np.int64)))[0].double().numpy()
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        at = np.arange(lead, len(tokens) - 1)
        places.append(start + 1 + at)
        positions.append(at)
        nats.append(-np.log(p[at, tokens[1 + at]]))
        of_counts = p[:, :255] / (1 - p[:, 255:])
        rates.append(of_counts[at] @ np.arange(255))
        expected += of_counts[at][tokens[1 + at] != 255].sum(axis=0)
    place, nat, position = map(np.concatenate, (places, nats, positions))
    assert len(np.unique(place)) == len(place)
    counts, is_count = stream.tokens[place].astype(int), stream.neuron[place] >= 0
    _, neuron = np.unique(stream.row[place] * 10_000 + stream.neuron[place], return_inverse=True)
    mean = (np.bincount(neuron, counts) / np.bincount(neuron))[neuron]
    null = mean - np.where(counts > 0, counts * np.log(np.where(mean > 0, mean, 1)), 0)
    null += np.array([np.log(np.arange(1, count + 1)).sum() for count in range(256)])[counts]
    same = np.unique(np.stack([neuron, counts]), axis=1, return_inverse=True, return_counts=True)
    share = same[2][same[1].reshape(-1)] / np.bincount(neuron)[neuron]
    spikes = counts[is_count].sum()
    figures = {
        "tokens": is_count.sum(),
        "tokens_with_bos": len(place),
        "rows": len(np.unique(stream.row[place])),
        "spikes": spikes,
        "mean_rate_hz": spikes / is_count.sum() / 0.02,
        "nats_per_token": nat[is_count].mean(),
        "nats_per_token_with_bos": nat.mean(),
        "poisson_null_nats_per_token": null[is_count].mean(),
        "histogram_null_nats_per_token": -np.log(share[is_count]).mean(),
        "bits_per_spike": (null - nat)[is_count].sum() / spikes / np.log(2),
    }
    return {
        "overall": figures,
        "expected": expected,
        "observed": np.bincount(counts[is_count], minlength=255),
        "of": lambda chosen: (nat[is_count & chosen].mean(), null[is_count & chosen].mean()),
        "position": position,
        "seconds": stream.bin[place] * 0.02,
    }


def assert_figures(found: Evaluation, expected: dict[str, Any]) -> None:
    for name, value in expected["overall"].items():
        assert found["overall"][name] == pytest.approx(value, rel=2e-6), name
    assert [entry["observed"] for entry in found["calibration"]] == expected["observed"].tolist()
    assert [entry["expected"] for entry in found["calibration"]] == pytest.approx(expected["expected"], rel=1e-4)
    for key, values in (("loss_by_position", expected["position"]), ("loss_by_time", expected["seconds"])):
        assert sum(entry["tokens"] for entry in found[key]) == found["overall"]["tokens"]
        assert all(one["to"] <= other["from"] for one, other in pairwise(found[key]))
        for entry in found[key]:
            nats, null = expected["of"]((values >= entry["from"]) & (values < entry["to"]))
            assert entry["nats_per_token"] == pytest.approx(nats, rel=1e-5)
            assert entry["poisson_null_nats_per_token"] == pytest.approx(null, rel=1e-5)


@pytest.mark.parametrize(("min_context", "overlap"), [(0, False), (300, False), (300, True)])
def test_real_recordings(world: World, real_recordings: Path, min_context: int, overlap: bool) -> None:
    """Some windows of them: parts of rows."""
    config, model, optimizer = small_model(world, "--training.seq_len", "1024", "--training.num_workers", "0")
    train_a_little(model, optimizer)
    recordings, index = open_real(real_recordings)
    options = {"seq_len": 1024, "vocab_size": 256, "min_context": min_context, "overlap": overlap}
    over = Pass(recordings, index, **options, max_windows=20)
    found = results(score(model, over, config, world) or pytest.fail("rank 0 has no totals"))
    sizes = zip(index.rows.tolist(), index.neurons.tolist(), index.bins.tolist(), strict=True)
    stream = Stream([recordings.spike_counts(*size) for size in sizes])
    lead = max(min_context - 1, 0)
    stride = 1024 - lead if overlap else 1024
    there = -(-(len(stream.tokens) - 1 - lead) // stride)
    starts = [(2 * i + 1) * there // 40 * stride for i in range(20)]
    assert_figures(found, scored_by_hand(model, stream, starts, 1024, lead))
    assert set(found["sources"]) == {"aplysia", "nelpy"}
    for name in ("tokens", "spikes", "rows", "neurons", "bins"):
        total = found["overall"][name]
        assert sum(group[name] for group in found["sources"].values()) == pytest.approx(total)
        assert sum(group[name] for group in found["sessions"].values()) == pytest.approx(total)


@pytest.mark.parametrize(("min_context", "overlap"), [(0, False), (30, True)])
def test_every_token_counts_once(world: World, min_context: int, overlap: bool) -> None:
    """Whole rows, which end inside windows, and the stream's tail."""
    config, model, _ = small_model(world, "--training.batch_size", "3", "--training.num_workers", "0")
    rows = random_recordings([(5, 40), (2, 17), (1, 3), (7, 60)], largest=4)
    options = {"seq_len": 32, "vocab_size": 256, "min_context": min_context, "overlap": overlap}
    over = Pass(*in_memory(rows, ["a", "b", "b", "a"]), **options)
    found = results(score(model, over, config, world) or pytest.fail("rank 0 has no totals"))
    stream = Stream(rows)
    lead = max(min_context - 1, 0)
    starts = list(range(0, len(stream.tokens) - 1 - lead, 32 - lead))
    assert_figures(found, scored_by_hand(model, stream, starts, 32, lead))
    left_out = stream.neuron[: max(min_context, 1)]
    assert found["overall"]["tokens"] == sum(row.size for row in rows) - (left_out >= 0).sum()
    assert found["overall"]["tokens_with_bos"] == len(stream.tokens) - len(left_out)
    assert found["sources"]["b"]["tokens"] == 2 * 17 + 1 * 3
    assert found["sources"]["b"]["spikes"] == sum(int(row.sum()) for row in rows[1:3])
    assert list(found["sessions"]) == [f"{s}/subject-{i // 2}/session-{i}" for i, s in enumerate("abba")]


def test_sessions_keep_apart_whatever_they_are_called(world: World) -> None:
    """Names with slashes, which joined by slashes would be the same; and a unit of two rows counts in both."""
    config, model, _ = small_model(world, "--training.num_workers", "0")
    recordings, index = in_memory(random_recordings([(5, 40), (3, 17), (3, 20)]))
    sessions = [("a", "b/c", "d"), ("a/b", "c", "d"), ("a/b", "c", "d")]
    for place, column in enumerate(Session._fields):
        dataset = recordings.dataset.remove_columns(column)
        recordings.dataset = dataset.add_column(column, [session[place] for session in sessions])  # pyright: ignore[reportCallIssue]
    over = Pass(recordings, index, seq_len=32, vocab_size=256)
    found = results(score(model, over, config, world) or pytest.fail("rank 0 has no totals"))["sessions"]
    assert list(found) == ["a/b%2Fc/d", "a%2Fb/c/d"]
    assert [tuple(entry[column] for column in Session._fields) for entry in found.values()] == sessions[:2]
    assert [(entry["rows"], entry["neurons"]) for entry in found.values()] == [(1, 5), (2, 6)]


def test_documents_keep_to_themselves(world: World) -> None:
    argv = ("--training.document_mask", "--training.num_workers", "0", "--training.batch_size", "2")
    config, model, _ = small_model(world, *argv)
    rows = random_recordings([(5, 11), (2, 17), (1, 3)], largest=4)
    over = Pass(*in_memory(rows), seq_len=32, vocab_size=256)
    found = results(score(model, over, config, world) or pytest.fail("rank 0 has no totals"))
    stream = Stream(rows)
    nats = 0.0
    positions: list[int] = []
    for start in range(0, len(stream.tokens) - 1, 32):
        tokens, row = stream.tokens[start : start + 33], stream.row[start : start + 33]
        begins = torch.tensor(np.flatnonzero(np.diff(row[:-1], prepend=-1)), dtype=torch.int32)
        documents = Documents.from_starts(begins, len(tokens) - 1, torch.device("cpu"))
        inputs = torch.from_numpy(tokens[None, :-1].astype(np.int64))
        with torch.no_grad():
            logits = model(inputs, documents)[0].double().log_softmax(-1)
        nats -= logits[torch.arange(len(tokens) - 1), torch.from_numpy(tokens[1:].astype(np.int64))].sum().item()
        # What a count is predicted from: the tokens of its own recording before it in the window.
        seen = [int((row[:place] == row[place]).sum()) for place in range(1, len(row))]
        positions += [size - 1 for size, token in zip(seen, tokens[1:], strict=True) if token != 255]
    assert found["overall"]["nats_per_token_with_bos"] == pytest.approx(nats / (len(stream.tokens) - 1), rel=1e-6)
    edges = [0, 1, 2, 4, 8, 16, 32]
    assert [(entry["from"], entry["tokens"]) for entry in found["loss_by_position"]] == list(
        zip(edges, np.histogram(positions, edges)[0].tolist(), strict=False)
    )


def test_nulls_of_whole_real_recordings(real_recordings: Path) -> None:
    """As their README has them; a model that is as good as it says it is has what it says, too."""
    recordings, index = open_real(real_recordings)
    over = Pass(recordings, index, seq_len=131_072, vocab_size=256)
    accumulator = Accumulator(over, num_threads=2)
    tokens = np.zeros(131_073, np.uint8)
    for window in over.chosen:
        valid = over.windows.read(window, tokens).valid
        labels = tokens[1 : 1 + valid].copy()
        nats = np.full(valid, 0.05, np.float32)
        accumulator.add(WindowScore(window, labels, nats, nats, np.zeros(255)))
    found = results(accumulator.finish())["sources"]
    for name, size, poisson, histogram in (
        ("nelpy", 8_434_384, 0.1005, 0.0965),
        ("aplysia", 1_429_602, 0.1286, 0.1280),
    ):
        assert found[name]["tokens"] == size
        assert round(found[name]["poisson_null_nats_per_token"], 4) == poisson
        assert round(found[name]["histogram_null_nats_per_token"], 4) == histogram
        bits = (found[name]["poisson_null_nats_per_token"] - 0.05) * size / found[name]["spikes"] / np.log(2)
        assert found[name]["bits_per_spike"] == pytest.approx(bits, rel=1e-6)
        assert found[name]["ngram_null_nats_per_token"] < 1.02 * histogram


class TestCommand:
    """evaluate.py as a user runs it."""

    config = """
[training]
dataset_path = "{folder}/recordings"
seq_len = 64
batch_size = 2
num_workers = 0
steps = 4
mixed_precision_param = "float32"
[model]
n_layers = 1
dim = 32
[checkpoint]
interval = 2
[metrics]
enable_tensorboard = false
"""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A run of four steps with a checkpoint every second one, and a configuration for it."""
        folder = tmp_path_factory.mktemp("evaluate")
        splits = {"train": random_recordings([(6, 60)]), "test": random_recordings([(6, 41), (3, 50), (4, 31)], seed=1)}
        write_recordings(folder / "recordings", splits)
        (folder / "run.toml").write_text(self.config.format(folder=folder))
        train("--job.config_file", str(folder / "run.toml"), "--job.dump_folder", str(folder / "run"))
        return folder

    def evaluate(self, folder: Path, out: Path, *arguments: str, processes: int | None = None) -> str:
        command = train_command("--job.config_file", str(folder / "run.toml"), "--job.dump_folder", str(out))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [command[0], *(launcher if processes else []), "evaluate.py", *command[2:], *arguments]
        done = run(command)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def test_the_number_of_processes_changes_nothing(self, folder: Path, tmp_path: Path) -> None:
        found = []
        for processes in (1, 2, 3):
            out = tmp_path / str(processes)
            printed = self.evaluate(folder, out, "--checkpoint", str(folder / "run/checkpoint"), processes=processes)
            evaluation = json.loads((out / "evaluation/step-4.json").read_text())
            tables = printed[printed.rindex("step-4\n\n") : printed.index("written to")]
            found.append(({key: evaluation[key] for key in SAME}, tables))
        assert found[0][0]["overall"]["tokens"] == 6 * 41 + 3 * 50 + 4 * 31
        assert found[1] == found[0]
        assert found[2] == found[0]

    def test_a_learning_curve(self, folder: Path, tmp_path: Path) -> None:
        printed = self.evaluate(
            folder, tmp_path, "--checkpoint", str(folder / "run/checkpoint"), "--all_steps", "--max_windows", "3"
        )
        two, four = (
            json.loads((tmp_path / f"evaluation/step-{step}.max_windows-3.json").read_text()) for step in (2, 4)
        )
        assert (two["step"], four["step"]) == (2, 4)
        assert two["checkpoint"] == str(folder / "run/checkpoint/step-2")
        assert four["overall"]["nats_per_token"] < two["overall"]["nats_per_token"]
        assert four["overall"]["poisson_null_nats_per_token"] == two["overall"]["poisson_null_nats_per_token"]
        curve = printed[printed.rindex("checkpoint  ") :].splitlines()
        assert [line[:6] for line in curve[2:4]] == ["step 2", "step 4"]
        assert four["settings"]["windows"] == 3
        assert four["data"]["split"] == "test"

    def test_random_weights(self, folder: Path, tmp_path: Path) -> None:
        self.evaluate(folder, tmp_path, "--split", "train")
        found = json.loads((tmp_path / "evaluation/random.train.json").read_text())
        assert (found["checkpoint"], found["step"], found["data"]["split"]) == (None, None, "train")
        assert found["overall"]["bits_per_spike"] < 0
        assert found["overall"]["tokens"] == 6 * 60


def test_weights_that_are_not_a_run_s(world: World, tmp_path: Path) -> None:
    """An export, and another program's: their files are named by the step, where there is one, or by the folder."""
    rows = random_recordings([(5, 40)])
    data = write_recordings(tmp_path / "recordings", {"train": rows, "test": rows})
    argv = ("--training.dataset_path", str(data), "--job.dump_folder", str(tmp_path), "--training.num_workers", "0")
    argv += ("--metrics.enable_tensorboard", "false")
    config, model, optimizer = small_model(world, *argv[2:])
    train_a_little(model, optimizer)
    weights = whole(model_tensors(model))
    Checkpointer(config, model).export(7, {})
    dcp.save({name.removeprefix("model."): t for name, t in weights.items()}, checkpoint_id=tmp_path / "old-weights")
    small = [*SMALL[2:], *argv]
    exported = str(tmp_path / "checkpoint/export/step-7")
    evaluate(*parse([*small, "--checkpoint", exported, str(tmp_path / "old-weights")], ""), world)
    found = [json.loads((tmp_path / f"evaluation/{name}.json").read_text()) for name in ("step-7", "old-weights")]
    assert [(one["step"], one["checkpoint"]) for one in found] == [(7, exported), (None, str(tmp_path / "old-weights"))]
    assert found[0]["overall"] == found[1]["overall"]
    over = Pass(*in_memory(rows), seq_len=32, vocab_size=256)
    expected = scored_by_hand(model, Stream(rows), list(range(0, over.windows.num_tokens - 1, 32)), 32, 0)
    assert found[0]["overall"]["bits_per_spike"] == pytest.approx(expected["overall"]["bits_per_spike"], rel=2e-6)


def test_evaluations_lie_beside_each_other(world: World, tmp_path: Path) -> None:
    """One file and a group of pictures for each way to pass over the data; only the same one is replaced."""
    rows = random_recordings([(5, 40), (3, 30)])
    data = write_recordings(tmp_path / "recordings", {"train": rows, "test": rows})
    argv = [*SMALL[2:], "--training.dataset_path", str(data), "--job.dump_folder", str(tmp_path)]
    argv += ["--training.num_workers", "0"]
    ways = {
        "random": (),
        "random.train.source_dataset-tests": ("--split", "train", "--source_dataset", "tests", "tests"),
        "random.max_windows-2": ("--max_windows", "2"),
        "random.min_context-8.overlap": ("--min_context", "8", "--overlap"),
    }
    for _ in range(2):
        for way in ways.values():
            evaluate(*parse([*argv, *way], ""), world)
    folder = tmp_path / "evaluation"
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert set(found) == set(ways)
    assert found["random.max_windows-2"]["settings"]["max_windows"] == 2
    kinds = ("sources", "context", "calibration")
    assert {path.stem for path in folder.glob("plots/*")} == {f"{way}-{kind}" for way in ways for kind in kinds}
    events = EventAccumulator(str(tmp_path / "tb/evaluation"))
    events.Reload()
    groups = [way.removeprefix("random").removeprefix(".") for way in ways]
    assert set(events.Tags()["images"]) == {f"{group}/{kind}".lstrip("/") for group in groups for kind in kinds}
    for more, difference in (
        (("--training.seq_len", "16"), "seq_len is 32 there and 16 here"),
        (("--training.document_mask",), "document_mask is False there and True here"),
    ):
        with pytest.raises(ValueError, match=rf"random.json is an evaluation of something else: {difference}"):
            evaluate(*parse([*argv, *more], ""), world)


def test_a_table_of_several_runs_names_them(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = random_recordings([(5, 40)])
    data = write_recordings(tmp_path / "recordings", {"train": rows, "test": rows})
    saved(world, tmp_path / "one", steps=(1,))
    saved(world, tmp_path / "other", steps=(2,))
    argv = [*SMALL[2:], "--training.dataset_path", str(data), "--job.dump_folder", str(tmp_path)]
    checkpoints = [str(tmp_path / f"{run}/checkpoint") for run in ("one", "other")]
    evaluate(*parse([*argv, "--training.num_workers", "0", "--checkpoint", *checkpoints], ""), world)
    printed = capsys.readouterr().out
    curve = printed[printed.rindex("checkpoint  ") :].splitlines()
    assert [line.split("  ")[0] for line in curve[2:4]] == ["one, step 1", "other, step 2"]


@pytest.mark.parametrize("vocab_size", [8, 256])
def test_clipped_counts_are_counted(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, vocab_size: int
) -> None:
    """Of the scored tokens alone, and not twice where windows meet; 255 is clipped with any vocabulary."""
    rows = random_recordings([(5, 40), (3, 30)])
    rows[0][:, [0, 7]] = 255
    over = Pass(*in_memory(rows), seq_len=32, vocab_size=vocab_size, min_context=9)
    stream = np.concatenate([np.insert(row.T, 0, 0, axis=1).reshape(-1) for row in rows])
    places = np.concatenate([np.arange(*over.scored(window)) for window in over.chosen])
    accumulator = Accumulator(over)
    tokens = np.zeros(33, np.uint8)
    for window in over.chosen:
        over.windows.read(window, tokens)
        start, stop = over.scored(window)
        labels = tokens[1 + over.lead : 1 + over.lead + stop - start].copy()
        nats = np.ones(len(labels), np.float32)
        accumulator.add(WindowScore(window, labels, nats, nats, np.zeros(vocab_size - 1)))
    totals = accumulator.finish()
    expected = int((stream[places] > vocab_size - 2).sum())
    assert 0 < expected < (stream > vocab_size - 2).sum()
    assert results(totals)["overall"]["clipped_counts"] == expected
    with caplog.at_level("WARNING"):
        warn_of_clipped(totals.overall, vocab_size)
    assert f"{expected:,} of " in caplog.text + capsys.readouterr().err


def test_many_sources_have_a_short_name() -> None:
    def way(*sources: str) -> str:
        return parse(["--training.dataset", "synthetic", "--source_dataset", *sources], "")[0].way

    assert way("b/c", "a") == "source_dataset-a+b%2Fc"
    many = [f"a source with a long name, {i}" for i in range(9)]
    assert len(way(*many)) < 40
    assert way(*many) == way(*many[::-1])
    assert way(*many) != way(*many[1:], "another")


def test_several_passes_of_one_model(world: World, tmp_path: Path) -> None:
    """Weights that are loaded after a pass are those that the next one scores."""
    config, model, optimizer = small_model(world, "--job.dump_folder", str(tmp_path), "--training.num_workers", "0")
    over = Pass(*in_memory(random_recordings([(5, 40)])), seq_len=32, vocab_size=256)
    before = results(score(model, over, config, world) or pytest.fail("rank 0 has no totals"))
    train_a_little(model, optimizer, steps=5)
    after = results(score(model, over, config, world) or pytest.fail("rank 0 has no totals"))
    assert after["overall"]["nats_per_token"] != before["overall"]["nats_per_token"]
    Checkpointer(config, model)  # the weights are sharded again: they can be saved
