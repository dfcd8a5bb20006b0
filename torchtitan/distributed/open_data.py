"""The recordings of a split, opened on all ranks, and an index of them that is the same on all."""

from torchtitan.config.schema import Training
from torchtitan.data.index import RecordingIndex, check_index, load_index
from torchtitan.data.recordings import Recordings, open_recordings
from torchtitan.distributed.world import World, first_on_each_node, from_rank_zero
from torchtitan.logging import logger


def open_split(
    training: Training, world: World, split: str | None = None, named: str = "training.split"
) -> tuple[Recordings, RecordingIndex]:
    """The configured recordings, of `split` (by the setting `named`) or of `training.split`.

    Raises:
        ValueError: where they cannot be used, or differ between nodes.
    """
    logger.info(f"opening {training.dataset_path or training.dataset}")
    with first_on_each_node(world):
        recordings = open_recordings(training, split, named)
    index = from_rank_zero(lambda: load_index(recordings, training.malformed_rows))
    if world.local_rank == 0 and world.rank != 0:
        check_index(recordings, index)
    return recordings, index
