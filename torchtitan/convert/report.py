"""What a conversion says while it runs and at its end."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from tabulate import tabulate
from tqdm import tqdm

from torchtitan.convert.weights import LeftOut, Tensors, Weight
from torchtitan.logging import logger


@contextmanager
def progress(tensors: Tensors, verb: str = "converting") -> Iterator[Tensors]:
    """The same tensors, whose reading moves a bar on a terminal, and writes a line every tenth of the way to a log."""
    total, done, tenths, begun = tensors.nbytes, 0, 0, time.monotonic()
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
    if bar.disable:
        logger.info(f"{verb} {len(tensors.weights)} tensors, {_size(total)}")

    def read(name: str) -> torch.Tensor:
        nonlocal done, tenths
        tensor = tensors.read(name)
        bar.update(tensor.nbytes)
        done += tensor.nbytes
        if bar.disable and done * 10 // total > tenths:
            tenths = done * 10 // total
            rate = done / (time.monotonic() - begun)
            logger.info(f"{tenths * 10} %: {_size(done)} of {_size(total)}, {_size(int(rate))}/s")
        return tensor

    with bar:
        yield replace(tensors, read=read)


def summary(tensors: dict[str, Weight], left_out: list[LeftOut]) -> str:
    """A table of what was converted and what was not."""
    converted: dict[torch.dtype, list[Weight]] = defaultdict(list)
    for weight in tensors.values():
        converted[weight.dtype].append(weight)
    rows = [
        ["converted", len(weights), f"{sum(weight.nbytes for weight in weights):,}", str(dtype)[6:], ""]
        for dtype, weights in converted.items()
    ]
    rows += [[f"left out: {o.what}", o.tensors, f"{o.nbytes:,}", o.dtype, o.why] for o in left_out]
    return tabulate(
        rows,
        headers=["", "tensors", "bytes", "dtype", "why"],
        colalign=("left", "right", "right", "left", "left"),
        disable_numparse=True,
    )


def _size(nbytes: int) -> str:
    return f"{tqdm.format_sizeof(nbytes)}B"
