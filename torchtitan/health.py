"""Which updates are made: none from a loss or gradient that is not finite, and, if asked for, none from a spike.

The decision is taken on the device, from values that are the same on all ranks; the host learns of it a step later and
never waits for the device because of it.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from torchtitan.config.schema import Training
from torchtitan.logging import logger

WINDOW = 128
"""Gradient norms whose median a spike is measured by."""
ENOUGH = 32
"""Norms that have to be there before one can be a spike."""


@dataclass(frozen=True)
class Verdict:
    """What was decided about one step: on its way to the host."""

    step: int
    values: torch.Tensor  # loss, gradient norm, whether the update was skipped
    arrived: torch.cuda.Event | None
    windows: Callable[[], list[int]]


class Health:
    """The verdicts of one run.

    Attributes:
        skipped: updates skipped since the start of this process, of the steps that the host knows of.
        in_a_row: updates skipped since the last one that was made, also by the process that saved the checkpoint.
    """

    def __init__(self, config: Training, device: torch.device, recent: list[float], in_a_row: int = 0) -> None:
        """`recent`, the gradient norms, and `in_a_row` are those that a checkpoint has kept."""
        self.config = config
        self.recent = torch.full((WINDOW,), math.nan, device=device)
        if recent:
            self.recent[-len(recent) :] = torch.tensor(recent, device=device)
        self.under_way: deque[Verdict] = deque()
        self.skipped, self.in_a_row = 0, in_a_row

    def judge(
        self, step: int, loss: torch.Tensor, norm: torch.Tensor, windows: Callable[[], list[int]]
    ) -> torch.Tensor:
        """Whether to skip the update of this step: 1 or 0, a float32 scalar on the device.

        Args:
            step: number of the step.
            loss: of the whole batch, a scalar on the device.
            norm: of the whole gradient before clipping, a scalar on the device.
            windows: names the windows of the batch; called only where they have to be named.
        """
        bad = ~(loss.isfinite() & norm.isfinite())
        factor = self.config.spike_factor
        if factor is not None:
            enough = self.recent.isfinite().sum() >= ENOUGH
            bad |= enough & (norm > factor * self.recent.nanmedian())
            self.recent = torch.where(bad, self.recent, torch.cat((self.recent[1:], norm[None])))
        skip = bad.float()
        values = torch.stack((loss.float(), norm.float(), skip)).to("cpu", non_blocking=True)
        arrived = None
        if skip.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self.under_way.append(Verdict(step, values, arrived, windows))
        return skip

    def learn(self, *, all_of_them: bool = False) -> None:
        """Takes note of the verdicts up to the step before the last one, or of `all_of_them`, which waits for them.

        Raises:
            FloatingPointError: on all ranks alike, after `training.max_bad_steps` skipped updates in a row.
        """
        while len(self.under_way) > (0 if all_of_them else 1):
            verdict = self.under_way.popleft()
            if verdict.arrived is not None:
                verdict.arrived.synchronize()
            loss, norm, skipped = verdict.values.tolist()
            if not skipped:
                self.in_a_row = 0
                continue
            self.skipped += 1
            self.in_a_row += 1
            logger.warning(
                f"step {verdict.step}: loss {loss:.4g}, gradient norm {norm:.4g}: the update is skipped, "
                f"{self.in_a_row} in a row; its windows: {', '.join(map(str, verdict.windows()))}"
            )
            if self.in_a_row >= self.config.max_bad_steps:
                raise FloatingPointError(
                    f"{self.in_a_row} updates in a row were skipped, up to step {verdict.step} "
                    f"(training.max_bad_steps): its loss is {loss:.4g} and the gradient's norm {norm:.4g}; go on from "
                    "an older checkpoint (checkpoint.load_step) with a lower optimizer.lr, or with other data"
                )

    def norms(self) -> list[float]:
        """The recent gradient norms, for a checkpoint; waits for the device."""
        return [norm for norm in self.recent.tolist() if math.isfinite(norm)]
