"""How checkpoints lie on disk: `step-N/`, each with DCP's files and a record of what it holds.

A checkpoint is written to a temporary folder, which is renamed when everything in it is on disk: a folder that has
the name of a step is complete.
"""

import json
import os
import re
import shutil
from itertools import count
from pathlib import Path
from typing import Any

from torchtitan.logging import logger

RECORD = "checkpoint.json"
FORMAT = 1
TEMPORARY, REMOVED, SET_ASIDE = ".tmp", ".removed", ".superseded"

Record = dict[str, Any]
"""What a checkpoint says of itself: format, kind, step, model shape, data cursor, configuration, versions."""


def step_folder(root: Path, step: int) -> Path:
    """The folder of a step."""
    return root / f"step-{step}"


def complete_steps(root: Path) -> list[int]:
    """The steps that are there, oldest first."""
    return sorted(step for step, folder in _step_folders(root) if is_complete(folder))


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a checkpoint of this format."""
    return (folder / RECORD).is_file() and (folder / ".metadata").is_file()


def tidy(root: Path) -> list[int]:
    """Removes what interrupted saves and removals have left behind; returns the complete steps, oldest first.

    Raises:
        ValueError: where a folder has the name of a step, but is not a checkpoint of this format: it would be in the
            way of that step.
    """
    if root.is_dir():
        for left_over in root.iterdir():
            if re.fullmatch(rf"step-\d+({TEMPORARY}|{REMOVED})", left_over.name):
                shutil.rmtree(left_over, ignore_errors=True)
    for _, folder in _step_folders(root):
        if not is_complete(folder):
            raise ValueError(
                f"{folder} is not a checkpoint of this program: it lacks .metadata or {RECORD}. Move it away, "
                "or start from its weights with checkpoint.init_from in another dump folder"
            )
    return complete_steps(root)


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
    """Adds the record and gives the folder its name: from here on the checkpoint exists."""
    with open(temporary / RECORD, "w") as file:
        json.dump({"format": FORMAT, **record}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_latest(root: Path, number: int) -> None:
    """Removes all but the `number` newest steps; 0 keeps all. What cannot be removed is named and left."""
    for step in complete_steps(root)[:-number] if number else []:
        folder = step_folder(root, step)
        try:
            # Renamed first: a half-removed folder must not look like a checkpoint.
            shutil.rmtree(folder.rename(folder.with_name(folder.name + REMOVED)))
        except OSError as error:
            logger.warning(f"{folder} could not be removed: {error}")


def set_aside_after(root: Path, step: int) -> None:
    """Renames all newer steps: they belong to another continuation than the one that begins at `step`."""
    for newer in (found for found in complete_steps(root) if found > step):
        folder = step_folder(root, newer)
        names = (folder.with_name(f"{folder.name}{SET_ASIDE}-{number}") for number in count(1))
        aside = folder.rename(next(name for name in names if not name.exists()))
        logger.warning(f"{folder} is newer than the step that was asked for; it is now {aside.name}")


def read_record(folder: Path) -> Record | None:
    """What the checkpoint says of itself; None where it says nothing, as other programs' checkpoints.

    Raises:
        ValueError: where the record cannot be read or is of another format.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is not a record of format {FORMAT}")
    return record


def _step_folders(root: Path) -> list[tuple[int, Path]]:
    folders = root.iterdir() if root.is_dir() else ()
    named = ((re.fullmatch(r"step-(0|[1-9]\d*)", folder.name), folder) for folder in folders)
    return [(int(name[1]), folder) for name, folder in named if name]
