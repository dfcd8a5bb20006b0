"""`python -m torchtitan.checkpoint.verify PATH …`: are these checkpoints as they were written?

A PATH is a step, a folder of steps, or a run's dump folder. Every byte is read and compared with its checksum; `--size`
compares the sizes of the files alone. Exit status 0: all are good; 1: something is damaged; 2: a PATH has none.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from tabulate import tabulate

from torchtitan.checkpoint import folders
from torchtitan.checkpoint.manifest import RECORD, DamagedCheckpointError, OtherFormatError, check_file, read_manifest
from torchtitan.flags import FlagParser

THREADS = 8
"""Files that are read at once."""


def damage_of(folder: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, None where nothing is; without `contents` manifest and sizes alone count."""
    try:
        files = read_manifest(folder)["files"]
        if contents:
            with ThreadPoolExecutor(THREADS) as threads:
                for _ in threads.map(lambda name: check_file(folder, name, files[name]), files):
                    pass
    except DamagedCheckpointError as error:
        return error.reason
    except OtherFormatError as error:
        return f"of format {error.format}, which this version cannot read"
    return None


def checkpoints_in(path: Path) -> list[Path]:
    """All checkpoints that the path stands for: itself, or those of its steps and exports, at any depth."""
    if (path / ".metadata").is_file() or (path / RECORD).is_file():
        return [path]
    roots = [path, *sorted(folder for folder in path.rglob("*") if folder.is_dir())]
    steps = [folders.step_folder(root, step) for root in roots for step in folders.named_steps(root)]
    # What was generated with a step stands in a folder of that name, too; of a checkpoint, everything may be lost.
    names = (RECORD, ".metadata", "__0_0.distcp")
    return [step for step in steps if any((step / name).is_file() for name in names) or not any(step.iterdir())]


def main(argv: list[str]) -> int:
    """Prints a table; returns the exit status."""
    parser = FlagParser(prog="torchtitan.checkpoint.verify", description=__doc__)
    parser.add_argument("path", nargs="+", type=Path, help="a step, a folder of steps, or a run's dump folder")
    parser.add_argument("--size", action="store_true", help="compare the sizes of the files alone")
    given = parser.parse(argv)
    found = {path: checkpoints_in(path) for path in given.path}
    without = [str(path) for path, checkpoints in found.items() if not checkpoints]
    rows, damaged = [], 0
    for folder in chain.from_iterable(found.values()):
        started = time.perf_counter()
        reason = damage_of(folder, contents=not given.size)
        elapsed = time.perf_counter() - started
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        rows.append((str(folder), f"{size / 1e9:.3f}", f"{elapsed:.1f}", reason or "good"))
        damaged += reason is not None
    if rows:
        head = ("checkpoint", "GB", "s", "state")
        print(tabulate(rows, headers=head, tablefmt="simple_outline", disable_numparse=True))
    if without:
        print(f"no checkpoint in {', '.join(without)}", file=sys.stderr)
    return 1 if damaged else 2 if without else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
