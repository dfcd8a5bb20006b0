"""A folder that appears whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtitan.checkpoint import folders
from torchtitan.checkpoint.folders import REMOVED, TEMPORARY
from torchtitan.checkpoint.manifest import Record

SPARE = 2**20  # settings, index, model card


def check_output(folder: Path, overwrite: bool) -> None:
    """Puts back what an interrupted `--overwrite` had moved away.

    Raises:
        ValueError: where the folder holds anything and may not be overwritten.
    """
    removed = folder.with_name(folder.name + REMOVED)
    if removed.exists() and not folder.exists():
        removed.rename(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; --output_dir names a folder to be made")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder} is not empty; take another --output_dir, or replace it with --overwrite")


@contextmanager
def whole_folder(folder: Path, record: Record, nbytes: int, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `folder`, which becomes `folder` when the block has ended without an error.


    What was there before is replaced only then. Leftovers of an interrupted run are removed first.

    Raises:
        ValueError: as `check_output`; where the disk has less than `nbytes` left; where another process writes there.
    """
    check_output(folder, overwrite)
    temporary = folder.with_name(folder.name + TEMPORARY)
    temporary.mkdir(parents=True, exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another conversion is writing to {temporary}") from None
        for left_over in temporary.iterdir():
            left_over.unlink()
        try:
            check_space(temporary, nbytes)
            yield temporary
            _commit(temporary, folder, record)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        os.close(lock)


def check_space(folder: Path, nbytes: int) -> None:
    """Raises ValueError where the folder's disk has no room for that many bytes."""
    free = shutil.disk_usage(folder).free
    if free < nbytes + SPARE:
        raise ValueError(f"{folder.parent} has no room for the output: {nbytes + SPARE:,} bytes needed, {free:,} free")


def _commit(temporary: Path, folder: Path, record: Record) -> None:
    for path in temporary.iterdir():
        # Only now: while one file is written, the system writes those before it to disk.
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    removed = folder.with_name(folder.name + REMOVED)
    if folder.exists():
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
    folders.commit(temporary, folder, record)
    shutil.rmtree(removed, ignore_errors=True)
