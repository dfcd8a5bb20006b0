"""Folders in blob storage (`gs://`, `az://`, `https://….blob.core.windows.net/`), by way of a local copy."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import blobfile

from torchtitan.checkpoint.manifest import RECORD
from torchtitan.convert.output import check_space
from torchtitan.logging import logger


def is_remote(path: str) -> bool:
    """Whether the path is a URL."""
    return "://" in path


@contextmanager
def local_input(path: str) -> Iterator[Path]:
    """The folder itself, or a local copy of it, or of the newest step in it, that goes with the block.

    Copies lie in the folder for temporary files (TMPDIR), which has to have room for them.

    Raises:
        ValueError: where there is no such folder, it cannot be read, or there is no room for its copy.
    """
    if not is_remote(path):
        yield Path(path).expanduser()
        return
    with _refusals(path), tempfile.TemporaryDirectory(prefix="convert-") as copy:
        folder = _newest_step(path)
        files = [entry for entry in blobfile.scandir(folder) if entry.is_file]
        if not files:
            raise ValueError(f"{folder} is empty, or there is no such folder")
        check_space(Path(copy), sum(entry.stat.size for entry in files if entry.stat is not None))
        # The name stays: it tells what the copy is of.
        local = Path(copy) / blobfile.basename(folder.rstrip("/"))
        local.mkdir()
        for entry in files:
            logger.info(f"fetching {entry.path}")
            blobfile.copy(entry.path, str(local / entry.name))
        yield local


@contextmanager
def local_output(path: str, *, overwrite: bool) -> Iterator[Path]:
    """The folder itself, or a local one that is copied there when the block has ended without an error.

    The record of what the folder holds goes last: without it, the folder is not complete.

    Raises:
        ValueError: where the remote folder holds anything and may not be overwritten, or cannot be written.
    """
    if not is_remote(path):
        yield Path(path).expanduser()
        return
    with _refusals(path), tempfile.TemporaryDirectory(prefix="convert-") as copy:
        exists = blobfile.isdir(path) and any(True for _ in blobfile.listdir(path))
        if exists and not overwrite:
            raise ValueError(
                f"{path} is not empty; take another --output_dir, or replace it with --overwrite (an upload that broke "
                f"off has left no {RECORD} there)"
            )
        local = Path(copy) / blobfile.basename(path.rstrip("/"))
        yield local
        if exists:
            blobfile.rmtree(path)
        for file in sorted(local.iterdir(), key=lambda file: (file.name == RECORD, file.name)):
            logger.info(f"sending {file.name} to {path}")
            blobfile.copy(str(file), blobfile.join(path, file.name), overwrite=True)


def _newest_step(url: str) -> str:
    """The folder itself where it holds files, else its newest complete step, where it holds steps."""
    names = list(blobfile.listdir(url))
    steps = [int(step[1]) for name in names if (step := re.fullmatch(r"step-(\d+)/?", name))]
    complete = [
        step for step in steps if {RECORD, ".metadata"} <= set(blobfile.listdir(blobfile.join(url, f"step-{step}")))
    ]
    return blobfile.join(url, f"step-{max(complete)}") if complete and ".metadata" not in names else url


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """What the storage refuses, as an error that names the path."""
    try:
        yield
    except (blobfile.Error, FileNotFoundError) as error:
        raise ValueError(f"{path} cannot be reached: {str(error).splitlines()[0]}") from error
