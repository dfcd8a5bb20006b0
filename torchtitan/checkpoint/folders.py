"""How checkpoints lie on disk: `step-N/`, each with DCP's files and a manifest.

A checkpoint is written to a temporary folder, which is renamed when everything in it is on disk: only then does the
step exist. What has the name of a step and no valid manifest is damaged, and counts nowhere.
"""

import re
import shutil
from itertools import count
from pathlib import Path

from torchtitan.checkpoint.manifest import (
    DamagedCheckpointError,
    OtherFormatError,
    Record,
    read_manifest,
    sync_folder,
    write_manifest,
)
from torchtitan.logging import logger

TEMPORARY, REMOVED = ".tmp", ".removed"


def step_folder(root: Path, step: int) -> Path:
    """The folder of a step."""
    return root / f"step-{step}"


def named_steps(root: Path) -> list[int]:
    """The steps whose folders are there, oldest first, damaged ones included."""
    folders = root.iterdir() if root.is_dir() else ()
    names = (re.fullmatch(r"step-(0|[1-9]\d*)", folder.name) for folder in folders)
    return sorted(int(name[1]) for name in names if name)


def complete_steps(root: Path) -> list[int]:
    """The steps with a valid manifest, and files of the sizes that it lists, oldest first."""
    return [step for step in named_steps(root) if is_complete(step_folder(root, step))]


def damaged_steps(root: Path) -> list[str]:
    """The names of the folders that were set aside as damaged."""
    return sorted(folder.name for folder in root.glob("step-*.damaged-*"))


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a checkpoint with a valid manifest, and files of the sizes that it lists."""
    try:
        read_manifest(folder)
    except (DamagedCheckpointError, OtherFormatError):
        return False
    return True


def tidy(root: Path) -> None:
    """Removes what interrupted saves and removals have left behind."""
    for left_over in root.iterdir() if root.is_dir() else ():
        if re.fullmatch(rf"step-\d+({TEMPORARY}|{REMOVED})", left_over.name):
            shutil.rmtree(left_over, ignore_errors=True)


def begin(folder: Path) -> Path | None:
    """An empty temporary folder beside `folder`, to be filled and given to `commit`; None where `folder` exists."""
    if folder.exists():
        logger.warning(f"{folder} exists already and is left as it is")
        return None
    temporary = folder.with_name(folder.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, folder: Path, record: Record) -> None:
    """Adds the manifest and gives the folder its name: from here on the checkpoint exists."""
    write_manifest(temporary, record)
    temporary.rename(folder)
    sync_folder(folder.parent)


def keep_latest(root: Path, number: int) -> None:
    """Removes all but the `number` newest complete steps; 0 keeps all. What cannot be removed is named and left."""
    for step in complete_steps(root)[:-number] if number else []:
        folder = step_folder(root, step)
        try:
            # Renamed first: a half-removed folder must not look like a checkpoint.
            shutil.rmtree(folder.rename(folder.with_name(folder.name + REMOVED)))
        except OSError as error:
            logger.warning(f"{folder} could not be removed: {error}")


def set_aside(folder: Path, reason: str) -> Path:
    """Renames a step to `step-N.{reason}-1`, or the next number that is free: it makes room, and is not lost."""
    names = (folder.with_name(f"{folder.name}.{reason}-{number}") for number in count(1))
    return folder.rename(next(name for name in names if not name.exists()))


def set_aside_after(root: Path, step: int) -> None:
    """Renames all newer steps: they belong to another continuation than the one that begins at `step`."""
    for newer in (found for found in named_steps(root) if found > step):
        folder = step_folder(root, newer)
        aside = set_aside(folder, "superseded")
        logger.warning(f"{folder} is newer than the step that was asked for; it is now {aside.name}")
