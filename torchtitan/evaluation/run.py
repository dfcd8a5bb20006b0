"""The way of evaluate.py: opens data and model, passes over the split once a checkpoint, reports."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from torchtitan.checkpoint import folders
from torchtitan.checkpoint.init_from import Source, find_weights, load_weights
from torchtitan.config import JobConfig
from torchtitan.distributed.degrees import Degrees
from torchtitan.distributed.parallelize import build_model, init_weights
from torchtitan.distributed.world import World, build_mesh, from_rank_zero
from torchtitan.evaluation.accumulator import Accumulator, Totals, warn_of_clipped
from torchtitan.evaluation.arguments import Arguments
from torchtitan.evaluation.passes import Pass, of_sources, open_held_out
from torchtitan.evaluation.report import FORMAT, Evaluation, learning_curve, results, tables
from torchtitan.evaluation.scoring import Scorer, WindowScore
from torchtitan.logging import logger
from torchtitan.models.llama.model import Transformer
from torchtitan.owner import make_writable

SECONDS_BETWEEN_REPORTS = 30.0


def evaluate(arguments: Arguments, config: JobConfig, world: World) -> None:
    """Evaluates each checkpoint, or random weights; rank 0 writes and prints what was found.

    Raises:
        ValueError: for what a user can mend, before anything is scored.
    """
    training = config.training
    folder = Path(config.job.dump_folder) / "evaluation"
    from_rank_zero(lambda: make_writable(folder))
    recordings, index = open_held_out(training, world, arguments.split, "--split")
    if arguments.source_datasets:
        index = of_sources(recordings, index, arguments.source_datasets)
    over = Pass(
        recordings,
        index,
        seq_len=training.seq_len,
        vocab_size=training.vocab_size,
        min_context=arguments.min_context,
        overlap=arguments.overlap,
        max_windows=arguments.max_windows,
    )
    model = build_model(config, build_mesh(Degrees.of(training, world.size), world.device), world.device)
    sources = [find_weights(model, *_asked(path, config)) for path in _checkpoints(arguments)]
    names = [".".join(filter(None, (_name(source), arguments.way))) for source in sources or [None]]
    _check_names(names, sources)
    about = [_about(source, model, over, arguments, config) for source in sources or [None]]
    from_rank_zero(lambda: _check_kept(folder, names, about))
    logger.info(
        f"evaluating {len(names)} checkpoints of a model of {model.shape.num_params:,} parameters on "
        f"{recordings.description}: {len(index.rows):,} recordings, {over.num_scored:,} tokens in "
        f"{len(over.chosen):,} windows of {training.seq_len:,}; "
        + model.attention.describe(world.device, document_mask=training.document_mask)
    )
    init_weights(model, world.device, training.seed)
    evaluations = []
    for name, source, subject in zip(names, sources or [None], about, strict=True):
        if source is not None:
            load_weights(model, source)
        totals = score(model, over, config, world)
        if totals is None:
            continue
        if not evaluations:
            warn_of_clipped(totals.overall, training.vocab_size)
        evaluation = {**subject, "time": time.time(), **results(totals)}
        evaluations.append(evaluation)
        path = folder / f"{name}.json"
        _write(path, evaluation)
        pictures = _draw(evaluation, name, arguments, folder, config)
        print(f"\n{name}\n\n{tables(evaluation)}\n\nwritten to {path}{pictures}", flush=True)
    if len(evaluations) > 1:
        evaluations.sort(key=lambda evaluation: -1 if evaluation["step"] is None else evaluation["step"])
        pictures = _draw_learning_curve(evaluations, arguments, folder, config)
        print(f"\n{learning_curve(evaluations)}{pictures}", flush=True)


def score(model: Transformer, over: Pass, config: JobConfig, world: World) -> Totals | None:
    """One pass over the data, on all ranks; the sums of it on rank 0."""
    training = config.training
    scorer = Scorer(
        model,
        over,
        world,
        batch_size=training.batch_size,
        document_mask=training.document_mask,
        num_workers=training.num_workers,
    )
    if world.rank != 0:
        for _ in scorer.score():
            raise AssertionError("only rank 0 is given scores")
        return None
    processors = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = max(1, min(processors, 4))
    accumulator = Accumulator(over, document_mask=training.document_mask, num_threads=threads)
    for window in _reported(scorer.score(), over.num_scored):
        accumulator.add(window)
    return accumulator.finish()


def _reported(windows: Iterable[WindowScore], num_tokens: int) -> Iterator[WindowScore]:
    """The same windows, with a line in the log every so often."""
    started = reported = time.monotonic()
    done = 0
    for window in windows:
        yield window
        done += len(window.labels)
        now = time.monotonic()
        if now - reported > SECONDS_BETWEEN_REPORTS:
            reported, rate = now, done / (now - started)
            left = timedelta(seconds=round((num_tokens - done) / rate))
            logger.info(
                f"{done:,} of {num_tokens:,} tokens ({done / num_tokens:.0%}), {rate:,.0f} a second, {left} left"
            )
    logger.info(f"{done:,} tokens in {time.monotonic() - started:.1f} s")


def _draw(evaluation: Evaluation, name: str, arguments: Arguments, folder: Path, config: JobConfig) -> str:
    """Draws what one evaluation shows; returns what there is to say of it."""
    from torchtitan.plots.scores import pictures

    return _keep(pictures(evaluation), f"{name}-", arguments, evaluation["step"] or 0, folder, config)


def _draw_learning_curve(evaluations: list[Evaluation], arguments: Arguments, folder: Path, config: JobConfig) -> str:
    """As `_draw`, of several checkpoints."""
    from torchtitan.plots.scores import learning_curve as draw_curve

    figures = {"learning_curve": draw_curve(evaluations)}
    prefix = f"{arguments.way}-" if arguments.way else ""
    return _keep(figures, prefix, arguments, evaluations[-1]["step"] or 0, folder, config)


def _keep(
    figures: dict[str, Any], prefix: str, arguments: Arguments, step: int, folder: Path, config: JobConfig
) -> str:
    """To files, and to TensorBoard in a folder beside the run's own, which the run may still write to.

    There a pass that is not the plain one is a group of its own.
    """
    from torchtitan.plots.board import to_tensorboard
    from torchtitan.plots.style import save

    for name, figure in figures.items():
        save(figure, folder / "plots" / f"{prefix}{name}.png")
    if config.metrics.enable_tensorboard:
        board = Path(config.job.dump_folder) / config.metrics.save_tb_folder / "evaluation"
        group = f"{arguments.way}/" if arguments.way else ""
        to_tensorboard(board, {f"{group}{name}": figure for name, figure in figures.items()}, step)
    return f"\npictures in {folder / 'plots'}"


def _checkpoints(arguments: Arguments) -> list[Path]:
    """The checkpoints that are asked for, with all steps of a folder of them if those are."""
    if not arguments.all_steps:
        return arguments.checkpoints
    found = []
    for given in arguments.checkpoints:
        root = given.expanduser()
        steps = from_rank_zero(lambda root=root: folders.named_steps(root))
        found += [folders.step_folder(root, step) for step in steps] or [given]
    return found


def _asked(path: Path, config: JobConfig) -> tuple[Any, str]:
    """For `find_weights`: all weights of that checkpoint, and what the user calls it by."""
    return config.checkpoint.model_copy(update={"init_from": str(path), "init_missing_keys": []}), "--checkpoint"


def _name(source: Source | None) -> str:
    """What the files of a checkpoint's evaluation are called by."""
    if source is None:
        return "random"
    return source.folder.resolve().name if source.step is None else f"step-{source.step}"


