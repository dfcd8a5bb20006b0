"""The recomputation that is fastest within a memory limit: what `activation_checkpoint.mode = "auto"` takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.plan.costs import GIB, Memory, Step, Time, memory, time
from torchtitan.plan.hardware import GPU

DEVICE_SHARE = 0.9
"""Of the GPU's memory, for PyTorch; CUDA, NCCL and the plan's own error take the rest."""
HOST_SHARE = 0.6
"""Of the host's free memory, for activations; checkpoints on their way to the disk and the files' cache need some."""
NEGLIGIBLE = 0.005
"""Share of a step's time for which more host memory is not taken."""


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
    """The one with the least host memory among those that fit and are as good as the fastest.

    Where none fits, the smallest on the device that the host can hold.
    """
    choices = [evaluate(step, candidate, gpu, limits) for candidate in _candidates(step, limits)]
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        possible = [choice for choice in choices if choice.memory.host <= limits.host_gib * GIB]
        return min(possible, key=lambda choice: choice.memory.device)
    enough = (1 + NEGLIGIBLE) * min(choice.time.total for choice in fitting)
    good = [choice for choice in fitting if choice.time.total <= enough]
    return min(good, key=lambda choice: (choice.memory.host, choice.time.total))


def _candidates(step: Step, limits: Limits) -> Iterator[ActivationCheckpoint]:
    n_layers = step.shape.n_layers
    yield ActivationCheckpoint(mode="none")
    for parked in range(n_layers):
        yield ActivationCheckpoint(mode="full", offload_layers=parked)
    # What an uncompiled block keeps beyond its input stays out of the offload's reach.
    for parked in range(n_layers if step.compiled else 1):
        keeping = partial(ActivationCheckpoint, mode="attention", offload_layers=parked)

        def holds(keeping: Callable[..., ActivationCheckpoint] = keeping, **layers: int) -> bool:
            return limits.hold(memory(step, keeping(**layers)))

        # A byte of projections spares more than one of gate and up.
        projections = _most(n_layers, lambda n, holds=holds: holds(projections_layers=n))
        gate_up = _most(n_layers, lambda n, holds=holds, p=projections: holds(projections_layers=p, gate_up_layers=n))
        yield keeping(projections_layers=projections, gate_up_layers=gate_up)


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
