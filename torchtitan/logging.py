"""The log: one line an event, of rank 0; the other ranks speak up only with warnings."""

import logging
import os

logger = logging.getLogger("torchtitan")


def init_logger() -> None:
    """Sends the log to the standard error stream. Later calls change nothing."""
    if logger.handlers:
        return
    rank = int(os.environ.get("RANK", "0"))
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
