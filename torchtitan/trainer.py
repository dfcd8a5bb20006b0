"""The training run: built from a configuration, read from top to bottom."""

import gc
import math
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader

from torchtitan.checkpoint.checkpointer import Checkpointer, Found, SaveError
from torchtitan.checkpoint.init_from import find_weights, load_weights
from torchtitan.config import JobConfig, dump_toml
from torchtitan.data.loader import Batch, RankSampler, build_loader, open_windows
from torchtitan.data.windows import WindowOrder, WindowSource
from torchtitan.distributed.degrees import Degrees
from torchtitan.distributed.interrupts import Interrupts, children_spared
from torchtitan.distributed.open_data import open_split
from torchtitan.distributed.parallelize import build_model, init_weights
from torchtitan.distributed.watchdog import Watchdog
from torchtitan.distributed.world import World, build_mesh, from_rank_zero, report_once, set_timeout
from torchtitan.evaluation.validation import Validation
from torchtitan.flops import FORMULA, peak_flops, training_flops
from torchtitan.health import Health
from torchtitan.logging import logger
from torchtitan.metrics import MetricsWriter, StepMetrics, Stopwatch
from torchtitan.models.llama.attention import Documents
from torchtitan.models.llama.model import token_losses
from torchtitan.optimizer import build_optimizer, learning_rate, set_learning_rate, step_unless
from torchtitan.outcome import State, clear_outcome, write_outcome
from torchtitan.owner import FolderInUseError, Owner, make_writable
from torchtitan.plan.choose import describe as describe_recompute
from torchtitan.plan.resolve import resolve_recompute
from torchtitan.profiling import profiling
from torchtitan.resume import check_same_data, log_changes

GRACE = 30
"""Seconds by which a collective may outlast the watchdog, which leaves more behind than a timeout."""


