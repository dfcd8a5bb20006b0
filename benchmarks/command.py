"""The command line as a result records it."""

import shlex
from collections.abc import Sequence
from pathlib import Path


def recorded(words: Sequence[str], result: Path | None) -> str:
    """The command as one would type it, the result's file without the folder that it was written to."""
    return shlex.join(word if result is None else word.replace(str(result), result.name) for word in words)
