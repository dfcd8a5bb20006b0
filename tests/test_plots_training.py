"""Training curves, the command that draws them, and TensorBoard."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT
from tests.evaluations import evaluation
from tests.test_plots_activity import words
from torchtitan.plots import style
from torchtitan.plots.__main__ import main
from torchtitan.plots.board import to_tensorboard
from torchtitan.plots.training import training_curves

pytestmark = pytest.mark.filterwarnings("error")


def metrics(number: int, **more: Any) -> list[dict[str, Any]]:
    """Reports of that many steps, with a loss that falls."""
    return [
        {
            "step": step,
            "loss": 5 / step**0.5,
            "grad_norm": 1.5,
            "skipped_updates": 0,
            "lr": 1e-3,
            "tokens_per_second_per_gpu": 5000.0 + step,
            **more,
        }
        for step in range(1, number + 1)
    ]


def run_folder(folder: Path, steps: tuple[int, ...] = (), **more: Any) -> Path:
    """A run with metrics, and evaluations of these steps."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(10, **more)))
    for step in steps:
        (folder / "evaluation").mkdir(exist_ok=True)
        content = json.dumps(evaluation(step, run=str(folder)))
        (folder / f"evaluation/step-{step}.json").write_text(content)
    return folder


def test_curves_are_the_metrics() -> None:
    first, second = metrics(20), metrics(30)
    figure = training_curves({"a": first, "b": second})
    assert len(figure.axes) == 4
    for axes, key in zip(figure.axes, ("loss", "grad_norm", "lr", "tokens_per_second_per_gpu"), strict=True):
        for line, lines in zip(axes.lines, (first, second), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), [report["step"] for report in lines])
            np.testing.assert_array_equal(line.get_ydata(), [report[key] for report in lines])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert figure.axes[0].lines[0].get_color() != figure.axes[0].lines[1].get_color()
    text = words(figure)
    for expected in (
        "Training curves of 2 runs",
        "nats per token",
        "Gradient norm",
        "Learning rate",
        "tokens/s",
        "step",
    ):
        assert expected in text


def test_validations_have_panels_of_their_own_and_no_gaps() -> None:
    lines = metrics(6, validation_nats_per_token=None, validation_bits_per_spike=None)
    for i in (2, 5):
        lines[i] |= {"validation_nats_per_token": 0.2 - 0.01 * i, "validation_bits_per_spike": 0.1 * i}
    figure = training_curves({"a": lines})
    assert len(figure.axes) == 6
    np.testing.assert_allclose(np.asarray(figure.axes[4].lines[0].get_xydata()), [[3, 0.18], [6, 0.15]])
    np.testing.assert_allclose(np.asarray(figure.axes[5].lines[0].get_xydata()), [[3, 0.2], [6, 0.5]])
    assert "held-out recordings" in words(figure)


def test_skipped_updates_are_gaps_and_crosses() -> None:
    lines = metrics(6)
    lines[2] |= {"loss": None, "grad_norm": None, "skipped_updates": 1}
    lines[3] |= {"skipped_updates": 1}
    lines[5] |= {"skipped_updates": 2}
    figure = training_curves({"a": lines})
    loss = figure.axes[0]
    assert np.isnan(np.asarray(loss.lines[0].get_ydata())).tolist() == [False, False, True, False, False, False]
    assert np.asarray(loss.collections[0].get_offsets())[:, 0].tolist() == [3, 6]
    assert "updates skipped" in words(figure)


def test_a_resumed_run_counts_its_skipped_updates_anew() -> None:
    lines = metrics(4)
    for line, skipped in zip(lines, (3, 0, 1, 1), strict=True):
        line["skipped_updates"] = skipped
    offsets = training_curves({"a": lines}).axes[0].collections[0].get_offsets()
    assert np.asarray(offsets)[:, 0].tolist() == [1, 3]


def test_long_runs_have_a_running_mean_of_what_is_known() -> None:
    lines = metrics(400)
    lines[300]["loss"] = None
    loss = training_curves({"a": lines}).axes[0]
    thin, thick = (np.asarray(line.get_ydata()) for line in loss.lines)
    assert np.isnan(thin[300])
    assert np.isnan(thick[300])
    assert thick[50] == pytest.approx(thin[46:54].mean())
    assert thick[302] == pytest.approx(np.nanmean(thin[298:306]))
    assert loss.lines[1].get_linewidth() > loss.lines[0].get_linewidth()


