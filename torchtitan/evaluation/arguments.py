"""The command line of evaluate.py. Imports no torch."""

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from torchtitan.config import ConfigError, JobConfig, load_config
from torchtitan.config.load import COMMAND_LINE, Problem
from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.distributed.degrees import check_degrees
from torchtitan.flags import FlagParser
from torchtitan.models.llama.shape import check_shape

DEFAULT_SPLIT = "test"
LONGEST_SOURCES = 80
"""Characters of the names of sources in a file's name."""


@dataclass(frozen=True)
class Arguments:
    """What evaluate.py is told besides the configuration; see its `--help`."""

    checkpoints: list[Path]
    all_steps: bool
    split: str
    source_datasets: list[str]
    max_windows: int | None
    min_context: int
    overlap: bool

    @property
    def way(self) -> str:
        """How the pass differs from the plain one over the test split, for names of files; empty where it does not."""
        parts = [] if self.split == DEFAULT_SPLIT else [quote(self.split)]
        if self.source_datasets:
            sources = "+".join(quote(source, safe="") for source in self.source_datasets)
            if len(sources) > LONGEST_SOURCES:
                digest = hashlib.sha256(sources.encode()).hexdigest()[:8]
                sources = f"{len(self.source_datasets)}-{digest}"
            parts.append(f"source_dataset-{sources}")
        if self.max_windows is not None:
            parts.append(f"max_windows-{self.max_windows}")
        if self.min_context > 0:
            parts.append(f"min_context-{self.min_context}")
        if self.overlap:
            parts.append("overlap")
        return ".".join(parts)


class _Parser(FlagParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([Problem(COMMAND_LINE, "", message)])


def parse(argv: list[str], description: str) -> tuple[Arguments, JobConfig]:
    """The arguments, and the configuration that the rest of `argv` describes, without what only training needs.

    Raises:
        ConfigError: listing what is wrong with either.
    """
    parser = _Parser(
        usage="evaluate.py --job.config_file FILE [flags] [--table.key value ...]",
        description=description,
        epilog="`train.py --help` lists the keys of the configuration, any of which may be overridden.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="PATH",
        help="a checkpoint of any run, an export, weights in DCP format, or a folder of steps, of which the newest "
        "counts; several: the learning curve; without it the weights are random",
    )
    parser.add_argument(
        "--all_steps", action="store_true", help="all steps of each --checkpoint that is a folder of them"
    )
    parser.add_argument(
        "--split", default=DEFAULT_SPLIT, metavar="NAME", help=f"split to evaluate on (default: {DEFAULT_SPLIT})"
    )
    parser.add_argument(
        "--source_dataset", nargs="+", action="extend", default=[], metavar="NAME", help="only rows of these sources"
    )
    parser.add_argument(
        "--max_windows", type=_positive, metavar="K", help="score that many windows, spread evenly over the split"
    )
    parser.add_argument(
        "--min_context",
        type=_not_negative,
        default=0,
        metavar="M",
        help="leave out tokens with fewer tokens than that before them in their window",
    )
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="overlap windows, so that --min_context leaves no more than the first out",
    )
    own, rest = parser.parse_known_args(argv)
    # What has a dot is a key of the configuration.
    unknown = [(flag, message) for flag, message in parser.unknown(rest) if "." not in flag]
    problems = [Problem(COMMAND_LINE, flag, message) for flag, message in unknown]
    if own.overlap and own.min_context < 2:
        problems.append(
            Problem(COMMAND_LINE, "--overlap", "needs a --min_context of at least 2, by which they overlap")
        )
    if own.all_steps and not own.checkpoint:
        problems.append(Problem(COMMAND_LINE, "--all_steps", "needs a --checkpoint, the folder of the steps"))
    if problems:
        raise ConfigError(problems)
    checks = [check_shape, lambda config: check_degrees(_for_evaluation(config)), partial(_check_mask, own.min_context)]
    config = load_config(rest, checks)
    arguments = Arguments(
        own.checkpoint,
        own.all_steps,
        own.split,
        sorted(set(own.source_dataset)),
        own.max_windows,
        own.min_context,
        own.overlap,
    )
    return arguments, _for_evaluation(config)


def _check_mask(min_context: int, config: JobConfig) -> Iterator[tuple[str, str]]:
    if config.training.document_mask and min_context > 1:
        yield (
            "training.document_mask",
            f"with it a token's context begins with its recording, where --min_context {min_context} counts from the "
            "beginning of the window; leave out one of them",
        )


def _for_evaluation(config: JobConfig) -> JobConfig:
    """Nothing is recomputed, and there is no batch of all ranks."""
    training = config.training.model_copy(update={"global_batch_size": -1})
    return config.model_copy(update={"training": training, "activation_checkpoint": ActivationCheckpoint()})


def _positive(text: str) -> int:
    if (number := _whole(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _not_negative(text: str) -> int:
    if (number := _whole(text)) < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
