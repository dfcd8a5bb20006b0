"""A checkpoint of N processes, loaded on M: the same weights and the same optimizer, sharded otherwise."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.checkpoints import read_checkpoint, resume, saved, whole
from tests.models import small_model
from tests.processes import run_ranks
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors
from torchtitan.distributed.world import init_world

HSDP = ("--training.data_parallel_replicate_degree", "2")


def save(folder: str, argv: tuple[str, ...]) -> None:
    world = init_world(60)
    saved(world, Path(folder), *argv)
    dist.destroy_process_group()


def load(folder: str, argv: tuple[str, ...]) -> None:
    """On each rank; rank 0 writes what all of them together have."""
    world = init_world(60)
    config, model, optimizer = small_model(world, "--job.dump_folder", folder, *argv, seed=1)
    record = resume(config, model, optimizer)
    assert record is not None
    assert record["data"]["cursor"] == 12
    tensors = whole(model_tensors(model) | optimizer_tensors(model, optimizer))
    if world.rank == 0:
        torch.save(tensors, f"{folder}/loaded.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The dump folders of runs on 1, 2 and 3 processes, and on 2 that hold a whole copy each."""
    found = {}
    for name, (count, argv) in {"1": (1, ()), "2": (2, ()), "3": (3, ()), "HSDP": (2, HSDP)}.items():
        found[name] = tmp_path_factory.mktemp(name)
        run_ranks(save, count, str(found[name]), argv)
    return found


@pytest.mark.fault("other number of processes", "saved on N, loaded on M", 1, "the same weights, optimizer and cursor")
@pytest.mark.parametrize(
    ("saved_on", "processes", "argv"),
    [
        ("1", 2, ()),
        ("1", 3, ()),
        ("2", 1, ()),
        ("2", 3, ()),
        ("3", 1, ()),
        ("3", 2, ()),
        ("3", 2, HSDP),
        ("HSDP", 3, ()),
    ],
)
def test_what_n_have_saved_m_load(
    checkpoints: dict[str, Path], saved_on: str, processes: int, argv: tuple[str, ...]
) -> None:
    folder = checkpoints[saved_on]
    run_ranks(load, processes, str(folder), argv)
    stored = read_checkpoint(folder / "checkpoint/step-1")
    loaded = torch.load(folder / "loaded.pt")
    assert loaded.keys() == {name for name in stored if not name.startswith("random.")}
    assert all(torch.equal(loaded[name], stored[name]) for name in loaded)