class Trainer:
    """One training run.

    Building it checks everything that can be wrong before the model takes memory; `train` runs it to its last step.
    """

    def __init__(self, config: JobConfig, world: World) -> None:
        self.config, self.world = config, world
        self.dump_folder = Path(config.job.dump_folder)
        self.owner: Owner | None = None
        from_rank_zero(self._take_dump_folder)
        try:
            self._build(config, world)
        except ValueError:
            if self.owner is not None:
                self.owner.release()  # the next try finds the folder free
            raise

    def _build(self, config: JobConfig, world: World) -> None:
        training = config.training
        self.interrupts = Interrupts()
        logger.info(f"{config.job.description or 'run'}, writing to {self.dump_folder.absolute()}")
        torch.manual_seed(training.seed)
        if training.deterministic:
            # cuBLAS reads this when its first product runs.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

        self.degrees = Degrees.of(training, world.size)
        self.tokens_per_step = self.degrees.global_batch_size * training.seq_len
        self.windows = _open_windows(config, world, self.degrees.global_batch_size)
        self.validation = Validation(config, world) if config.validation.enable else None
        self.mesh = build_mesh(self.degrees, world.device)
        recompute, self.recompute_reason = resolve_recompute(config, self.degrees, world)
        config = self.config = config.model_copy(update={"activation_checkpoint": recompute})
        self.model = build_model(config, self.mesh, world.device)

        # Whatever the run starts from is compared with the model before that takes memory.
        self.step = 0
        self.cursor = 0  # windows that all ranks have trained on: the whole state of the data
        self.checkpointer = Checkpointer(config, self.model, self.check_owner)
        found = self.checkpointer.find() if config.checkpoint.enable_checkpoint else None
        source = find_weights(self.model, config.checkpoint) if config.checkpoint.init_from and not found else None
        if found is not None:
            self.go_on_from(found)
            if config.checkpoint.init_from:
                logger.info("checkpoint.init_from is where this run began: it goes on from its own checkpoint")
        if config.checkpoint.enable_checkpoint and self.step < training.steps:
            from_rank_zero(self.checkpointer.check_space)

        init_weights(self.model, world.device, training.seed)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        health: dict[str, Any] = {}
        if found is not None:
            loaded = self.checkpointer.load(found, self.optimizer)
            if loaded is not found:
                self.go_on_from(loaded)
            log_changes(loaded.record, config, self.degrees)
            health = loaded.record["data"]
        elif source is not None:
            load_weights(self.model, source)
        self.first_step = self.step + 1
        self.health = Health(training, world.device, health.get("recent_norms", []), health.get("skipped_in_a_row", 0))

        self.clipped_counts = 0
        self.longest_step = 0.0
        self.stopwatch = Stopwatch()
        self.peak_flops = peak_flops(torch.cuda.get_device_name()) if world.device.type == "cuda" else None
        self.describe()

    def describe(self) -> None:
        """Logs what was chosen, and why."""
        config, training, mesh, shape = self.config, self.config.training, self.mesh, self.model.shape
        linear = training.mixed_precision_param
        if config.float8.enable_float8_linear:
            linear += f" and float8 ({config.float8.recipe}) linear"
        attention = self.model.attention.describe(self.world.device, document_mask=training.document_mask)
        peak = "unknown" if self.peak_flops is None else f"{self.peak_flops / 1e12:.0f} TFLOP/s"
        degrees = " × ".join(f"{n} {name}" for n, name in zip(mesh.shape, mesh.mesh_dim_names or (), strict=True))
        for line in (
            f"model: {config.model.flavor}, {shape.num_params:,} parameters, "
            + ", ".join(f"{name} {value}" for name, value in asdict(shape).items()),
            f"attention: {attention}",
            f"mesh: {degrees} on {self.world.device.type}; {linear} compute over float32 weights, float32 reduction; "
            f"compile: {training.compile}",
            f"recompute: {describe_recompute(config.activation_checkpoint, shape.n_layers)} ({self.recompute_reason})",
            f"step: {self.degrees.global_batch_size} sequences of {training.seq_len:,} = {self.tokens_per_step:,} "
            f"tokens; {training.batch_size} a rank at once, {self.degrees.accumulation_steps} times",
            f"MFU: {FORMULA}; peak {peak}",
        ):
            logger.info(line)
        if training.warmup_steps >= training.steps:
            logger.warning(
                f"training.warmup_steps = {training.warmup_steps} is not less than training.steps = {training.steps}: "
                "the learning rate never reaches optimizer.lr"
            )

    def go_on_from(self, found: Found) -> None:
        """Takes over a checkpoint's step and data cursor."""
        check_same_data(found.record["data"], self.data_state())
        self.step, self.cursor = found.record["step"], found.record["data"]["cursor"]

    def train(self) -> None:
        """Runs to the last step, to `training.stop_after_step`, or until it is told to stop, saving as configured."""
        config, training = self.config, self.config.training
        self.watchdog = Watchdog(self.dump_folder, self.world.rank, config.comm.init_timeout_seconds)
        last_step = min(training.steps, training.stop_after_step or training.steps)
        if self.step >= last_step:
            asked = "training.steps" if last_step == training.steps else "training.stop_after_step"
            logger.info(f"nothing to do: the newest checkpoint is of step {self.step}, and {asked} = {last_step}")
            self.finish(last_step)
            return
        from_rank_zero(lambda: _write_config(self.dump_folder / "config.toml", config))
        with children_spared():
            batches = iter(self.loader())
        stopping = False
        self.stopwatch.restart()
        with (
            closing(MetricsWriter(config.metrics, self.dump_folder, self.world.rank, self.first_step)) as writer,
            profiling(config, self.world.rank, self.step) as profilers,
            no_garbage_collection(),
        ):
            while self.step < last_step and not stopping:
                self.step += 1
                began = time.monotonic()
                loss, grad_norm = self.train_step(batches)
                self.cursor += self.degrees.global_batch_size
                stopping = self.agree()
                saving = self.is_saved(last_step if not stopping else self.step)
                self.health.learn(all_of_them=saving or self.is_logged(last_step))
                if self.is_logged(last_step):
                    writer.write(self.validated(self.report(float(loss), float(grad_norm))))
                if self.step == self.first_step:
                    # Compilation and the start of the loader are over.
                    set_timeout(self.mesh, config.comm.train_timeout_seconds + GRACE)
                    self.stopwatch.restart()
                else:
                    self.longest_step = max(self.longest_step, time.monotonic() - began)
                if self.step % training.gc_freq == 0:
                    gc.collect()
                if saving:
                    writer.sync()
                    self.save()
                    self.stopwatch.restart()
                self.watchdog.allow(config.comm.train_timeout_seconds)
                for profiler in profilers:
                    profiler.step()
        self.finish(last_step)

    def agree(self) -> bool:
        """Whether all ranks stop after this step; deals with a save in the background that has failed."""
        needed = 2 * (self.longest_step + self.checkpointer.save_seconds)
        stopping, failed = self.interrupts.agree(needed, self.checkpointer.failed())
        if failed:
            self.checkpointer.wait()
        return stopping

    def save(self) -> None:
        """Saves this step, if the folder is still this run's."""
        self.watchdog.allow(self.config.comm.save_timeout_seconds)
        from_rank_zero(self.check_owner)
        health = {"recent_norms": self.health.norms(), "skipped_in_a_row": self.health.in_a_row}
        data = {**self.data_state(), **health}
        self.checkpointer.save(self.step, data, self.optimizer)

    def train_step(self, batches: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on the next global batch.

        The update is skipped where loss or gradient are not finite, on all ranks together.

        Returns:
            The batch's mean loss, and the norm of the whole gradient before clipping, as scalars on the device.
        """
        training = self.config.training
        set_learning_rate(self.optimizer, learning_rate(self.step, self.config.optimizer, training))
        self.optimizer.zero_grad()
        step_loss = torch.zeros((), device=self.world.device)
        for _ in range(self.degrees.accumulation_steps):
            waiting_since = time.perf_counter()
            batch = next(batches)
            self.stopwatch.waited += time.perf_counter() - waiting_since
            self.clipped_counts += int(batch.clipped.sum())
            documents = None
            if training.document_mask:
                documents = Documents.from_starts(batch.documents, batch.tokens[:, 1:].numel(), self.world.device)
            lengths = documents.lengths if documents else batch.valid.tolist()
            self.stopwatch.flops += training_flops(self.model.shape, lengths)
            tokens = batch.tokens.to(self.world.device, non_blocking=True).long()
            logits = self.model(tokens[:, :-1], documents)
            # Every label of every rank weighs the same in the mean, and training windows have no invalid ones.
            loss = token_losses(logits, tokens[:, 1:]).sum() / self.tokens_per_step
            # FSDP averages gradients over the ranks; the mean is already taken above, so this must be a sum.
            (loss * self.world.size).backward()
            step_loss += loss.detach()
        step_loss = step_loss.double()
        dist.all_reduce(step_loss)
        grad_norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        assert isinstance(grad_norm, DTensor)
        grad_norm = grad_norm.full_tensor()
        clip_grads_with_norm_(self.model.parameters(), training.max_norm, grad_norm)
        first = self.cursor
        step_unless(
            self.health.judge(self.step, step_loss, grad_norm, lambda: self.windows_from(first)), self.optimizer
        )
        self.stopwatch.steps += 1
        return step_loss, grad_norm

    def report(self, loss: float, grad_norm: float) -> StepMetrics:
        """The metrics of the step just done. Steps without a report do not make the host wait for the device."""
        clipped = torch.tensor(self.clipped_counts, device=self.world.device)
        dist.all_reduce(clipped)

        steps, elapsed = self.stopwatch.steps, self.stopwatch.elapsed
        tokens = steps * self.tokens_per_step / self.world.size
        peak_reserved = None
        if self.world.device.type == "cuda":
            peak_reserved = torch.cuda.max_memory_reserved() / 2**30
            torch.cuda.reset_peak_memory_stats()
        metrics = StepMetrics(
            step=self.step,
            loss=loss if math.isfinite(loss) else None,
            grad_norm=grad_norm if math.isfinite(grad_norm) else None,
            skipped_updates=self.health.skipped,
            lr=learning_rate(self.step, self.config.optimizer, self.config.training),
            tokens_seen=self.cursor * self.config.training.seq_len,
            epoch=None if self.windows.num_windows is None else self.cursor / self.windows.num_windows,
            tokens_per_second_per_gpu=tokens / elapsed,
            seconds_per_step=elapsed / steps,
            mfu=None if self.peak_flops is None else self.stopwatch.flops / elapsed / self.peak_flops,
            data_wait_share=self.stopwatch.waited / elapsed,
            peak_reserved_gib=peak_reserved,
            clipped_counts=int(clipped),
            seconds_left=(self.config.training.steps - self.step) * elapsed / steps,
            time=time.time(),
        )
        self.stopwatch.restart()
        return metrics

    def validated(self, metrics: StepMetrics) -> StepMetrics:
        """These metrics, with the figures of held-out data where they are due: not part of the step's time."""
        if not self.is_validated():
            return metrics
        assert self.validation is not None
        scores = self.validation.score(self.model, self.watchdog)
        self.stopwatch.restart()
        return replace(metrics, **scores)

    def finish(self, last_step: int) -> None:
        """Exports the weights if asked to, waits for the last save, and states how the run ended, and where it is.

        Raises:
            SaveError: where the last step is not saved, or its weights are not exported.
        """
        steps, checkpoint = self.config.training.steps, self.config.checkpoint
        self.watchdog.allow(self.config.comm.save_timeout_seconds)
        self.checkpointer.wait()
        if self.step >= steps and checkpoint.model_weights_only:
            self.checkpointer.export(self.step, self.data_state())
            if not self.checkpointer.is_exported(self.step):
                raise SaveError(f"the weights of the last step, {self.step}, are not exported")
        if checkpoint.enable_checkpoint and not self.checkpointer.is_saved(self.step):
            raise SaveError(f"the last step, {self.step}, is not saved")
        self.watchdog.close()
        from_rank_zero(lambda: self.end("finished" if self.step >= last_step else "go_on"))
        of_steps = f" of {steps}" if self.step <= steps else ""  # an earlier start has made more than are asked for
        logger.info(f"step {self.step}{of_steps} is done; metrics in {self.dump_folder / 'metrics.jsonl'}")
        if checkpoint.enable_checkpoint:
            without = ", without training.stop_after_step," if self.step >= last_step else ""
            going_on = f"; the same command{without} goes on" if self.step < steps else ""
            logger.info(f"checkpoints in {self.checkpointer.root}{going_on}")

    def give_up(self) -> None:
        """After an error of all ranks: waits for the save in the background, whose step is a good one."""
        self.watchdog.allow(self.config.comm.save_timeout_seconds)
        try:
            self.checkpointer.wait()
        except (SaveError, FolderInUseError) as error:
            report_once(str(error))
        self.end("broken")

    def end(self, state: State) -> None:
        """On rank 0: states the outcome and leaves the folder to others."""
        if self.owner is not None:
            try:
                write_outcome(self.dump_folder, state, self.step)
            except OSError as error:
                logger.warning(f'{self.dump_folder}: "{state}" cannot be written as the outcome: {error.strerror}')
            self.owner.release()
            self.owner = None

    def check_owner(self) -> None:
        """On rank 0: raises FolderInUseError where another run has taken the folder over; elsewhere it does nothing."""
        if self.owner is not None:
            self.owner.check()

    def _take_dump_folder(self) -> None:
        make_writable(self.dump_folder)
        self.owner = Owner(self.dump_folder)
        clear_outcome(self.dump_folder)

    def windows_from(self, cursor: int) -> list[int]:
        """The windows of the step that begins at this cursor."""
        training = self.config.training
        order = WindowOrder(self.windows.num_windows, seed=training.seed, shuffle=training.shuffle)
        return [order[position] for position in range(cursor, cursor + self.degrees.global_batch_size)]

    def loader(self) -> DataLoader[Batch]:
        """Loads this rank's batches from the cursor on."""
        training = self.config.training
        order = WindowOrder(self.windows.num_windows, seed=training.seed, shuffle=training.shuffle)
        sampler = RankSampler(
            order,
            cursor=self.cursor,
            batch_size=training.batch_size,
            global_batch_size=self.degrees.global_batch_size,
            rank=self.world.rank,
            num_ranks=self.world.size,
        )
        on_gpu = self.world.device.type == "cuda"
        return build_loader(self.windows, sampler, num_workers=training.num_workers, pin_memory=on_gpu)

    def is_logged(self, last_step: int) -> bool:
        """The first step of the run, every `log_freq`-th, the last one, and each that is validated."""
        return self.step % self.config.metrics.log_freq == 0 or self.step in (1, last_step) or self.is_validated()

    def is_validated(self) -> bool:
        """Whether held-out data are scored after this step."""
        return self.validation is not None and self.validation.is_due(self.step)

    def is_saved(self, last_step: int) -> bool:
        """Every `interval`-th step and the last one, where checkpoints are enabled."""
        config = self.config.checkpoint
        return config.enable_checkpoint and (self.step % config.interval == 0 or self.step == last_step)

    def data_state(self) -> dict[str, Any]:
        """The cursor, and what it would mean nothing without."""
        training = self.config.training
        return {
            "cursor": self.cursor,
            "fingerprint": self.windows.fingerprint,
            "split": training.split,
            "seed": training.seed,
            "shuffle": training.shuffle,
            "seq_len": training.seq_len,
            "global_batch_size": self.degrees.global_batch_size,
        }


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python's collector would run at moments of its own choosing, and ranks wait for each other inside steps."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _write_config(path: Path, config: JobConfig) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(dump_toml(config), encoding="utf-8")
    temporary.replace(path)


def _open_windows(config: JobConfig, world: World, global_batch_size: int) -> WindowSource:
    training = config.training
    recordings = index = None
    if training.dataset != "synthetic":
        recordings, index = open_split(training, world)
    windows = open_windows(training, recordings, index)
    logger.info(windows.describe())
    if windows.num_windows is not None and windows.num_windows < global_batch_size:
        raise ValueError(
            f"{windows.num_windows} windows of training.seq_len = {training.seq_len} tokens are fewer than the "
            f"{global_batch_size} sequences of one step; take more data, or a shorter seq_len or smaller batch"
        )
    return windows
