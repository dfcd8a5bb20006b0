"""What docs/generation.md says of speed is what was measured, and its flags are those of the command line."""

import re

import pytest

from benchmarks.generation import PAGE, with_table
from torchtitan.generation.arguments import parse_generate


def test_the_table_is_that_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "run: python benchmarks/generation.py --table"


def test_all_flags_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_generate(["--help"])
    flags = set(re.findall(r"--[a-z_]+", capsys.readouterr().out)) - {"--help"}
    assert flags <= set(re.findall(r"--[a-z_]+", PAGE.read_text(encoding="utf-8")))
