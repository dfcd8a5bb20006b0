"""Writing small checkpoints, and reading whole ones to compare them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from tests.models import small_model, train_a_little
from torchtitan.checkpoint import folders
from torchtitan.checkpoint.checkpointer import Checkpointer
from torchtitan.checkpoint.manifest import Files, Record, read_manifest
from torchtitan.checkpoint.reader import SafeLoadPlanner, SafeReader
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors, stored_tensors
from torchtitan.checkpoint.writer import CheckedWriter
from torchtitan.config import JobConfig
from torchtitan.distributed.world import World
from torchtitan.models.llama.model import Transformer

DATA = {"cursor": 12, "fingerprint": "f", "seed": 0}


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a DCP checkpoint, whole."""
    state = {}
    for name, entry in stored_tensors(folder).items():
        assert entry is not None, f"{name} is not a tensor"
        state[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load(state, storage_reader=SafeReader(folder), planner=SafeLoadPlanner(), no_dist=True)
    return state


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """The same tensors under the same names, bit for bit."""
    a, b = read_checkpoint(one), read_checkpoint(other)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the tensors, gathered from their shards."""
    return {name: t.full_tensor().clone() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}


def rewritten(folder: Path, change: Callable[[Record], None], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Changes what a checkpoint's record says, and its tensors where some are given: whole, undamaged, and another."""
    record = read_manifest(folder)
    change(record)
    tensors = read_checkpoint(folder) if tensors is None else tensors
    shutil.rmtree(folder)
    temporary = folders.begin(folder)
    assert temporary is not None

    def commit(files: Files) -> None:
        folders.commit(temporary, folder, {**record, "files": files})

    dcp.save(tensors, storage_writer=CheckedWriter(temporary, commit), no_dist=True)


def saved(world: World, folder: Path, *argv: str, steps: tuple[int, ...] = (1,)) -> dict[str, torch.Tensor]:
    """A checkpoint of each step; returns weights and optimizer state of the last."""
    config, model, optimizer = small_model(world, "--job.dump_folder", str(folder), *argv)
    checkpointer = Checkpointer(config, model)
    for step in steps:
        train_a_little(model, optimizer)
        checkpointer.save(step, {**DATA, "cursor": 12 * step}, optimizer)
    checkpointer.wait()
    return whole(model_tensors(model) | optimizer_tensors(model, optimizer))


def resume(config: JobConfig, model: Transformer, optimizer: torch.optim.Optimizer) -> Record | None:
    """Goes on from the checkpoint that the configuration finds; returns its record."""
    checkpointer = Checkpointer(config, model)
    found = checkpointer.find()
    if found is None:
        return None
    return checkpointer.load(found, optimizer).record
