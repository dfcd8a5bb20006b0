"""Pictures of runs: `python -m torchtitan.plots RUN_FOLDER [RUN_FOLDER …] [--output FOLDER]`.

Training curves of all runs on common axes, and, where there are evaluations, their learning curves and the pictures of
each run's newest one: of a pass over the whole test split, where there is one.
"""

import argparse
import difflib
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from torchtitan.flags import FlagParser
from torchtitan.metrics import read_metrics
from torchtitan.plots.names import distinct_names
from torchtitan.plots.scores import Evaluation, learning_curve, pictures
from torchtitan.plots.style import save
from torchtitan.plots.training import training_curves

FORMAT = 2
"""Of evaluations that can be read."""


def main(argv: list[str]) -> None:
    """Draws the pictures and says where they are; exits with 2 where a folder is not that of a run."""
    parser = FlagParser(
        prog="python -m torchtitan.plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER", help="a run's job.dump_folder")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: plots/ in the first RUN_FOLDER")
    arguments = parser.parse(argv)
    try:
        folders = [find_run(given) for given in {Path(given).resolve(): given for given in arguments.runs}.values()]
        figures = draw(folders)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    output = arguments.output or folders[0] / "plots"
    try:
        for name, figure in figures.items():
            save(figure, output / f"{name}.png")
            print(output / f"{name}.png")
    except OSError as error:
        print(f"error: --output {output}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def find_run(given: str) -> Path:
    """The folder, if it is a run's.

    Raises:
        ValueError: where it is not there or holds neither metrics nor evaluations, with the nearest that is or does.
    """
    folder = Path(given)
    if not folder.is_dir():
        missing = folder
        while not missing.parent.is_dir():
            missing = missing.parent
        known = [path.name for path in missing.parent.iterdir() if path.is_dir()]
        close = difflib.get_close_matches(missing.name, known, n=1)
        hint = f"; did you mean {missing.parent / close[0]}?" if close else ""
        raise ValueError(f"{given}: no such folder{hint}")
    if not is_run(folder):
        inside = sorted(str(path) for path in folder.glob("*") if is_run(path))
        hint = f"; did you mean {', '.join(inside[:5])}?" if inside else ""
        raise ValueError(f"{given}: holds neither a metrics.jsonl nor an evaluation/*.json{hint}")
    return folder


def is_run(folder: Path) -> bool:
    """Whether pictures can be made of what is in there."""
    return (folder / "metrics.jsonl").is_file() or any(folder.glob("evaluation/*.json"))


def draw(folders: list[Path]) -> dict[str, Figure]:
    """All pictures of these runs, by the names of their files.

    Raises:
        ValueError: where an evaluation cannot be read, or there is nothing to draw.
    """
    figures: dict[str, Figure] = {}
    names = distinct_names([str(folder.absolute()) for folder in folders])
    metrics = {name: read_metrics(folder / "metrics.jsonl") for name, folder in zip(names, folders, strict=True)}
    logged = {name: lines for name, lines in metrics.items() if lines}
    if logged:
        figures["training"] = training_curves(logged)
    evaluations: list[Evaluation] = []
    for name, folder in zip(names, folders, strict=True):
        of_run = {path.stem: read_evaluation(path) for path in sorted(folder.glob("evaluation/*.json"))}
        if of_run:
            newest = max(of_run, key=lambda stem: _rank(of_run[stem]))
            prefix = f"{name}/{newest}" if len(folders) > 1 else newest
            figures.update({f"{prefix}-{picture}": figure for picture, figure in pictures(of_run[newest]).items()})
        evaluations += of_run.values()
    if sum(evaluation["step"] is not None for evaluation in evaluations) > 1:
        figures["learning_curve"] = learning_curve(evaluations)
    if not figures:
        raise ValueError(f"{', '.join(map(str, folders))}: no step is logged yet")
    return figures


def _rank(evaluation: Evaluation) -> tuple[bool, int]:
    """The greatest is the newest of those of a plain pass; without any, the newest of the others."""
    data, settings = evaluation["data"], evaluation["settings"]
    plain = data["split"] == "test" and not data["source_datasets"]
    plain = plain and not any(settings[key] for key in ("max_windows", "min_context", "overlap"))
    return plain, -1 if evaluation["step"] is None else evaluation["step"]


def read_evaluation(path: Path) -> dict[str, Any]:
    """The content of an evaluation.

    Raises:
        ValueError: where it is not one, or one of another format.
    """
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    found = evaluation.get("format") if isinstance(evaluation, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: format {found!r}, not {FORMAT}: evaluate the checkpoint again")
    return evaluation


if __name__ == "__main__":
    main(sys.argv[1:])
