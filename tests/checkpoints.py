"""Reading whole checkpoints, to compare them."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from torchtitan.checkpoint.state import stored_tensors


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a DCP checkpoint, whole."""
    state = {}
    for name, entry in stored_tensors(folder).items():
        assert entry is not None, f"{name} is not a tensor"
        state[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """The same tensors under the same names, bit for bit."""
    a, b = read_checkpoint(one), read_checkpoint(other)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different
