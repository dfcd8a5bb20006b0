"""How a run ended, for the script that started it: `{job.dump_folder}/outcome.json`. Imports no torch.

torchrun turns every way of ending under a signal into exit status 1, so the run states it in a file.
`python -m torchtitan.outcome --job.config_file FILE …` prints what scripts/launch.sh decides by: the outcome, the
newest step that a run would go on from, and the dump folder.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from torchtitan.config import ConfigError, JobConfig, load_config

OUTCOME = "outcome.json"
State = Literal["finished", "go_on", "broken"]


def this_job() -> str:
    """What tells this start of the run from all others: launch.sh sets it."""
    return os.environ.get("RUN_ID", "")


def write_outcome(dump_folder: Path, state: State, step: int) -> None:
    """States the outcome; by a rename, so that there is always a whole file."""
    content = {"outcome": state, "step": step, "job": this_job(), "time": time.time()}
    temporary = dump_folder / f"{OUTCOME}.tmp"
    temporary.write_text(json.dumps(content) + "\n")
    temporary.replace(dump_folder / OUTCOME)


def clear_outcome(dump_folder: Path) -> None:
    """Takes back what an earlier start has stated."""
    with suppress(FileNotFoundError):
        (dump_folder / OUTCOME).unlink()


def read_outcome(dump_folder: Path, job: str) -> State:
    """The outcome of that job; "broken" where it has stated none."""
    try:
        stated = json.loads((dump_folder / OUTCOME).read_text())
        return stated["outcome"] if stated["job"] == job else "broken"
    except (OSError, ValueError, KeyError, TypeError):
        return "broken"


def newest_step(config: JobConfig) -> int:
    """The newest checkpointed step of the run, 0 where there is none."""
    from torchtitan.checkpoint.folders import complete_steps

    return max(complete_steps(Path(config.job.dump_folder) / config.checkpoint.folder), default=0)


def main(argv: list[str]) -> None:
    """Prints outcome, newest step and dump folder of the run that these arguments of train.py describe."""
    config = load_config(argv)
    dump_folder = Path(config.job.dump_folder)
    print(read_outcome(dump_folder, this_job()), newest_step(config), dump_folder)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