@pytest.mark.parametrize(
    "runs",
    [
        {},
        {"empty": []},
        {"one step": metrics(1)},
        {"nothing finite": metrics(3, loss=None, grad_norm=None)},
        {"zero": metrics(3, loss=0.0, lr=0.0)},
        {"constant": metrics(3, loss=1.0)},
        {"validation": [*metrics(3), {"step": 3, "something_else": 0.5}]},
        {f"run {i}": metrics(3 + i) for i in range(21)},
    ],
    ids=str,
)
def test_odd_runs_are_drawn_without_a_warning(runs: dict[str, list[dict[str, Any]]]) -> None:
    assert words(training_curves(runs))


def test_the_command_draws_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run", steps=(90, 180))
    main([str(run)])
    names = ["training", "step-180-sources", "step-180-context", "step-180-calibration", "learning_curve"]
    expected = [run / "plots" / f"{name}.png" for name in names]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in expected]
    for path in expected:
        assert matplotlib.image.imread(path).shape[1] == style.WIDTH * style.DPI
    assert sorted((run / "plots").iterdir()) == sorted(expected)


def test_the_command_compares_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        run_folder(tmp_path / "a", steps=(90,)),
        run_folder(tmp_path / "b"),
        run_folder(tmp_path / "c", steps=(90,)),
    ]
    main([*map(str, runs), f"{runs[0]}/", "--output", str(tmp_path / "out")])
    names = ["training", *(f"{run}/step-90-{kind}" for run in "ac" for kind in ("sources", "context", "calibration"))]
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str(tmp_path / "out" / f"{name}.png") for name in [*names, "learning_curve"]]


def test_the_pictures_are_of_the_newest_plain_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run", steps=(90,))
    other = evaluation(180)
    other["settings"]["min_context"] = 16
    other["data"]["description"] = "Aufnahmen der Kröte"
    (run / "evaluation/step-180.min_context-16.json").write_text(
        json.dumps(other, ensure_ascii=False), encoding="utf-8"
    )
    main([str(run)])
    assert (run / "plots/step-90-sources.png").exists()
    assert "step-180" not in capsys.readouterr().out
    (run / "evaluation/step-90.json").unlink()
    # Whatever the encoding of the environment.
    command = [sys.executable, "-X", "utf8=0", "-m", "torchtitan.plots", str(run)]
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "plots/step-180.min_context-16-sources.png" in done.stdout


def test_the_command_draws_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run", steps=(90,))
    (run / "metrics.jsonl").unlink()
    main([str(run)])
    assert "training" not in capsys.readouterr().out
    assert not (run / "plots/learning_curve.png").exists()


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "outputs/demo", steps=(90,))
    broken = run_folder(tmp_path / "broken", steps=(90,))
    (broken / "evaluation/step-90.json").write_text("{")
    old = run_folder(tmp_path / "old", steps=(90,))
    (old / "evaluation/step-90.json").write_text('{"format": 0}')
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").touch()
    (tmp_path / "file").touch()
    for arguments, message in (
        ([run.parent / "dmo"], f"{run.parent}/dmo: no such folder; did you mean {run}?"),
        ([tmp_path / "ouputs/demo"], f"ouputs/demo: no such folder; did you mean {run.parent}?"),
        ([tmp_path / "zzz"], "zzz: no such folder"),
        ([run.parent], f"holds neither a metrics.jsonl nor an evaluation/*.json; did you mean {run}?"),
        ([empty], "empty: no step is logged yet"),
        ([broken], "step-90.json: not JSON"),
        ([old], "step-90.json: format 0, not 2: evaluate the checkpoint again"),
        ([run, "--output", tmp_path / "file"], "file: File exists"),
        ([run, "--ouput", tmp_path], "--ouput: unknown flag; did you mean --output?"),
        ([], "the following arguments are required: RUN_FOLDER"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert ended.value.code == 2
        assert message in captured.err
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1


def test_tensorboard_has_the_pictures(tmp_path: Path) -> None:
    def figure(width: float) -> Figure:
        drawn = style.new_figure(width / 4, "kind", "subject")
        drawn.subplots().plot([0, 1], [1, 0])
        return drawn

    figures = {"scores/sources": figure(10), "raster": figure(12)}
    for step in (90, 180):
        to_tensorboard(tmp_path, figures, step)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["images"]) == set(figures)
    for name, drawn in figures.items():
        images = events.Images(name)
        assert [image.step for image in images] == [90, 180]
        assert images[0].encoded_image_string == style.to_png(drawn)
        height, width, _ = matplotlib.image.imread(io.BytesIO(images[0].encoded_image_string)).shape
        assert (images[0].width, images[0].height) == (width, height)


def test_pictures_need_neither_torch_nor_pyplot() -> None:
    modules = ", ".join(f"torchtitan.plots.{path.stem}" for path in (ROOT / "torchtitan/plots").glob("*.py"))
    unwanted = "{'torch', 'matplotlib.pyplot'} & {*sys.modules}"
    code = f"import sys, {modules}; sys.exit(str({unwanted}) if {unwanted} else 0)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
