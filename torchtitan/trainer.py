"""The training run: built from a configuration, read from top to bottom."""

import gc
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from torchtitan.checkpoint.checkpointer import Checkpointer
from torchtitan.checkpoint.folders import Record
from torchtitan.checkpoint.init_from import find_weights, load_weights
from torchtitan.config import JobConfig, dump_toml
from torchtitan.data.index import check_index, load_index
from torchtitan.data.loader import Batch, RankSampler, build_loader, open_windows
from torchtitan.data.recordings import open_recordings
from torchtitan.data.windows import WindowOrder, WindowSource
from torchtitan.distributed.degrees import Degrees
from torchtitan.distributed.parallelize import build_model, init_weights
from torchtitan.distributed.world import World, build_mesh, first_on_each_node, from_rank_zero, set_timeout
from torchtitan.flops import FORMULA, peak_flops, training_flops
from torchtitan.logging import logger
from torchtitan.metrics import MetricsWriter, StepMetrics, Stopwatch
from torchtitan.models.llama.attention import Documents
from torchtitan.models.llama.model import token_losses
from torchtitan.optimizer import build_optimizer, learning_rate, set_learning_rate
from torchtitan.plan.choose import describe as describe_recompute
from torchtitan.plan.resolve import resolve_recompute
from torchtitan.profiling import profiling


