"""`train.py` with a fault in it, which the environment variable FAULT describes as `kind:rank:count`.

The fault strikes on that rank when it comes to that place for the `count`-th time:

    write       kill -9 inside a write of a checkpoint's file
    manifest    kill -9 between the manifest and the rename that makes the step exist
    removal     kill -9 in the middle of the removal of an old step
    step        kill -9 at the beginning of a training step
    hang        a training step that never ends
    nan         a loss that is not a number
"""

import math
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Patch = Callable[[], None]


def main() -> None:
    """Plants the fault, if it is this rank's, and becomes train.py."""
    kind, rank, count = os.environ["FAULT"].split(":")
    if os.environ.get("RANK", "0") == rank:
        plant(kind, int(count))
    sys.argv[0] = "train.py"
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def plant(kind: str, count: int) -> None:
    """Replaces one function by one that does the same, but for the fault."""
    from torchtitan import trainer
    from torchtitan.checkpoint import folders
    from torchtitan.checkpoint.writer import ChecksummingStream

    def strikes(place: Callable[..., Any], fault: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        def instead(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            return (fault if calls == count else place)(*arguments, **named)

        return instead

    def half_a_write(stream: ChecksummingStream, data: bytes) -> int:
        stream.file.write(memoryview(data)[: len(data) // 2])
        die()
        return 0

    def half_a_removal(folder: Path, **_: Any) -> None:
        next(Path(folder).iterdir()).unlink()
        die()

    def after_the_manifest(*arguments: Any) -> None:
        write_manifest(*arguments)
        die()

    def not_a_number(logits: Any, labels: Any) -> Any:
        return losses(logits, labels) * math.nan

    write_manifest, losses = folders.write_manifest, trainer.token_losses
    if kind == "write":
        ChecksummingStream.write = strikes(ChecksummingStream.write, half_a_write)  # type: ignore[method-assign]
    elif kind == "manifest":
        folders.write_manifest = strikes(write_manifest, after_the_manifest)
    elif kind == "removal":
        of_a_step, of_anything = strikes(shutil.rmtree, half_a_removal), shutil.rmtree

        def remove(folder: Path, **named: Any) -> None:
            (of_a_step if folder.name.endswith(folders.REMOVED) else of_anything)(folder, **named)

        folders.shutil.rmtree = remove  # type: ignore[assignment]
    elif kind == "nan":
        trainer.token_losses = strikes(losses, not_a_number)
    else:
        step = trainer.Trainer.train_step
        fault = {"step": lambda *_: die(), "hang": lambda *_: time.sleep(10_000)}[kind]
        trainer.Trainer.train_step = strikes(step, fault)  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
