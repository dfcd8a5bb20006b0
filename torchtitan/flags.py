"""Command lines of flags. Imports no torch."""

import argparse
import difflib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn


class FlagParser(argparse.ArgumentParser):
    """Says in one line what is wrong, with the nearest flag where one is misspelt, and exits with 2.

    Flags are not abbreviated: what a command means does not change when a flag is added.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def unknown(self, argv: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Each flag in `argv` that is none of this parser's, with what to do instead."""
        known = list(self._option_string_actions)
        for argument in argv:
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag not in ("--", *known):
                near = difflib.get_close_matches(flag, known, n=1)
                yield flag, f"unknown flag; did you mean {near[0]}?" if near else "unknown flag; --help lists all"

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """As `parse_args`, but a flag that is misspelt is not said to be missing."""
        if problems := [f"{flag}: {message}" for flag, message in self.unknown(argv)]:
            self.error("; ".join(problems))
        return self.parse_args(argv)

    def error(self, message: str) -> NoReturn:
        """In place of argparse's, which prints all flags before."""
        self.exit(2, f"error: {message}\n")