class Trainer:
    """One training run.

    Building it checks everything that can be wrong before the model takes memory; `train` runs it to its last step.
    """

    def __init__(self, config: JobConfig, world: World) -> None:
        self.config, self.world = config, world
        training = config.training
        self.dump_folder = Path(config.job.dump_folder)
        from_rank_zero(lambda: _make_writable(self.dump_folder))
        logger.info(f"{config.job.description or 'run'}, writing to {self.dump_folder.absolute()}")
        torch.manual_seed(training.seed)
        if training.deterministic:
            # cuBLAS reads this when its first product runs.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

        self.degrees = Degrees.of(training, world.size)
        self.tokens_per_step = self.degrees.global_batch_size * training.seq_len
        self.windows = _open_windows(config, world, self.degrees.global_batch_size)
        self.mesh = build_mesh(self.degrees, world.device)
        recompute, self.recompute_reason = resolve_recompute(config, self.degrees, world)
        config = self.config = config.model_copy(update={"activation_checkpoint": recompute})
        self.model = build_model(config, self.mesh, world.device)

        # Whatever the run starts from is compared with the model before that takes memory.
        self.step = 0
        self.cursor = 0  # windows that all ranks have trained on: the whole state of the data
        self.checkpointer = Checkpointer(config, self.model)
        found = self.checkpointer.find() if config.checkpoint.enable_checkpoint else None
        source = find_weights(self.model, config.checkpoint) if config.checkpoint.init_from and not found else None
        if found is not None:
            check_same_data(found.record["data"], self.data_state())
            log_changes(found.record, config, self.degrees)
            self.step, self.cursor = found.record["step"], found.record["data"]["cursor"]
        self.first_step = self.step + 1

        init_weights(self.model, world.device, training.seed)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        if found is not None:
            self.checkpointer.load(found, self.optimizer)
        elif source is not None:
            load_weights(self.model, source)

        self.clipped_counts = 0
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

    def train(self) -> None:
        """Runs to the last step, or to `training.stop_after_step`, saving as configured."""
        config, training = self.config, self.config.training
        last_step = min(training.steps, training.stop_after_step or training.steps)
        if self.step >= last_step:
            logger.info(f"nothing to do: the newest checkpoint is of step {self.step}, the last step is {last_step}")
            self.finish()
            return
        from_rank_zero(lambda: _write_config(self.dump_folder / "config.toml", config))
        batches = iter(self.loader())
        self.stopwatch.restart()
        with (
            closing(MetricsWriter(config.metrics, self.dump_folder, self.world.rank, self.first_step)) as writer,
            profiling(config, self.world.rank, self.step) as profilers,
            no_garbage_collection(),
        ):
            while self.step < last_step:
                self.step += 1
                loss, grad_norm = self.train_step(batches)
                self.cursor += self.degrees.global_batch_size
                if self.is_logged(last_step) or self.is_saved(last_step):
                    norm = finite_norm(grad_norm, self.step)
                    if self.is_logged(last_step):
                        writer.write(self.report(loss, norm))
                if self.step == self.first_step:
                    # Compilation and the start of the loader are over.
                    set_timeout(self.mesh, config.comm.train_timeout_seconds)
                    self.stopwatch.restart()
                if self.step % training.gc_freq == 0:
                    gc.collect()
                self.checkpointer.poll()
                if self.is_saved(last_step):
                    self.checkpointer.save(self.step, self.data_state(), self.optimizer)
                    self.stopwatch.restart()
                for profiler in profilers:
                    profiler.step()
        self.finish()

    def train_step(self, batches: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on the next global batch.

        Returns:
            This rank's share of the batch's mean loss, and the norm of the whole gradient, as scalars on the device.
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
        grad_norm = clip_grad_norm_(self.model.parameters(), training.max_norm)
        self.optimizer.step()
        self.stopwatch.steps += 1
        return step_loss, grad_norm

    def report(self, loss: torch.Tensor, grad_norm: float) -> StepMetrics:
        """The metrics of the step just done. Steps without a report do not make the host wait for the device."""
        sums = torch.stack((loss.double(), torch.tensor(self.clipped_counts, dtype=torch.float64, device=loss.device)))
        dist.all_reduce(sums)
        mean_loss, clipped = sums.tolist()

        steps, elapsed = self.stopwatch.steps, self.stopwatch.elapsed
        tokens = steps * self.tokens_per_step / self.world.size
        peak_reserved = None
        if self.world.device.type == "cuda":
            peak_reserved = torch.cuda.max_memory_reserved() / 2**30
            torch.cuda.reset_peak_memory_stats()
        metrics = StepMetrics(
            step=self.step,
            loss=mean_loss,
            grad_norm=grad_norm,
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

    def finish(self) -> None:
        """Exports the weights if asked to, waits for the last save, and says where everything is."""
        steps, checkpoint = self.config.training.steps, self.config.checkpoint
        if self.step >= steps and checkpoint.model_weights_only:
            self.checkpointer.export(self.step)
        self.checkpointer.wait()
        logger.info(f"step {self.step} of {steps} is done; metrics in {self.dump_folder / 'metrics.jsonl'}")
        if checkpoint.enable_checkpoint:
            going_on = "; the same command, without training.stop_after_step, goes on" if self.step < steps else ""
            logger.info(f"checkpoints in {self.checkpointer.root}{going_on}")

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
        """The first step of the run, every `log_freq`-th and the last one."""
        return self.step % self.config.metrics.log_freq == 0 or self.step in (1, last_step)

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


def finite_norm(grad_norm: torch.Tensor, step: int) -> float:
    """The gradient's norm; raises FloatingPointError, on all ranks alike, where it is nan or infinite."""
    assert isinstance(grad_norm, DTensor)
    norm = float(grad_norm.full_tensor())
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient's norm is {norm} at step {step}, so the weights are lost; go on from the newest checkpoint "
            "with a lower optimizer.lr or other data"
        )
    return norm


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python's collector would run at moments of its own choosing, and ranks wait for each other inside steps."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _make_writable(dump_folder: Path) -> None:
    try:
        dump_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=dump_folder):
            pass
    except OSError as error:
        raise ValueError(f'job.dump_folder = "{dump_folder}" cannot be written: {error.strerror}') from error


def _write_config(path: Path, config: JobConfig) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(dump_toml(config), encoding="utf-8")
    temporary.replace(path)


def _open_windows(config: JobConfig, world: World, global_batch_size: int) -> WindowSource:
    training = config.training
    recordings = index = None
    if training.dataset != "synthetic":
        logger.info(f"opening {training.dataset_path or training.dataset}")
        with first_on_each_node(world):
            recordings = open_recordings(training)
        opened = recordings
        index = from_rank_zero(lambda: load_index(opened, training.malformed_rows))
        if world.local_rank == 0 and world.rank != 0:
            check_index(recordings, index)
    windows = open_windows(training, recordings, index)
    logger.info(windows.describe())
    if windows.num_windows is not None and windows.num_windows < global_batch_size:
        raise ValueError(
            f"{windows.num_windows} windows of training.seq_len = {training.seq_len} tokens are fewer than the "
            f"{global_batch_size} sequences of one step; take more data, or a shorter seq_len or smaller batch"
        )
    return windows
