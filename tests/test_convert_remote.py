"""Folders in blob storage, on a server that runs on this machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.blob_server import Storage, running_storage
from tests.llamas import SHAPE, llama, meta_weights, write_meta_layout
from torchtitan.convert.arguments import parse_dcp_to_llama, parse_llama_to_dcp
from torchtitan.convert.to_dcp import llama_to_dcp
from torchtitan.convert.to_llama import dcp_to_llama

LLAMA, DCP, OUT = "gs://bucket/models/llama", "gs://bucket/models/dcp", "gs://bucket/models/out"


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Storage]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with running_storage(monkeypatch) as storage:
        yield storage


def put(storage: Storage, folder: Path, url: str) -> None:
    for path in folder.iterdir():
        storage.blobs[f"{url.removeprefix('gs://')}/{path.name}"] = path.read_bytes()


def names(storage: Storage, url: str) -> list[str]:
    prefix = url.removeprefix("gs://") + "/"
    return [key.removeprefix(prefix) for key in storage.blobs if key.startswith(prefix)]


def to_dcp(source: str, output: str, *flags: str) -> None:
    llama_to_dcp(parse_llama_to_dcp(["--input_dir", source, "--output_dir", output, "--keep_embeddings", *flags]))


def to_llama(source: str, output: str, *flags: str) -> None:
    dcp_to_llama(parse_dcp_to_llama(["--input_dir", source, "--output_dir", output, *flags]))


def test_from_storage_to_storage_and_back(storage: Storage, tmp_path: Path) -> None:
    original = llama(SHAPE)
    put(storage, write_meta_layout(tmp_path / "source", original, shards=2), LLAMA)
    to_dcp(LLAMA, DCP)
    assert names(storage, DCP)[-1] == "checkpoint.json"
    to_llama(DCP, OUT)
    assert set(names(storage, OUT)) == {"README.md", "checkpoint.json", "consolidated.00.pth", "params.json"}
    (tmp_path / "weights.pth").write_bytes(storage.blobs["bucket/models/out/consolidated.00.pth"])
    found = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert all(torch.equal(found[name], weight) for name, weight in meta_weights(original).items())
    assert not list(tmp_path.glob("convert-*")), "the local copies are left"


def test_what_is_there_is_not_overwritten_unasked(storage: Storage, tmp_path: Path) -> None:
    source = write_meta_layout(tmp_path / "source", llama(SHAPE))
    storage.blobs["bucket/models/dcp/old"] = b"something"
    with pytest.raises(ValueError, match="gs://bucket/models/dcp is not empty; take another --output_dir"):
        to_dcp(str(source), DCP)
    assert names(storage, DCP) == ["old"]
    to_dcp(str(source), DCP, "--overwrite")
    assert "old" not in names(storage, DCP)
    assert "checkpoint.json" in names(storage, DCP)


def test_the_newest_complete_step_is_taken(storage: Storage, tmp_path: Path) -> None:
    to_dcp(str(write_meta_layout(tmp_path / "first", llama(SHAPE, seed=1))), f"{DCP}/step-9")
    to_dcp(str(write_meta_layout(tmp_path / "second", llama(SHAPE, seed=2))), f"{DCP}/step-10")
    storage.blobs["bucket/models/dcp/step-11/.metadata"] = b"of a save that was interrupted"
    to_llama(DCP, str(tmp_path / "out"))
    found = torch.load(tmp_path / "out/consolidated.00.pth", weights_only=True)
    assert torch.equal(found["norm.weight"], meta_weights(llama(SHAPE, seed=2))["norm.weight"])


def test_nothing_there(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gs://bucket/models/llama is empty, or there is no such folder"):
        to_dcp(LLAMA, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="s3://bucket/models cannot be reached"):
        to_dcp("s3://bucket/models", str(tmp_path / "out"))
