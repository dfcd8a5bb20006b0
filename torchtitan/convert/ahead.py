"""Reads the next tensor while the last one is written."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import torch

from torchtitan.convert.weights import Tensors

LARGEST = 512 * 2**20  # a larger one is not read ahead: it would not be the only large one in memory


@contextmanager
def reading_ahead(tensors: Tensors) -> Iterator[Tensors]:
    """The same tensors, for one who reads them in their order; never more than one is read at a time."""
    names = list(tensors.weights)
    following = dict(pairwise(names))
    pending: dict[str, Future[torch.Tensor]] = {}

    def read(name: str) -> torch.Tensor:
        if pending and name not in pending:
            pending.popitem()[1].result()
        tensor = pending.pop(name).result() if pending else tensors.read(name)
        after = following.get(name)
        if after is not None and tensors.weights[after].nbytes <= LARGEST:
            pending[after] = pool.submit(tensors.read, after)
        return tensor

    with ThreadPoolExecutor(1) as pool:
        yield replace(tensors, read=read)
