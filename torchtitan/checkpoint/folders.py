"""How checkpoints lie on disk: `step-N/`, each with DCP's files and a record of what it holds.

A checkpoint is written to a temporary folder, which is renamed when everything in it is on disk: a folder that has
the name of a step is complete.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

RECORD = "checkpoint.json"
FORMAT = 1

Record = dict[str, Any]
"""What a checkpoint says of itself: format, kind, step, model shape, data cursor, configuration, versions."""


def step_folder(root: Path, step: int) -> Path:
    """The folder of a step."""
    return root / f"step-{step}"


def complete_steps(root: Path) -> list[int]:
    """The steps that are there, oldest first."""
    if not root.is_dir():
        return []
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in root.iterdir() if is_complete(path))
    return sorted(int(name[1]) for name in names if name)


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a checkpoint of this format."""
    return (folder / RECORD).is_file() and (folder / ".metadata").is_file()


def begin(folder: Path) -> Path:
    """An empty temporary folder beside `folder`, to be filled and given to `commit`."""
    temporary = folder.with_name(f"{folder.name}.tmp")
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


def keep_latest(root: Path, count: int) -> None:
    """Removes all but the `count` newest steps; 0 keeps all."""
    for step in complete_steps(root)[:-count] if count else []:
        # Renamed first: a half-removed folder must not look like a checkpoint.
        removed = root / f"step-{step}.removed"
        step_folder(root, step).rename(removed)
        shutil.rmtree(removed)


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
