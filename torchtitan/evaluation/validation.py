"""Held-out windows that a training run scores every so often."""

from torchtitan.config import JobConfig
from torchtitan.distributed.watchdog import Watchdog
from torchtitan.distributed.world import World
from torchtitan.evaluation.accumulator import Accumulator, warn_of_clipped
from torchtitan.evaluation.passes import Pass, open_held_out
from torchtitan.evaluation.report import group
from torchtitan.evaluation.scoring import Scorer
from torchtitan.logging import logger
from torchtitan.models.llama.model import Transformer

Scores = dict[str, float | None]


class Validation:
    """The same windows each time, and when they are due. Neither data order nor random state of the run change."""

    def __init__(self, config: JobConfig, world: World) -> None:
        """Opens the split.

        Raises:
            ValueError: where it cannot be used.
        """
        self.config, self.world = config, world
        validation, training = config.validation, config.training
        try:
            recordings, index = open_held_out(training, world, validation.split, "validation.split")
        except ValueError as error:
            raise ValueError(f"{error}; validation.enable = false trains without it") from error
        self.over = Pass(
            recordings,
            index,
            seq_len=training.seq_len,
            vocab_size=training.vocab_size,
            max_windows=validation.max_windows,
        )
        self.timeout = config.comm.init_timeout_seconds  # the first time, compilation for it is part of it
        self.warned = False  # of clipped counts, the same ones each time
        logger.info(
            f"validation every {validation.interval} steps on {recordings.description}: {len(self.over.chosen):,} "
            f"windows, {self.over.num_scored:,} tokens"
        )

    def is_due(self, step: int) -> bool:
        """Every `interval`-th step, and the last one of the run."""
        return step % self.config.validation.interval == 0 or step == self.config.training.steps

    def score(self, model: Transformer, watchdog: Watchdog) -> Scores:
        """Figures of the model as it is, by their names among a step's metrics; on rank 0 alone.

        The watchdog is given the time limit of a step for each round of windows.
        """
        watchdog.allow(self.timeout)
        self.timeout = self.config.comm.train_timeout_seconds
        training = self.config.training
        scorer = Scorer(
            model,
            self.over,
            self.world,
            batch_size=training.batch_size,
            document_mask=training.document_mask,
            progress=lambda: watchdog.allow(self.timeout),
        )
        accumulator = Accumulator(self.over, nulls=False)
        for window in scorer.score():
            accumulator.add(window)
        sums = accumulator.finish().overall
        if not self.warned:
            warn_of_clipped(sums, training.vocab_size)
            self.warned = True
        overall = group(sums, sessions=0)
        return {f"validation_{name}": overall[name] for name in ("nats_per_token", "bits_per_spike")}
