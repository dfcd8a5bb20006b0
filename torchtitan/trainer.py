"""The training run: built from a configuration, read from top to bottom."""

import gc
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from torchtitan.checkpoint.checkpointer import Checkpointer
from torchtitan.checkpoint.init_from import init_from
from torchtitan.config import JobConfig, dump_toml
from torchtitan.data.index import load_index
from torchtitan.data.loader import Batch, RankSampler, build_loader, open_windows
from torchtitan.data.recordings import open_recordings
from torchtitan.data.windows import WindowOrder, WindowSource
from torchtitan.distributed.parallelize import init_weights, parallelize
from torchtitan.distributed.world import (
    World,
    accumulation_steps,
    build_mesh,
    first_on_each_node,
    from_rank_zero,
    set_timeout,
)
from torchtitan.flops import FORMULA, peak_flops, training_flops
from torchtitan.logging import logger
from torchtitan.metrics import MetricsWriter, StepMetrics, Stopwatch
from torchtitan.models.llama.attention import Attention, Documents, choose_attention
from torchtitan.models.llama.model import Transformer, token_losses
from torchtitan.models.llama.shape import ModelShape
from torchtitan.optimizer import build_optimizer, learning_rate, set_learning_rate
from torchtitan.profiling import profiling


class Trainer:
    """One training run.

    Building it checks everything that can be wrong before the model takes memory; `train` runs it to its last step.
    """

    def __init__(self, config: JobConfig, world: World) -> None:
        self.config, self.world = config, world
        training = config.training
        self.dump_folder = Path(config.job.dump_folder)
        from_rank_zero(lambda: _prepare(self.dump_folder, config))
        torch.manual_seed(training.seed)
        torch.use_deterministic_algorithms(training.deterministic)

        mesh = build_mesh(training, world)
        self.accumulation_steps = accumulation_steps(training, world)
        self.global_batch_size = self.accumulation_steps * training.batch_size * world.size
        self.tokens_per_step = self.global_batch_size * training.seq_len
        self.windows = _open_windows(config, world, self.global_batch_size)

        compute_dtype = getattr(torch, training.mixed_precision_param)
        attention = choose_attention(config.model.attention, world.device, compute_dtype)
        self.shape = ModelShape.from_config(config)
        with torch.device("meta"):
            self.model = Transformer(self.shape, attention, max_length=training.seq_len)
        parallelize(self.model, mesh, config)
        init_weights(self.model, world.device, training.seed)
        self.optimizer = build_optimizer(self.model, config.optimizer)

        self.step = 0
        self.cursor = 0  # windows that all ranks have trained on: the whole state of the data
        self.checkpointer = Checkpointer(config, self.model, self.optimizer)
        record = self.checkpointer.resume() if config.checkpoint.enable_checkpoint else None
        if record is not None:
            self.step, self.cursor = record["step"], record["data"]["cursor"]
            _check_same_data(record["data"], self.data_state())
        elif config.checkpoint.init_from is not None:
            init_from(self.model, config.checkpoint)
        self.resumed_step = self.step

        self.peak_flops = peak_flops(torch.cuda.get_device_name()) if world.device.type == "cuda" else None
        self.clipped_counts = 0
        self.describe(attention, mesh)

    def describe(self, attention: Attention, mesh: DeviceMesh) -> None:
        """Logs what was chosen, and why."""
        config, training = self.config, self.config.training
        peak = "unknown" if self.peak_flops is None else f"{self.peak_flops / 1e12:.0f} TFLOP/s"
        degrees = " × ".join(f"{n} {name}" for n, name in zip(mesh.shape, mesh.mesh_dim_names or (), strict=True))
        for line in (
            f"model: {config.model.flavor}, {self.shape.num_params:,} parameters, "
            + ", ".join(f"{name} {value}" for name, value in asdict(self.shape).items()),
            f"attention: {attention.backend.title} ({attention.reason})"
            + (", each recording by itself" if training.document_mask else ""),
            f"mesh: {degrees} on {self.world.device.type}; {training.mixed_precision_param} compute over float32 "
            f"weights, float32 reduction; recompute: {config.activation_checkpoint.mode}; compile: {training.compile}",
            f"step: {self.global_batch_size} sequences of {training.seq_len:,} = {self.tokens_per_step:,} tokens; "
            f"{training.batch_size} a rank at once, {self.accumulation_steps} times",
            f"MFU: {FORMULA}; peak {peak}",
        ):
            logger.info(line)

    def train(self) -> None:
        """Runs to the last step, or to `training.stop_after_step`, saving as configured."""
        config, training = self.config, self.config.training
        last_step = min(training.steps, training.stop_after_step or training.steps)
        if self.step >= last_step:
            logger.info(f"nothing to do: step {self.step} of {training.steps} is done")
            self.finish()
            return
        writer = MetricsWriter(config.metrics, self.dump_folder, rank=self.world.rank, resumed_step=self.step)
        batches = iter(self.loader())
        self.stopwatch = Stopwatch()
        # Collections at moments of its own choosing would make ranks wait for each other inside steps.
        gc.disable()
        with profiling(config, self.world.rank, self.step) as profilers:
            while self.step < last_step:
                self.step += 1
                loss, grad_norm, flops = self.train_step(batches)
                self.cursor += self.global_batch_size
                if self.step == self.resumed_step + 1:
                    set_timeout(config.comm.train_timeout_seconds)
                if self.is_logged(last_step):
                    writer.write(self.report(loss, grad_norm, flops))
                if self.step % training.gc_freq == 0:
                    gc.collect()
                self.checkpointer.poll()
                if config.checkpoint.enable_checkpoint and self.is_saved(last_step):
                    self.checkpointer.save(self.step, self.data_state())
                for profiler in profilers:
                    profiler.step()
        gc.enable()
        writer.close()
        self.finish()

    def train_step(self, batches: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """One optimizer step on the next global batch.

        Returns:
            This rank's share of the batch's mean loss and the norm of the whole gradient, float32 scalars on the
            device, and the FLOPs of this rank.
        """
        training = self.config.training
        set_learning_rate(self.optimizer, learning_rate(self.step, self.config.optimizer, training))
        self.optimizer.zero_grad()
        step_loss = torch.zeros((), device=self.world.device)
        flops = 0
        for _ in range(self.accumulation_steps):
            waiting_since = time.perf_counter()
            batch = next(batches)
            self.stopwatch.waited += time.perf_counter() - waiting_since
            self.clipped_counts += int(batch.clipped.sum())
            documents = None
            if training.document_mask:
                documents = Documents.from_starts(batch.documents, batch.tokens[:, 1:].numel(), self.world.device)
            flops += training_flops(self.shape, documents.lengths if documents else batch.valid.tolist())
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
        return step_loss, grad_norm, flops

    def report(self, loss: torch.Tensor, grad_norm: torch.Tensor, flops: int) -> StepMetrics:
        """The metrics of the step just done; the only place in the loop where the host waits for the device."""
        sums = torch.stack((loss.double(), torch.tensor(self.clipped_counts, dtype=torch.float64, device=loss.device)))
        dist.all_reduce(sums)
        mean_loss, clipped = sums.tolist()
        assert isinstance(grad_norm, DTensor)
        norm = float(grad_norm.full_tensor())

        steps, elapsed = self.stopwatch.steps, self.stopwatch.elapsed
        tokens = steps * self.tokens_per_step / self.world.size
        peak_reserved = None
        if self.world.device.type == "cuda":
            peak_reserved = torch.cuda.max_memory_reserved() / 2**30
            torch.cuda.reset_peak_memory_stats()
        metrics = StepMetrics(
            step=self.step,
            loss=mean_loss,
            grad_norm=norm,
            lr=learning_rate(self.step, self.config.optimizer, self.config.training),
            tokens_seen=self.cursor * self.config.training.seq_len,
            epoch=None if self.windows.num_windows is None else self.cursor / self.windows.num_windows,
            tokens_per_second_per_gpu=tokens / elapsed,
            seconds_per_step=elapsed / steps,
            mfu=None if self.peak_flops is None else flops * steps / elapsed / self.peak_flops,
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
        done = self.step >= self.config.training.steps
        if done and self.config.checkpoint.model_weights_only:
            self.checkpointer.export(self.step, getattr(torch, self.config.checkpoint.export_dtype))
        self.checkpointer.wait()
        further = "" if done else "; the same command, without training.stop_after_step, goes on from here"
        logger.info(f"step {self.step} of {self.config.training.steps} is done{further}")
        logger.info(f"metrics in {self.dump_folder / 'metrics.jsonl'}, checkpoints in {self.checkpointer.root}")

    def loader(self) -> Any:
        """Loads this rank's batches from the cursor on."""
        training = self.config.training
        order = WindowOrder(self.windows.num_windows, seed=training.seed, shuffle=training.shuffle)
        sampler = RankSampler(
            order,
            cursor=self.cursor,
            batch_size=training.batch_size,
            global_batch_size=self.global_batch_size,
            rank=self.world.rank,
            num_ranks=self.world.size,
        )
        on_gpu = self.world.device.type == "cuda"
        return build_loader(self.windows, sampler, num_workers=training.num_workers, pin_memory=on_gpu)

    def is_logged(self, last_step: int) -> bool:
        """The first step of the run, every `log_freq`-th and the last one."""
        return self.step % self.config.metrics.log_freq == 0 or self.step in (1, last_step)

    def is_saved(self, last_step: int) -> bool:
        """Every `interval`-th step and the last one."""
        return self.step % self.config.checkpoint.interval == 0 or self.step == last_step

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
        }


def _prepare(dump_folder: Path, config: JobConfig) -> None:
    """Makes the dump folder and writes the resolved configuration into it."""
    try:
        dump_folder.mkdir(parents=True, exist_ok=True)
        (dump_folder / "config.toml").write_text(dump_toml(config), encoding="utf-8")
    except OSError as error:
        raise ValueError(f'job.dump_folder = "{config.job.dump_folder}" cannot be written: {error.strerror}') from error
    logger.info(f"{config.job.description or 'run'} on {os.uname().nodename}, writing to {dump_folder.absolute()}")


def _open_windows(config: JobConfig, world: World, global_batch_size: int) -> WindowSource:
    training = config.training
    recordings = index = None
    if training.dataset != "synthetic":
        with first_on_each_node(world):
            recordings = open_recordings(training)
        opened = recordings
        index = from_rank_zero(lambda: load_index(opened, training.malformed_rows))
    windows = open_windows(training, recordings, index)
    logger.info(windows.describe())
    if windows.num_windows is not None and windows.num_windows < global_batch_size:
        raise ValueError(
            f"{windows.num_windows} windows of training.seq_len = {training.seq_len} tokens are fewer than the "
            f"{global_batch_size} sequences of one step; take more data, or a shorter seq_len or smaller batch"
        )
    return windows


def _check_same_data(saved: dict[str, Any], current: dict[str, Any]) -> None:
    differences = [
        f"{key} is {saved.get(key)} there and {value} here"
        for key, value in current.items()
        if key != "cursor" and saved.get(key) != value
    ]
    if differences:
        raise ValueError(
            "the checkpoint's data cursor belongs to other data: " + "; ".join(differences) + ". "
            "Set it back, or start a new run from the weights with checkpoint.init_from"
        )
