"""The command line of `generate.py`. Imports no torch: what is wrong with it is said at once."""

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

from torchtitan.flags import FlagParser
from torchtitan.models.llama.shape import FLAVORS

ATTENTION = ("triton", "fa3", "pytorch")
"""What `--attention` takes, and the order in which `auto` tries them."""
Number = TypeVar("Number", int, float)


def parse_generate(argv: list[str]) -> argparse.Namespace:
    """What `generate.py` was asked for; exits with code 2 where that makes no sense."""
    parser = FlagParser(description="Continues recordings with what a model has learned.")
    parser.add_argument(
        "--checkpoint", required=True, metavar="FOLDER", help="a DCP checkpoint, or a folder of steps: the newest"
    )
    parser.add_argument(
        "--prompt",
        required=True,
        action="append",
        metavar="DATASET:ROW",
        help="recording to continue: primate, rodent, or a path, and its row; given again, several at once",
    )
    parser.add_argument("--split", help="of the dataset; default: test where there is one, else train")
    parser.add_argument(
        "--context_bins",
        type=_number(int, 1),
        metavar="C",
        help="bins to read, from the recording's first; default: as many as fit into the trained context with --bins",
    )
    parser.add_argument("--bins", type=_number(int, 1), required=True, metavar="B", help="bins to generate")
    parser.add_argument("--samples", type=_number(int, 1), default=1, metavar="S", help="of each prompt (default 1)")
    parser.add_argument(
        "--temperature", type=_number(float, 0), default=1.0, help="0: always the most likely count (default 1)"
    )
    parser.add_argument("--top_k", type=_number(int, 1), metavar="K", help="draw from the K most likely counts")
    parser.add_argument(
        "--top_p",
        type=_probability,
        default=1.0,
        metavar="P",
        help="draw from the most likely counts that together reach probability P, of (0, 1]",
    )
    parser.add_argument("--seed", type=_number(int, 0), default=0, help="of the random numbers (default 0)")
    parser.add_argument(
        "--sliding_window",
        action="store_true",
        help="go on past the trained context: whenever it is full, forget the older half of it",
    )
    parser.add_argument("--output", metavar="FOLDER", help="new folder; default: generation/step-N/… beside the run's")
    parser.add_argument("--no_plots", action="store_true", help="draw no pictures")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of weights and cache; default: bfloat16 on a GPU"
    )
    parser.add_argument(
        "--attention", choices=("auto", *ATTENTION), default="auto", help="kernels for the cache (default auto)"
    )
    parser.add_argument("--flavor", choices=tuple(FLAVORS), help="shape of a checkpoint that does not record it")
    parser.add_argument("--rope_scaling", choices=("llama3.1", "none"), help="where the checkpoint does not say it")
    return parser.parse(argv)


def _number(kind: Callable[[str], Number], smallest: Number) -> Callable[[str], Number]:
    """Reads a finite number that is not smaller."""

    def read(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not smallest <= value < math.inf:
            whole = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {whole} from {smallest} on")
        return value  # pyright: ignore[reportReturnType]

    return read


def _probability(text: str) -> float:
    value = _number(float, 0.0)(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability of (0, 1]")
    return value
