"""Reading a DCP checkpoint runs no code from it, and reads nothing outside of its folder."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from torchtitan.checkpoint.reader import SafeLoadPlanner, SafeReader


class Payload:
    """Creates a file when it is unpickled: what an attacker would do, and more."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Tensors of some dtypes, nested plain values, and bytes."""
    state = {
        "model": {"weight": torch.arange(12.0).view(3, 4), "half": torch.ones(2, dtype=torch.bfloat16)},
        "plain": {"step": 3, "rates": [0.1, 0.2], "name": "x", "nothing": None},
    }
    dcp.save(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    return tmp_path / "checkpoint"


def load(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    dcp.load(state, storage_reader=SafeReader(folder), planner=SafeLoadPlanner(), no_dist=True)
    return state


def rewrite(folder: Path, metadata: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_what_was_saved_is_read(checkpoint: Path) -> None:
    state = load(
        checkpoint,
        {
            "model": {"weight": torch.zeros(3, 4), "half": torch.zeros(2, dtype=torch.bfloat16)},
            "plain": {"step": 0, "rates": [0.0, 0.0], "name": "", "nothing": 1},
        },
    )
    assert torch.equal(state["model"]["weight"], torch.arange(12.0).view(3, 4))
    assert torch.equal(state["model"]["half"], torch.ones(2, dtype=torch.bfloat16))
    assert state["plain"] == {"step": 3, "rates": [0.1, 0.2], "name": "x", "nothing": None}


def test_its_description_is_that_of_pytorchs_reader(checkpoint: Path) -> None:
    ours, theirs = SafeReader(checkpoint).read_metadata(), FileSystemReader(checkpoint).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data


@pytest.mark.fault("planted pickle", "in .metadata", 1, "refused, did not run")
@pytest.mark.parametrize("place", ["whole", "planner_data", "version", "storage_meta", "storage_data"])
def test_a_payload_in_the_metadata_does_not_run(checkpoint: Path, tmp_path: Path, place: str) -> None:
    metadata = FileSystemReader(checkpoint).read_metadata()
    payload = Payload(tmp_path / "it ran")
    if place == "storage_data":
        metadata.storage_data[payload] = payload
    elif place == "storage_meta":
        metadata.storage_meta = StorageMeta(checkpoint_id=payload)  # type: ignore[arg-type]
    else:
        setattr(metadata, place, payload)
    rewrite(checkpoint, payload if place == "whole" else metadata)
    with pytest.raises(ValueError, match=r"it names posix\.mkdir, .*nothing of it was run"):
        SafeReader(checkpoint).read_metadata()
    with pytest.raises(dcp.CheckpointException):
        load(checkpoint, {"model": {"weight": torch.zeros(3, 4)}})
    assert not (tmp_path / "it ran").exists()
    # The payload is a real one: PyTorch's reader runs it.
    FileSystemReader(checkpoint).read_metadata() if place != "whole" else pickle.loads(
        (checkpoint / ".metadata").read_bytes()
    )
    assert (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "stream",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c\x05torch\x8c\x04hub.\x93.",
        b"\x80\x04\x8c\x05torch\x8c\x0bserialization\x93.",
        b"\x80\x04\x8c\x2atorch.distributed.checkpoint.metadata\x8c\x11Metadata.__init__\x93.",
    ],
    ids=["eval", "dotted", "module", "attribute"],
)
def test_names_that_are_not_allowed(checkpoint: Path, stream: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(stream)
    with pytest.raises(ValueError, match="cannot be read"):
        SafeReader(checkpoint).read_metadata()


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps(7), pickle.dumps(Metadata({}))], ids=str)
def test_a_file_that_describes_no_checkpoint(checkpoint: Path, content: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata cannot be read"):
        SafeReader(checkpoint).read_metadata()


@pytest.mark.fault("planted pickle", "in an item of bytes", 1, "refused, did not run")
def test_a_payload_in_an_item_of_bytes_does_not_run(tmp_path: Path) -> None:
    state = {"weight": torch.ones(2), "extra": Payload(tmp_path / "it ran")}
    folder = tmp_path / "checkpoint"
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    with pytest.raises(dcp.CheckpointException, match=r"[wW]eights.only"):
        load(folder, {"weight": torch.zeros(2), "extra": None})
    assert not (tmp_path / "it ran").exists()
    dcp.load({"extra": None}, checkpoint_id=folder, no_dist=True)
    assert (tmp_path / "it ran").exists()


@pytest.mark.fault("path outside of the folder", "in .metadata", 1, "refused")
@pytest.mark.parametrize("where", ["../secret/__0_0.distcp", "{tmp}/secret/__0_0.distcp", "a/../../x", "", 7])
def test_nothing_outside_of_the_folder_is_read(checkpoint: Path, tmp_path: Path, where: Any) -> None:
    shutil.copytree(checkpoint, tmp_path / "secret")
    metadata = FileSystemReader(checkpoint).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = where.format(tmp=tmp_path) if isinstance(where, str) else where
    rewrite(checkpoint, metadata)
    with pytest.raises(ValueError, match=r"points outside of its folder|cannot be read"):
        SafeReader(checkpoint).read_metadata()
