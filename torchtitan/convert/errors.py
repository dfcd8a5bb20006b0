"""How the conversions end where they cannot go on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torchtitan.logging import logger


class PushError(Exception):
    """The upload broke off; it can be repeated."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Says in one line what a user can mend and exits: with 2 for the input, with 1 for disk, network and Ctrl-C."""
    try:
        yield
    except ValueError as error:
        logger.error(f"error: {error}")
        sys.exit(2)
    except (OSError, PushError) as error:
        logger.error(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        logger.error("error: interrupted; the output folder is as it was, and the same command starts again")
        sys.exit(1)
