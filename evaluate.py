#!/usr/bin/env python3
"""Scores held-out recordings: bits per spike over rate models, by source, by context, and as a learning curve.

On several GPUs: `torchrun --nproc_per_node N evaluate.py …`; the results do not depend on N.
"""

import sys
import traceback

from torchtitan.config import ConfigError, JobConfig
from torchtitan.distributed.launcher import end, end_with_launcher, report
from torchtitan.evaluation.arguments import Arguments, parse
from torchtitan.logging import init_logger, logger


def main(arguments: Arguments, config: JobConfig) -> None:
    """Runs the evaluation in the processes that were started for it."""
    # Here and not above: a wrong configuration is reported without the seconds that loading torch takes.
    import torch.distributed as dist

    from torchtitan.distributed.world import init_world, report_once
    from torchtitan.evaluation.run import evaluate

    try:
        evaluate(arguments, config, init_world(config.comm.init_timeout_seconds))
    except ValueError as error:
        report_once(str(error))  # what a user can mend needs no trace, and to be said once
        end(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    end_with_launcher()
    init_logger()
    try:
        arguments, config = parse(sys.argv[1:], str(__doc__))
    except ConfigError as error:
        report(str(error))
        sys.exit(2)
    try:
        main(arguments, config)
    except KeyboardInterrupt:
        logger.error("error: interrupted; the same command starts again")
        end(1)
    except Exception:
        traceback.print_exc()
        end(1)
    end(0)
