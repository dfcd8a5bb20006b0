"""The output folder: whole or not at all, never overwritten unasked, and never written by two at once."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.llamas import SHAPE, llama, to_dcp, to_llama, write_meta_layout
from tests.processes import NO_GPU, ROOT
from torchtitan.convert.output import whole_folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_meta_layout(tmp_path / "source", llama(SHAPE))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "checkpoint.json"}


def fill(folder: Path, content: str, *, overwrite: bool = False, fail: bool = False) -> None:
    with whole_folder(folder, {"kind": "weights"}, 0, overwrite=overwrite) as temporary:
        (temporary / "weights").write_text(content)
        if fail:
            raise ValueError("no more weights")


def test_it_appears_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep/out"
    with pytest.raises(ValueError, match="no more weights"):
        fill(out, "half", fail=True)
    assert not list((tmp_path / "deep").iterdir())
    fill(out, "first")
    assert contents(out) == {"weights": b"first"}


def test_what_is_there_stays_until_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "first")
    with pytest.raises(ValueError, match="not empty"):
        fill(out, "second")
    with pytest.raises(ValueError, match="no more weights"):
        fill(out, "second", overwrite=True, fail=True)
    assert contents(out) == {"weights": b"first"}
    fill(out, "second", overwrite=True)
    assert contents(out) == {"weights": b"second"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "first")
    assert contents(tmp_path / "out") == {"weights": b"first"}


def test_killed_between_the_two_renames_of_an_overwrite(tmp_path: Path) -> None:
    """The old output has been moved away, the new one has not come: the next run finds the old one again."""
    out = tmp_path / "out"
    fill(out, "first")
    out.rename(tmp_path / "out.removed")
    with pytest.raises(ValueError, match="not empty"):
        fill(out, "second")
    assert contents(out) == {"weights": b"first"}


def test_two_at_once(tmp_path: Path) -> None:
    (tmp_path / "out.tmp").mkdir()
    other = os.open(tmp_path / "out.tmp", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another conversion is writing to"):
        fill(tmp_path / "out", "first")
    assert (tmp_path / "out.tmp").exists()
    os.close(other)
    fill(tmp_path / "out", "first")


def test_killed_and_run_again(source: Path, tmp_path: Path) -> None:
    """Killed while it writes, wherever that is: nothing is there, and the same command gives the same files."""
    # Large enough to be caught at it: 100 MB in one tensor, which is written last but one.
    weights = torch.load(source / "consolidated.00.pth")
    large = 200_000
    weights |= {name: torch.randn(large, 128) for name in ("tok_embeddings.weight", "output.weight")}
    torch.save(weights, source / "consolidated.00.pth")
    params = (source / "params.json").read_text().replace('"vocab_size": 96', f'"vocab_size": {large}')
    (source / "params.json").write_text(params)
    command = [sys.executable, "llama_to_dcp.py", "--input_dir", str(source), "--keep_embeddings", "--output_dir"]
    out, temporary = tmp_path / "out", tmp_path / "out.tmp"
    with subprocess.Popen([*command, str(out)], cwd=ROOT, env={**os.environ, **NO_GPU}) as process:
        deadline = time.monotonic() + 60
        while not list(temporary.glob("*.distcp")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert temporary.exists(), "it was not caught at it"
    assert not out.exists()
    to_dcp(source, out, "--keep_embeddings")
    assert not temporary.exists()
    again = to_llama(out, tmp_path / "pth")
    stored = torch.load(again / "consolidated.00.pth", mmap=True)
    assert all(torch.equal(stored[name], weights[name]) for name in stored)


def test_the_same_input_gives_the_same_files(source: Path, tmp_path: Path) -> None:
    first, second = (to_dcp(source, tmp_path / name, "--keep_embeddings") for name in ("first", "second"))
    a, b = contents(first), contents(second)
    del a[".metadata"], b[".metadata"]  # it names its folder and an id
    assert a == b
    for flags in ((), ("--format", "hf")):
        one, other = (to_llama(first, tmp_path / f"{name}{len(flags)}", *flags) for name in ("one", "two"))
        a, b = contents(one), contents(other)
        del a["README.md"], b["README.md"]  # its title is the folder's name
        assert a == b
