"""What a run will take: `python -m torchtitan.plan CONFIG --gpus N --gpu GH200 [--table.key value …]`.

Needs neither GPU nor torch, and allocates nothing.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial

from tabulate import tabulate

from torchtitan.config import ConfigError, JobConfig, load_config
from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.distributed.degrees import Degrees, check_degrees
from torchtitan.flops import training_flops
from torchtitan.models.llama.shape import check_shape
from torchtitan.plan.check import check_recompute
from torchtitan.plan.choose import Choice, Limits, choose, describe, evaluate
from torchtitan.plan.costs import GIB, Step, communication_bytes
from torchtitan.plan.hardware import GPUS

SECONDS_A_DAY = 86_400


def main(argv: list[str]) -> None:
    """Prints the plan; exits with 2 where the configuration is wrong."""
    parser = argparse.ArgumentParser(prog="python -m torchtitan.plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("config", help="TOML file of the run; overrides stand behind it")
    parser.add_argument("--gpus", type=positive_int, required=True, help="number of GPUs of the run")
    parser.add_argument("--gpu", choices=GPUS, required=True, help="their kind")
    parser.add_argument("--gpus-per-node", type=positive_int, default=4, help="of them in one node (default 4)")
    parser.add_argument(
        "--document-lengths",
        type=positive_int,
        nargs="+",
        help="tokens of the recordings that a window consists of, for training.document_mask (default: one)",
    )
    arguments, overrides = parser.parse_known_args(argv)
    try:
        checks = [check_shape, check_recompute, partial(check_degrees, num_ranks=arguments.gpus)]
        config = load_config(["--job.config_file", arguments.config, *overrides], checks)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    lengths = arguments.document_lengths
    if lengths and not config.training.document_mask:
        parser.error("argument --document-lengths: they change nothing without --training.document_mask true")
    if lengths and (total := sum(lengths)) != config.training.seq_len:
        parser.error(f"argument --document-lengths: {total} in all, training.seq_len is {config.training.seq_len}")
    degrees = Degrees.of(config.training, arguments.gpus)
    gpu = GPUS[arguments.gpu]
    per_node = min(arguments.gpus, arguments.gpus_per_node)
    step = Step.of(config, degrees, per_node, lengths)
    limits = Limits.of(config.activation_checkpoint, gpu.memory_gib, gpu.host_memory_gib)
    chosen = choose(step, gpu, limits)
    shape = step.shape
    tokens = degrees.global_batch_size * config.training.seq_len
    flops = training_flops(shape, step.lengths) * step.passes
    print(
        f"{arguments.config}: {config.model.flavor}, {shape.num_params:,} parameters, on {arguments.gpus} × "
        f"{arguments.gpu}, {degrees.global_batch_size} sequences of {config.training.seq_len:,} tokens a step\n"
        f"A step: {tokens:,} tokens; a GPU computes {flops / 1e15:.2f} PFLOP, recomputation not counted, and sends "
        f"{sum(communication_bytes(step)) * step.passes / 1e9:.1f} GB\n"
    )
    print(table(config, step, list(rows(step, chosen, limits, arguments.gpu)), per_node, tokens))
    print(
        f"\nGiB of a GPU (limit {limits.device_gib:.0f}) and of host memory a node (limit "
        f"{limits.host_gib * per_node:.0f}), seconds a step.\n"
        f'"auto" takes, with that much of the host free: {describe(chosen.recompute, shape.n_layers)}.'
    )
    if config.training.document_mask and not lengths:
        print("Each window is taken to lie in one recording; --document-lengths says otherwise.")
    if not chosen.fits:
        print("Nothing fits: take more GPUs, a shorter training.seq_len, or a smaller model.")


def rows(step: Step, chosen: Choice, limits: Limits, gpu: str) -> Iterator[tuple[str, Choice]]:
    """The modes by name, and what `auto` would take."""
    n = step.shape.n_layers
    modes = {
        "none": ActivationCheckpoint(mode="none"),
        "full": ActivationCheckpoint(mode="full"),
        "attention": ActivationCheckpoint(mode="attention"),
        f"attention, projections_layers {n}": ActivationCheckpoint(mode="attention", projections_layers=n),
    }
    for name, recompute in modes.items():
        yield name, evaluate(step, recompute, GPUS[gpu], limits)
    yield "auto", chosen


def table(config: JobConfig, step: Step, choices: list[tuple[str, Choice]], per_node: int, tokens: int) -> str:
    """Memory by cause, time, and how long the run lasts, a row for each."""
    lines = []
    for name, choice in choices:
        needed, seconds = choice.memory, choice.time.total
        lines.append(
            {
                "activation_checkpoint.mode": name,
                "fits": "yes" if choice.fits else "no",
                "GPU": needed.device / GIB,
                "states": needed.states / GIB,
                "gathered": needed.gathered / GIB,
                "kept": needed.kept / GIB,
                "temporaries": needed.temporaries / GIB,
                "host a node": needed.host * per_node / GIB,
                "s/step": seconds,
                "tokens/s/GPU": step.tokens * step.passes / seconds,
                "steps/day": SECONDS_A_DAY / seconds,
                "Gtokens/day": tokens * SECONDS_A_DAY / seconds / 1e9,
                "days": config.training.steps * seconds / SECONDS_A_DAY,
            }
        )
    formats = ("", "", ".1f", ".1f", ".1f", ".1f", ".1f", ".0f", ".2f", ",.0f", ",.0f", ".2f", ".1f")
    return tabulate(lines, headers="keys", floatfmt=formats)


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


if __name__ == "__main__":
    main(sys.argv[1:])
