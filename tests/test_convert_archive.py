"""Our files against `torch.save` and `torch.load`: each reads what the other writes."""

import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.test_reader import Payload
from torchtitan.convert.archive import Archive, write_tensors
from torchtitan.convert.weights import DTYPES, Weight

SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    weights = {name: Weight(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with open(path, "wb") as file:
        write_tensors(file, weights, tensors.values())
    return path


@given(shapes=st.lists(SHAPES, max_size=5), dtypes=st.lists(st.sampled_from(sorted(DTYPES)), min_size=5, max_size=5))
def test_torch_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], dtypes: list[str]
) -> None:
    tensors = {f"w{i}": torch.randn(shape).to(DTYPES[dtypes[i]]) for i, shape in enumerate(shapes)}
    path = write(tmp_path_factory.mktemp("archive") / "weights.pth", tensors)
    for mapped in (False, True):
        found = torch.load(path, weights_only=True, mmap=mapped)
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
            assert found[name].is_contiguous()
            assert found[name].data_ptr() % 64 == 0
    archive = Archive(path)
    assert all(torch.equal(archive.read(archive.content[name]), tensor) for name, tensor in tensors.items())
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None


def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    """Views into one storage, transposed and offset; parameters; and other values beside them."""
    base = torch.randn(20, 30)
    state = {
        "whole": base,
        "part": base[3:7, 5:9],
        "transposed": base.T,
        "parameter": torch.nn.Parameter(torch.randn(4)),
        "none": torch.empty(0),
        "scalar": torch.tensor(3.0),
        "step": 3,
    }
    torch.save(state, tmp_path / "state.pth")
    archive = Archive(tmp_path / "state.pth")
    assert archive.content["step"] == 3
    for name in state.keys() - {"step"}:
        assert torch.equal(archive.read(archive.content[name]), state[name]), name
    content = (tmp_path / "state.pth").read_bytes()
    archive.read(archive.content["whole"]).zero_()
    assert (tmp_path / "state.pth").read_bytes() == content


def test_an_archive_inside_a_file(tmp_path: Path) -> None:
    """As in DCP's files, of which each holds many."""
    tensors = [torch.randn(10), torch.randn(3, 3), torch.randn(1000)]
    places = []
    with open(tmp_path / "many", "wb") as file:
        file.write(b"something before")
        for tensor in tensors:
            begin = file.tell()
            torch.save(tensor, file)
            places.append((begin, file.tell() - begin))
    for tensor, (offset, length) in zip(tensors, places, strict=True):
        with Archive(tmp_path / "many", offset, length) as archive:
            assert torch.equal(archive.read(archive.content), tensor)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "weights.pth", {"a": torch.randn(40), "b": torch.randn(3)})
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is truncated, or not a file"):
            Archive(path)


def test_every_flipped_bit_of_the_data_is_noticed(tmp_path: Path) -> None:
    tensor = torch.randn(5)
    path = write(tmp_path / "weights.pth", {"a": tensor})
    content = bytearray(path.read_bytes())
    begin = content.index(tensor.numpy().tobytes())
    for position in range(begin, begin + tensor.nbytes):
        content[position] ^= 16
        path.write_bytes(content)
        archive = Archive(path)
        with pytest.raises(ValueError, match="damaged"):
            archive.read(archive.content["a"])
        content[position] ^= 16


@pytest.mark.fault("planted pickle", "in a .pth", 1, "refused, did not run")
def test_a_planted_payload_does_not_run(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3), "b": Payload(tmp_path / "it ran")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"it names posix\.mkdir, .*nothing of it was run"):
        Archive(tmp_path / "weights.pth")
    assert not (tmp_path / "it ran").exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)  # the payload is a real one
    assert (tmp_path / "it ran").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match="or not a file"):
        Archive(tmp_path / "weights.pth")
