#!/usr/bin/env python3
"""Trains a model: `python train.py --job.config_file FILE [--table.key value …]`; `--help` lists all keys.

On several GPUs: `torchrun --nproc_per_node N train.py …`.
"""

import os
import sys
import traceback
from typing import NoReturn

from torchtitan.config import ConfigError, JobConfig, load_config
from torchtitan.distributed.degrees import check_degrees
from torchtitan.distributed.launcher import end, end_with_launcher, report
from torchtitan.logging import init_logger
from torchtitan.models.llama.shape import check_shape
from torchtitan.plan.check import check_recompute


def main(config: JobConfig) -> None:
    """Runs the configured training in the processes that were started for it."""
    # Tensors of gigabytes come and go: segments that grow leave no gaps between them that nothing fits into.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # Here and not above: a wrong configuration is reported without the seconds that loading torch takes.
    import torch.distributed as dist

    from torchtitan.checkpoint.checkpointer import SaveError
    from torchtitan.distributed.world import init_world, report_once
    from torchtitan.owner import FolderInUseError
    from torchtitan.trainer import Trainer

    def fail(error: Exception) -> NoReturn:
        """What a user can mend needs no trace, and to be said once."""
        report_once(str(error))
        end(1)

    try:
        trainer = Trainer(config, init_world(config.comm.init_timeout_seconds))
    except ValueError as error:
        fail(error)
    try:
        trainer.train()
    except (FloatingPointError, MemoryError, SaveError) as error:  # a ValueError here would be a bug
        trainer.give_up()
        fail(error)
    except FolderInUseError as error:
        fail(error)
    dist.destroy_process_group()


if __name__ == "__main__":
    end_with_launcher()
    init_logger()
    try:
        config = load_config(sys.argv[1:], checks=[check_shape, check_degrees, check_recompute])
    except ConfigError as error:
        report(str(error))
        sys.exit(2)
    try:
        main(config)
    except Exception:
        traceback.print_exc()
        end(1)
    end(0)
