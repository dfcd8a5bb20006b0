"""Saves the training state every so often, and finds it again."""

from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from torchtitan import __version__
from torchtitan.checkpoint import folders
from torchtitan.checkpoint.folders import Record
from torchtitan.checkpoint.state import (
    Tensors,
    mismatches,
    model_tensors,
    optimizer_tensors,
    raise_mismatches,
    random_state,
    set_random_state,
    stored_tensors,
)
from torchtitan.config.schema import JobConfig
from torchtitan.distributed.world import from_rank_zero
from torchtitan.logging import logger
from torchtitan.models.llama.model import Transformer


class Checkpointer:
    """The checkpoints of one run. All its methods but `poll` are collective: every rank calls them."""

    def __init__(self, config: JobConfig, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        self.config = config.checkpoint
        self.root = Path(config.job.dump_folder) / config.checkpoint.folder
        self.model, self.optimizer = model, optimizer
        self.about: Record = {
            "model": asdict(model.shape),
            "config": config.model_dump(),
            "versions": {"torchtitan": __version__, "torch": torch.__version__},
        }
        # A save in the background needs a group to itself: its collectives must not mix with the step's.
        self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self.pending: tuple[Future[Any], Path, Record] | None = None
        # The writer also holds the copy in host memory that a background save writes from, pinned if it is kept.
        pinned = self.config.async_mode == "async_with_pinned_mem" and torch.cuda.is_available()
        self.writer = FileSystemWriter(self.root, cache_staged_state_dict=pinned)

    def save(self, step: int, data: dict[str, Any]) -> None:
        """Saves everything that going on from this step needs; `data` is the data cursor and what it belongs to.

        In the asynchronous modes the files are written behind the caller's back; the save before is awaited first.
        """
        self.wait()
        folder = folders.step_folder(self.root, step)
        if from_rank_zero(folder.exists):
            logger.warning(f"{folder} exists already and is left as it is")
            return
        temporary = from_rank_zero(lambda: folders.begin(folder))
        record = {"kind": "training", "step": step, "data": data, **self.about}
        state = model_tensors(self.model) | optimizer_tensors(self.model, self.optimizer) | random_state()
        if self.config.async_mode == "disabled":
            dcp.save(state, checkpoint_id=temporary, storage_writer=self.writer, process_group=self.group)
            from_rank_zero(lambda: self._commit(folder, record))
        else:
            saving = dcp.async_save(
                state, checkpoint_id=temporary, storage_writer=self.writer, process_group=self.group
            )
            self.pending = cast(Future[Any], saving), folder, record

    def poll(self) -> None:
        """Commits a background save that has come to its end; raises what went wrong in it."""
        if self.pending is not None and self.pending[0].done():
            saving, folder, record = self.pending
            self.pending = None
            saving.result()
            if dist.get_rank() == 0:
                self._commit(folder, record)

    def wait(self) -> None:
        """Waits for the save in the background, if there is one."""
        if self.pending is not None:
            self.pending[0].result()
        self.poll()
        dist.barrier(group=self.group)

    def _commit(self, folder: Path, record: Record) -> None:
        folders.commit(folder.with_name(f"{folder.name}.tmp"), folder, record)
        folders.keep_latest(self.root, self.config.keep_latest_k)
        logger.info(f"checkpoint {folder} is complete")

    def resume(self) -> Record | None:
        """Loads the newest step, or the one of `checkpoint.load_step`, and returns its record; None if there is none.

        Raises:
            ValueError: where that step is not there, or is of another model.
        """
        steps = from_rank_zero(lambda: folders.complete_steps(self.root))
        wanted = self.config.load_step
        if wanted != -1 and wanted not in steps:
            found = f"there are {', '.join(map(str, steps))}" if steps else "there is no checkpoint at all"
            raise ValueError(f"checkpoint.load_step = {wanted}: no complete checkpoint of it in {self.root}; {found}")
        if not steps:
            return None
        folder = folders.step_folder(self.root, steps[-1] if wanted == -1 else wanted)
        record = from_rank_zero(lambda: folders.read_record(folder))
        assert record is not None
        raise_mismatches(folder, self.model.shape.differences(record["model"]))

        stored = from_rank_zero(lambda: stored_tensors(folder))
        state = model_tensors(self.model) | optimizer_tensors(self.model, self.optimizer)
        training_stored = {name: entry for name, entry in stored.items() if not name.startswith("random.")}
        raise_mismatches(folder, mismatches(state, training_stored))
        # On more ranks than it was saved on, the new ones keep the random state they have.
        random = {name: value for name, value in random_state().items() if name in stored}
        dcp.load(state | random, storage_reader=FileSystemReader(folder), process_group=self.group)
        set_random_state(random)
        logger.info(f"resuming from {folder}")
        return record

    def export(self, step: int, dtype: torch.dtype) -> None:
        """Writes the weights alone, in this precision, to `export/step-N`. An existing export is left as it is."""
        folder = folders.step_folder(self.root / "export", step)
        if from_rank_zero(folder.exists):
            logger.warning(f"{folder} exists already and is left as it is")
            return
        temporary = from_rank_zero(lambda: folders.begin(folder))
        weights: Tensors = {name: tensor.to(dtype) for name, tensor in model_tensors(self.model).items()}
        dcp.save(weights, storage_writer=FileSystemWriter(temporary), process_group=self.group)
        record = {"kind": "weights", "step": step, **self.about}
        from_rank_zero(lambda: folders.commit(temporary, folder, record))
        logger.info(f"weights exported to {folder}")
