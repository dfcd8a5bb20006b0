"""What a checkpoint holds, as one flat dictionary of tensors, and what a folder holds, compared with it."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from torchtitan.checkpoint.manifest import DamagedCheckpointError, Files
from torchtitan.checkpoint.reader import SafeLoadPlanner, SafeReader

Tensors = dict[str, torch.Tensor]


def model_tensors(model: nn.Module) -> Tensors:
    """The weights themselves, under Meta's names behind `model.`: loading into them changes the model."""
    state = get_model_state_dict(model)
    return {f"model.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state, one tensor a weight and moment; its rates are the configuration's."""
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    return {f"optimizer.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}


def random_state() -> Tensors:
    """The states of this rank's random generators, uint8, under its own name."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"random.{dist.get_rank()}.{device}": state for device, state in states.items()}


def set_random_state(states: Tensors) -> None:
    """Puts back what `random_state` gave."""
    for name, state in states.items():
        if name.endswith(".cpu"):
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state)


def stored_tensors(folder: Path, files: Files | None = None) -> dict[str, TensorStorageMetadata | None]:
    """What a DCP checkpoint holds, by name: shape and dtype of each tensor, None for what is not one.

    Raises:
        ValueError: where the folder is not a DCP checkpoint, or `.metadata` cannot be trusted.
    """
    if not (folder / ".metadata").is_file():
        raise ValueError(f"{folder} is not a DCP checkpoint: it has no .metadata file")
    stored = SafeReader(folder, files).read_metadata().state_dict_metadata
    return {name: entry if isinstance(entry, TensorStorageMetadata) else None for name, entry in stored.items()}


def load_tensors(
    tensors: Tensors, folder: Path, group: dist.ProcessGroup | None = None, files: Files | None = None
) -> None:
    """Loads these tensors, in place, from a DCP checkpoint; each rank reads what it needs of them.

    What is read of `files` is compared with their checksums.

    Raises:
        DamagedCheckpointError: where a file is absent, or is not what was written.
        ValueError: where a file cannot be read for another reason.
    """
    reader, planner = SafeReader(folder, files), SafeLoadPlanner()
    try:
        dcp.load(tensors, storage_reader=reader, planner=planner, process_group=group)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, DamagedCheckpointError):
            raise DamagedCheckpointError(folder, cause.reason) from error
        reason = f"rank {rank}: {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
        # What is not the checkpoint's fault must not have it set aside: `checkpoint.fall_back` would go through all.
        elsewhere = (MemoryError, torch.OutOfMemoryError, dist.DistError)
        unread = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
        if unread or isinstance(cause, elsewhere) or "can't allocate memory" in str(cause):
            raise ValueError(f"{folder} cannot be read ({reason})") from error
        raise DamagedCheckpointError(folder, reason) from error


def mismatches(wanted: Tensors, stored: dict[str, TensorStorageMetadata | None], *, widen: bool = False) -> list[str]:
    """Everything in which the stored tensors are not the wanted ones, a line each.

    With `widen` a bf16 or fp16 tensor fits where a float32 one is wanted.
    """
    lines = [f"missing: {name}" for name in wanted if name not in stored]
    lines += [f"unexpected: {name}" for name in stored if name not in wanted]
    for name, tensor in wanted.items():
        if name not in stored:
            continue
        entry = stored[name]
        if entry is None:
            lines.append(f"not a tensor: {name}")
            continue
        dtype = entry.properties.dtype
        widened = widen and tensor.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)
        if entry.size != tensor.shape:
            lines.append(f"other shape: {name} is {list(entry.size)} there and {list(tensor.shape)} here")
        elif dtype != tensor.dtype and not widened:
            lines.append(f"other dtype: {name} is {dtype} there and {tensor.dtype} here")
    return lines


def raise_mismatches(folder: Path, lines: list[str]) -> None:
    """One error that lists them all, if there are any."""
    if lines:
        head = f"{folder} does not fit the configured model; change [model], or take another checkpoint or dump folder:"
        raise ValueError("\n  ".join([head, *lines]))
