"""Saves the training state every so often, and finds it again."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan import __version__
from torchtitan.checkpoint import folders
from torchtitan.checkpoint.init_from import files_to_verify
from torchtitan.checkpoint.manifest import DamagedCheckpointError, Files, Record, read_manifest
from torchtitan.checkpoint.staging import KeptStager
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
from torchtitan.checkpoint.writer import CheckedWriter
from torchtitan.config.schema import JobConfig
from torchtitan.distributed.world import from_rank_zero
from torchtitan.logging import logger
from torchtitan.models.llama.model import Transformer


class SaveError(RuntimeError):
    """A checkpoint could not be written; all ranks raise it."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that a run can go on from."""

    folder: Path
    record: Record


@dataclass(frozen=True)
class Pending:
    """A save in the background: what is awaited, and where it goes to."""

    saving: Future[Any]
    folder: Path


class Checkpointer:
    """The checkpoints of one run. All its methods but `failed` are collective: every rank calls them.

    Attributes:
        save_seconds: the longest that a save of this process has taken until it was committed.
    """

    def __init__(self, config: JobConfig, model: Transformer, check_owner: Callable[[], None] = lambda: None) -> None:
        """`check_owner` raises on rank 0 where the folder is another run's by now: then nothing is changed there."""
        self.config, self.check_owner = config.checkpoint, check_owner
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
        pinned = self.config.async_mode == "async_with_pinned_mem" and torch.cuda.is_available()
        self.stager = KeptStager(pinned=pinned)
        self.pending: Pending | None = None
        self.save_seconds = 0.0

    def check_space(self) -> None:
        """On one rank: raises ValueError where the disk has no room for two checkpoints, those there are counted."""
        # Weights and AdamW's two moments, float32; the rest is small.
        size = 3 * 4 * sum(parameter.numel() for parameter in self.model.parameters())
        needed = max(1, 2 - len(folders.complete_steps(self.root))) * size
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise ValueError(
                f"{self.root}: {needed:,} bytes are needed for checkpoints of {size:,} bytes each, one of which is "
                f"kept while the next is written, and {free:,} are free; make room, or choose another job.dump_folder"
            )

    def find(self) -> Found | None:
        """The newest step, or the one of `checkpoint.load_step`, of a model of this shape; None if there is none.

        Raises:
            DamagedCheckpointError: where that step has no valid manifest or lacks files. With `checkpoint.fall_back`
                it is set aside, and the step before it taken.
            ValueError: where that step is not there or is of another model, or holds no training state.
        """
        from_rank_zero(lambda: folders.tidy(self.root), self.group)
        wanted = self.config.load_step
        # What was written under the same load_step is this run's own: the command is repeated, and the step that it
        # names may have been removed since.
        if wanted == -1 or from_rank_zero(lambda: self._wrote_newest(load_step=wanted), self.group):
            found = self._newest()
        else:
            steps = from_rank_zero(lambda: folders.named_steps(self.root), self.group)
            if wanted not in steps:
                there = f"there are {', '.join(map(str, steps))}" if steps else "there is no checkpoint at all"
                raise ValueError(
                    f"checkpoint.load_step = {wanted}: no complete checkpoint of it in {self.root}; {there}"
                )
            found = self._read(wanted)
        if found is not None:
            raise_mismatches(found.folder, self.model.shape.differences(found.record["model"]))
        return found

    def _wrote_newest(self, load_step: int) -> bool:
        """On one rank: whether a run with that `checkpoint.load_step` wrote the newest undamaged step."""
        steps = folders.complete_steps(self.root)
        if not steps:
            return False
        record = read_manifest(folders.step_folder(self.root, steps[-1]))
        return record["kind"] == "training" and record["config"]["checkpoint"]["load_step"] == load_step

    def _newest(self) -> Found | None:
        steps = from_rank_zero(lambda: folders.named_steps(self.root), self.group)
        damaged = None
        for step in reversed(steps):
            try:
                return self._read(step)
            except DamagedCheckpointError as error:
                self._fall_back(error)
                damaged = error
        if damaged is not None:  # a run that was under way must not begin anew because of it
            raise ValueError(f"no step in {self.root} is undamaged; the oldest one: {damaged}") from damaged
        aside = from_rank_zero(lambda: folders.damaged_steps(self.root), self.group)
        if aside and not steps:  # nor where it is started once more
            raise ValueError(
                f"no step in {self.root} is undamaged: {', '.join(aside)} may still be mended; to begin anew, choose "
                "another job.dump_folder, or remove them"
            )
        return None

    def _read(self, step: int) -> Found:
        folder = folders.step_folder(self.root, step)
        record = from_rank_zero(lambda: read_manifest(folder), self.group)
        if record["kind"] != "training":
            raise ValueError(f"{folder} does not hold a training state; start from its weights: checkpoint.init_from")
        return Found(folder, record)

    def _fall_back(self, error: DamagedCheckpointError) -> None:
        """Sets the damaged step aside where the configuration allows it; raises the error where it does not."""
        if not self.config.fall_back:
            raise DamagedCheckpointError(
                error.folder,
                f"{error.reason}. checkpoint.fall_back = true sets it aside and takes the step before it; if another "
                "program wrote it, start from its weights with checkpoint.init_from in another dump folder",
            ) from error
        aside = from_rank_zero(lambda: folders.set_aside(error.folder, "damaged"), self.group)
        logger.warning(f"{error}; it is now {aside.name}, and the step before it is taken")

    def load(self, found: Found, optimizer: torch.optim.Optimizer) -> Found:
        """Loads that checkpoint into the model, the optimizer and the random generators; returns what was loaded.

        That is another one where the files turn out to be damaged and `checkpoint.fall_back` allows it. Where an older
        step was asked for, the newer ones are renamed: the run that goes on from here writes its own.

        Raises:
            DamagedCheckpointError: where a file is not as it was written.
            ValueError: listing every tensor that is missing, unexpected, of another shape or dtype.
        """
        try:
            self._load(found, optimizer)
        except DamagedCheckpointError as error:
            self._fall_back(error)
            before = self.find()
            if before is None:
                raise ValueError(f"there is no step before it: {error}") from error
            return self.load(before, optimizer)
        from_rank_zero(lambda: folders.set_aside_after(self.root, found.record["step"]), self.group)
        logger.info(f"resuming from {found.folder}")
        return found

    def _load(self, found: Found, optimizer: torch.optim.Optimizer) -> None:
        files = files_to_verify(found.record, self.config)
        stored = from_rank_zero(lambda: stored_tensors(found.folder, files), self.group)
        state = model_tensors(self.model) | optimizer_tensors(self.model, optimizer)
        training_stored = {name: entry for name, entry in stored.items() if not name.startswith("random.")}
        raise_mismatches(found.folder, mismatches(state, training_stored))
        # On more ranks than it was saved on, the new ones keep the random state they have.
        random = {name: value for name, value in random_state().items() if name in stored}
        load_tensors(state | random, found.folder, self.group, files)
        set_random_state(random)

    def save(self, step: int, data: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Saves everything that going on from this step needs; `data` is the data cursor and what it belongs to.

        In the asynchronous modes the files are written behind the caller's back; the save before is awaited first.
        A step that exists is left as it is.

        Raises:
            SaveError: see `wait`.
        """
        record = {"kind": "training", "step": step, "data": data, **self.description}
        state = model_tensors(self.model) | optimizer_tensors(self.model, optimizer) | random_state()
        self._write(state, folders.step_folder(self.root, step), record, self.config.async_mode != "disabled")

    def export(self, step: int, data: dict[str, Any]) -> None:
        """Writes the weights alone to `export/step-N`, in `checkpoint.export_dtype`, unless it exists.

        `data` tells what they were trained on, as in `save`.
        """
        dtype = getattr(torch, self.config.export_dtype)
        weights: Tensors = {name: tensor.to(dtype) for name, tensor in model_tensors(self.model).items()}
        record = {"kind": "weights", "step": step, "data": data, **self.description}
        self._write(weights, self._export_folder(step), record, in_background=False)

    def _write(self, state: Tensors, folder: Path, record: Record, in_background: bool) -> None:
        self.wait()
        started = time.monotonic()
        temporary = self._temporary(folder)
        if temporary is None:
            return

        def commit(files: Files) -> None:
            """On rank 0, in the background too; what it raises all ranks raise."""
            self.check_owner()  # it may have been thought dead while it wrote
            folders.commit(temporary, folder, {**record, "files": files})
            logger.info(f"checkpoint {folder} is complete")
            folders.keep_latest(self.root, self.config.keep_latest_k)

        def note_time(_: Future[Any]) -> None:
            self.save_seconds = max(self.save_seconds, time.monotonic() - started)

        writer = CheckedWriter(temporary, commit)
        if in_background:
            saving = dcp.async_save(state, storage_writer=writer, async_stager=self.stager, process_group=self.group)
            saving = cast(Future[Any], saving)
        else:
            saving = Future[Any]()
            try:
                saving.set_result(dcp.save(state, storage_writer=writer, process_group=self.group))
            except (Exception, CheckpointException) as error:
                saving.set_exception(error)
        saving.add_done_callback(note_time)
        self.pending = Pending(saving, folder)
        if not in_background:
            self.wait()

    def _temporary(self, folder: Path) -> Path | None:
        try:
            return from_rank_zero(lambda: folders.begin(folder), self.group)
        except OSError as error:
            self._report_failure(folder, error)
            return None

    def failed(self) -> bool:
        """Whether this rank knows that the save in the background has failed; `wait` then deals with it."""
        return self.pending is not None and self.pending.saving.done() and bool(self.pending.saving.exception())

    def wait(self) -> None:
        """Waits for the save in the background, if there is one.

        Raises:
            SaveError: where it has failed, on whichever rank, unless `checkpoint.on_save_error` is "continue".
            FolderInUseError: where it has failed because the folder is another run's now.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.saving.result()
        except (Exception, CheckpointException) as error:  # DCP's is no Exception
            self._report_failure(pending.folder, error)

    def _report_failure(self, folder: Path, error: BaseException) -> None:
        def clean_up() -> None:
            self.check_owner()  # else the temporary folder of that name may be another run's
            shutil.rmtree(folder.with_name(folder.name + folders.TEMPORARY), ignore_errors=True)

        from_rank_zero(clean_up, self.group)
        causes = getattr(error, "failures", {0: (error, None)})  # DCP collects those of all ranks
        reasons = "; ".join(f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in causes.items())
        message = f"checkpoint {folder} could not be written: {reasons}"
        if self.config.on_save_error == "stop":
            raise SaveError(f"{message}; with that mended, the same command goes on from the step before") from error
        logger.error(f"{message}; training goes on (checkpoint.on_save_error)")

    def is_saved(self, step: int) -> bool:
        """Whether the step is there; a save in the background has to be awaited first."""
        return from_rank_zero(lambda: folders.step_folder(self.root, step).is_dir(), self.group)

    def is_exported(self, step: int) -> bool:
        """Whether the step's weights are there alone."""
        return from_rank_zero(lambda: self._export_folder(step).is_dir(), self.group)

    def _export_folder(self, step: int) -> Path:
        return folders.step_folder(self.root / "export", step)
