"""A checkpoint's data and configuration, compared with those that are to go on from it."""

from typing import Any

from torchtitan.checkpoint.manifest import Record
from torchtitan.config import JobConfig
from torchtitan.distributed.degrees import Degrees
from torchtitan.logging import logger


def check_same_data(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises ValueError where a saved data cursor belongs to other data than the current one."""
    differences = [
        f"{key} is {saved.get(key)} there and {current[key]} here"
        for key in ("fingerprint", "split", "seed", "shuffle", "seq_len")
        if saved.get(key) != current[key]
    ]
    if differences:
        raise ValueError(
            "the checkpoint's data cursor belongs to other data: " + "; ".join(differences) + ". "
            "Set it back, or start a new run from the weights with checkpoint.init_from"
        )


def log_changes(record: Record, config: JobConfig, degrees: Degrees) -> None:
    """Names what is other than when the checkpoint was saved: allowed, but worth knowing."""
    saved = record["config"]
    changes = [
        f"{table}.{key} from {saved[table][key]} to {value}"
        for table, values in config.model_dump().items()
        for key, value in values.items()
        if table != "job" and key in saved.get(table, {}) and saved[table][key] != value
    ]
    if changes:
        logger.info(f"changed since the checkpoint: {', '.join(changes)}")
    before, now = record["data"]["global_batch_size"], degrees.global_batch_size
    if before != now:
        logger.warning(
            f"a step takes {now} sequences now and took {before} before: training.global_batch_size = {before} "
            "keeps it on any number of processes"
        )