def _check_names(names: list[str], sources: list[Source]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        same = ", ".join(str(source.folder) for source, name in zip(sources, names, strict=True) if name == twice[0])
        raise ValueError(
            f"--checkpoint: {same} would all be written to {twice[0]}.json; evaluate them in calls of their own, each "
            "with a --job.dump_folder"
        )


def _check_kept(folder: Path, names: list[str], about: list[Evaluation]) -> None:
    """An evaluation is only replaced by one of the same checkpoint on the same tokens."""
    for name, new in zip(names, about, strict=True):
        path = folder / f"{name}.json"
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            continue
        if old["format"] != FORMAT:
            continue
        for key, there, here in (
            ("checkpoint", old["checkpoint"], new["checkpoint"]),
            *((key, old["data"][key], new["data"][key]) for key in ("split", "source_datasets", "fingerprint")),
            *((key, old["settings"][key], new["settings"][key]) for key in ("seq_len", "document_mask")),
        ):
            if there != here:
                raise ValueError(
                    f"{path} is an evaluation of something else: {key} is {there} there and {here} here; move it away "
                    "or give another --job.dump_folder"
                )


def _about(
    source: Source | None, model: Transformer, over: Pass, arguments: Arguments, config: JobConfig
) -> Evaluation:
    """What was evaluated, and how."""
    training, windows = config.training, over.windows
    return {
        "format": FORMAT,
        "checkpoint": None if source is None else str(source.folder.absolute()),
        "step": None if source is None else source.step,
        "model": asdict(model.shape),
        "data": {
            "description": windows.recordings.description,
            "split": arguments.split,
            "fingerprint": windows.fingerprint,
            "source_datasets": arguments.source_datasets or None,
        },
        "settings": {
            "seq_len": windows.seq_len,
            "min_context": arguments.min_context,
            "overlap": arguments.overlap,
            "max_windows": arguments.max_windows,
            "windows": len(over.chosen),
            "document_mask": training.document_mask,
            "batch_size": training.batch_size,
            "mixed_precision_param": training.mixed_precision_param,
        },
    }


def _write(path: Path, evaluation: Evaluation) -> None:
    """By a rename, so that there is always a whole file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(evaluation, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
