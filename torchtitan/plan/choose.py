"""The recomputation that is fastest within a memory limit: what `activation_checkpoint.mode = "auto"` takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torchtitan.config.schema import ActivationCheckpoint, JobConfig
from torchtitan.models.llama.shape import ModelShape
from torchtitan.plan.costs import GIB, Memory, Step, Time, memory, time
from torchtitan.plan.hardware import GPU

DEVICE_SHARE = 0.94
"""Of the GPU's memory, for PyTorch; CUDA, NCCL and the plan's own error take the rest."""
HOST_SHARE = 0.8
"""Of the host's free memory, for activations."""


@dataclass(frozen=True)
class Limits:
    """GiB that a plan may take of one GPU's memory, and of the host's for it."""

    device_gib: float
    host_gib: float

    @classmethod
    def of(cls, config: ActivationCheckpoint, gpu_memory_gib: float, host_memory_gib: float) -> "Limits":
        """The configured limits, or what is left of what there is."""
        device, host = config.device_memory_gib, config.host_memory_gib
        return cls(
            device_gib=DEVICE_SHARE * gpu_memory_gib if device is None else device,
            host_gib=HOST_SHARE * host_memory_gib if host is None else host,
        )

    def hold(self, needed: Memory) -> bool:
        """Whether they suffice."""
        return needed.device <= self.device_gib * GIB and needed.host <= self.host_gib * GIB


@dataclass(frozen=True)
class Choice:
    """A recomputation and what it costs."""

    recompute: ActivationCheckpoint
    memory: Memory
    time: Time
    fits: bool


def evaluate(step: Step, recompute: ActivationCheckpoint, gpu: GPU, limits: Limits) -> Choice:
    """What one recomputation costs."""
    needed = memory(step, recompute)
    return Choice(recompute, needed, time(step, recompute, gpu), limits.hold(needed))


def choose(step: Step, gpu: GPU, limits: Limits) -> Choice:
    """The fastest that fits, with the fewest offloaded blocks among equals; where none does, the smallest."""
    choices = [evaluate(step, candidate, gpu, limits) for candidate in _candidates(step, limits)]
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        return min(choices, key=lambda choice: choice.memory.device)
    return min(fitting, key=lambda choice: (round(choice.time.total, 4), choice.recompute.offload_layers))


def _candidates(step: Step, limits: Limits) -> Iterator[ActivationCheckpoint]:
    n_layers = step.shape.n_layers
    yield ActivationCheckpoint(mode="none")
    for parked in range(n_layers):
        yield ActivationCheckpoint(mode="full", offload_layers=parked)
    # What an uncompiled block keeps beyond its input stays out of the offload's reach.
    for parked in range(n_layers if step.compiled else 1):

        def keeping(projections: int, gate_up: int, parked: int = parked) -> ActivationCheckpoint:
            return ActivationCheckpoint(
                mode="attention",
                projections_layers=projections,
                gate_up_layers=gate_up,
                offload_layers=parked,
            )

        # A byte of projections spares the more.
        projections = _most(n_layers, lambda n: limits.hold(memory(step, keeping(n, 0))))
        gate_up = _most(n_layers, lambda n: limits.hold(memory(step, keeping(projections, n))))  # noqa: B023
        yield keeping(projections, gate_up)


def _most(largest: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `largest` that fits; 0 where none does."""
    return next((n for n in range(largest, 0, -1) if fits(n)), 0)


def describe(recompute: ActivationCheckpoint, n_layers: int) -> str:
    """What is kept, in words."""
    if recompute.mode == "none":
        kept = "all activations are kept"
    elif recompute.mode == "full":
        kept = "each block's input is kept, the rest recomputed"
    else:
        also = {"q, k, v and o": recompute.projections_layers, "gate and up": recompute.gate_up_layers}
        beyond = [f"{name} in {count} of {n_layers}" for name, count in also.items() if count]
        kept = ", ".join(["attention outputs are kept in every block", *beyond]) + ", the rest recomputed"
    parked = recompute.offload_layers
    return kept + (f"; those of the first {parked} blocks wait in host memory" if parked else "")


def check_recompute(config: JobConfig) -> Iterator[tuple[str, str]]:
    """Contradictions in `[activation_checkpoint]`, as (key, message): a check for `load_config`."""
    recompute, n_layers = config.activation_checkpoint, ModelShape.from_config(config).n_layers
    for key in ("projections_layers", "gate_up_layers", "offload_layers"):
        value = getattr(recompute, key)
        allowed = ("attention",) if key != "offload_layers" else ("none", "attention", "full")
        if value and recompute.mode not in allowed:
            modes = " or ".join(f'"{mode}"' for mode in allowed)
            yield f"activation_checkpoint.{key}", f'contradicts mode = "{recompute.mode}"; it takes mode {modes}'
        elif value > n_layers:
            yield f"activation_checkpoint.{key}", f"{value} is more than the model's {n_layers} blocks"
    if recompute.offload_layers and recompute.mode == "attention" and not config.training.compile:
        yield (
            "activation_checkpoint.offload_layers",
            'needs training.compile = true in mode "attention": an uncompiled block holds on to it itself',
        )
    if config.float8.enable_float8_linear and config.training.mixed_precision_param != "bfloat16":
        yield "float8.enable_float8_linear", 'needs training.mixed_precision_param = "bfloat16"'
