"""How the ranks divide the model and the batch among them. Imports no torch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from torchtitan.config.schema import JobConfig, Training


@dataclass(frozen=True)
class Degrees:
    """The division of a run over its ranks.

    Attributes:
        replicate: groups of ranks that hold a whole copy of the model each (HSDP); 1 for FSDP.
        shard: ranks that a copy is sharded over.
        global_batch_size: sequences an optimizer step, over all ranks.
        accumulation_steps: forward passes an optimizer step.
    """

    replicate: int
    shard: int
    global_batch_size: int
    accumulation_steps: int

    @classmethod
    def of(cls, training: Training, num_ranks: int) -> "Degrees":
        """The configured degrees, with what is left to be chosen chosen."""
        replicate, shard = training.data_parallel_replicate_degree, training.data_parallel_shard_degree
        at_once = training.batch_size * num_ranks
        batch = at_once if training.global_batch_size == -1 else training.global_batch_size
        return cls(replicate, max(1, num_ranks // replicate) if shard == -1 else shard, batch, batch // at_once)


def check_degrees(config: JobConfig, num_ranks: int | None = None) -> Iterator[tuple[str, str]]:
    """Degrees that do not fit a number of processes, by default torchrun's: a check for `load_config`."""
    training = config.training
    if num_ranks is None:
        num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    degrees = Degrees.of(training, num_ranks)
    if degrees.replicate * degrees.shard != num_ranks:
        yield (
            "training.data_parallel_shard_degree",
            f"{degrees.shard} times training.data_parallel_replicate_degree = {degrees.replicate} is "
            f"{degrees.replicate * degrees.shard}, but the run has {num_ranks} processes",
        )
    if degrees.global_batch_size % (training.batch_size * num_ranks):
        yield (
            "training.global_batch_size",
            f"{degrees.global_batch_size} is not a multiple of {training.batch_size * num_ranks}: "
            f"training.batch_size = {training.batch_size} on each of {num_ranks} processes",
        )
