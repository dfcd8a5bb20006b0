"""Pictures for TensorBoard."""

import time
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] - made by protobuf at import
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from torchtitan.plots.style import to_png


def to_tensorboard(folder: Path, figures: Mapping[str, Figure], step: int) -> None:
    """Adds figures to the images of TensorBoard, by their names, as the same PNGs that `style.save` writes.

    Args:
        folder: of event files. Not one that a run still writes to: of the files of one folder TensorBoard follows
            only the newest, and would not see what the run adds. A folder inside that one is shown beside it.
        figures: by name; what stands before a slash names a group.
        step: of the checkpoint that they are about.
    """
    writer = EventFileWriter(str(folder))
    images = []
    for name, figure in figures.items():
        width, height = (round(inches * figure.dpi) for inches in figure.get_size_inches())
        image = Summary.Image(encoded_image_string=to_png(figure), width=width, height=height, colorspace=4)
        images.append(Summary.Value(tag=name, image=image))
    writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=images)))
    writer.close()
