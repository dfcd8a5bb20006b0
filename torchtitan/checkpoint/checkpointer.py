"""Saves the training state every so often, and finds it again."""

from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from torchtitan import __version__
from torchtitan.checkpoint import folders
from torchtitan.checkpoint.folders import Record
from torchtitan.checkpoint.state import (
    Tensors,
    load_tensors,
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


@dataclass(frozen=True)
class Found:
    """A checkpoint that a run can go on from."""

    folder: Path
    record: Record


@dataclass(frozen=True)
class Pending:
    """A save in the background: what is awaited, and what has to be committed then."""

    saving: Future[Any]
    temporary: Path
    folder: Path
    record: Record


class Checkpointer:
    """The checkpoints of one run. All its methods but `poll` are collective: every rank calls them."""

    def __init__(self, config: JobConfig, model: Transformer) -> None:
        self.config = config.checkpoint
        self.root = Path(config.job.dump_folder) / config.checkpoint.folder
        self.model = model
        self.description: Record = {
            "model": asdict(model.shape),
            "config": config.model_dump(),
            "versions": {"torchtitan": __version__, "torch": torch.__version__},
        }
        # A save in the background needs a group to itself: its collectives must not mix with the step's. Its time
        # limit is that of the slowest disk.
        timeout = timedelta(seconds=config.comm.save_timeout_seconds)
        self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
        # The writer also holds the copy in host memory that a background save writes from, pinned if it is kept.
        pinned = self.config.async_mode == "async_with_pinned_mem" and torch.cuda.is_available()
        self.writer = FileSystemWriter(self.root, cache_staged_state_dict=pinned)
        self.pending: Pending | None = None

    def find(self) -> Found | None:
        """The newest step, or the one of `checkpoint.load_step`, of a model of this shape; None if there is none.

        Raises:
            ValueError: where that step is not there or is of another model, or what lies there is no checkpoint of
                this program.
        """
        steps = from_rank_zero(lambda: folders.tidy(self.root), self.group)
        wanted = self.config.load_step
        found = self._read(steps[-1]) if steps else None
        # What was written under the same load_step is this run's own: the command is repeated, and the step that it
        # names may have been removed since.
        own = found is not None and found.record["config"]["checkpoint"]["load_step"] == wanted
        if wanted != -1 and not own:
            if wanted not in steps:
                there = f"there are {', '.join(map(str, steps))}" if steps else "there is no checkpoint at all"
                raise ValueError(
                    f"checkpoint.load_step = {wanted}: no complete checkpoint of it in {self.root}; {there}"
                )
            found = self._read(wanted)
        if found is not None:
            raise_mismatches(found.folder, self.model.shape.differences(found.record["model"]))
        return found

    def _read(self, step: int) -> Found:
        folder = folders.step_folder(self.root, step)
        record = from_rank_zero(lambda: folders.read_record(folder), self.group)
        if record is None or record.get("kind") != "training":
            raise ValueError(f"{folder} does not hold a training state; start from its weights: checkpoint.init_from")
        return Found(folder, record)

    def load(self, found: Found, optimizer: torch.optim.Optimizer) -> None:
        """Loads that checkpoint into the model, the optimizer and the random generators.

        Where an older step was asked for, the newer ones are renamed: the run that goes on from here writes its own.

        Raises:
            ValueError: listing every tensor that is missing, unexpected, of another shape or dtype.
        """
        stored = from_rank_zero(lambda: stored_tensors(found.folder), self.group)
        state = model_tensors(self.model) | optimizer_tensors(self.model, optimizer)
        training_stored = {name: entry for name, entry in stored.items() if not name.startswith("random.")}
        raise_mismatches(found.folder, mismatches(state, training_stored))
        # On more ranks than it was saved on, the new ones keep the random state they have.
        random = {name: value for name, value in random_state().items() if name in stored}
        load_tensors(state | random, found.folder, self.group)
        set_random_state(random)
        from_rank_zero(lambda: folders.set_aside_after(self.root, found.record["step"]), self.group)
        logger.info(f"resuming from {found.folder}")

    def save(self, step: int, data: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Saves everything that going on from this step needs; `data` is the data cursor and what it belongs to.

        In the asynchronous modes the files are written behind the caller's back; the save before is awaited first.
        A step that exists is left as it is.
        """
        self.wait()
        folder = folders.step_folder(self.root, step)
        temporary = from_rank_zero(lambda: folders.begin(folder), self.group)
        if temporary is None:
            return
        record = {"kind": "training", "step": step, "data": data, **self.description}
        state = model_tensors(self.model) | optimizer_tensors(self.model, optimizer) | random_state()
        if self.config.async_mode == "disabled":
            dcp.save(state, checkpoint_id=temporary, storage_writer=self.writer, process_group=self.group)
            from_rank_zero(lambda: self._commit(temporary, folder, record), self.group)
        else:
            saving = dcp.async_save(
                state, checkpoint_id=temporary, storage_writer=self.writer, process_group=self.group
            )
            self.pending = Pending(cast(Future[Any], saving), temporary, folder, record)

    def poll(self) -> None:
        """Commits a background save that has come to its end; raises what went wrong in it."""
        pending = self.pending
        if pending is not None and pending.saving.done():
            self.pending = None
            pending.saving.result()
            if dist.get_rank() == 0:
                self._commit(pending.temporary, pending.folder, pending.record)

    def wait(self) -> None:
        """Waits for the save in the background, if there is one, and commits it."""
        if self.pending is not None:
            self.pending.saving.result()
        self.poll()
        dist.barrier(group=self.group)

    def export(self, step: int) -> None:
        """Writes the weights alone to `export/step-N`, in `checkpoint.export_dtype`, unless it exists."""
        self.wait()
        folder = folders.step_folder(self.root / "export", step)
        temporary = from_rank_zero(lambda: folders.begin(folder), self.group)
        if temporary is None:
            return
        dtype = getattr(torch, self.config.export_dtype)
        weights: Tensors = {name: tensor.to(dtype) for name, tensor in model_tensors(self.model).items()}
        dcp.save(weights, storage_writer=FileSystemWriter(temporary), process_group=self.group)
        record = {"kind": "weights", "step": step, **self.description}
        from_rank_zero(lambda: folders.commit(temporary, folder, record), self.group)
        logger.info(f"weights exported to {folder}")

    def _commit(self, temporary: Path, folder: Path, record: Record) -> None:
        folders.commit(temporary, folder, record)
        logger.info(f"checkpoint {folder} is complete")
        folders.keep_latest(self.root, self.config.keep_latest_k)
