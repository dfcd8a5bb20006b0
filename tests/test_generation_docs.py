"""What docs/generation.md says of speed is what was measured, and its flags are those of the command line."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.command import recorded
from benchmarks.generation import PAGE, ROOT, with_table
from torchtitan.generation.arguments import parse_generate


def test_the_table_is_that_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "run: python benchmarks/generation.py --table"


def test_the_commands_are_those_of_the_results() -> None:
    shown = re.sub(r" \\\n +", " ", PAGE.read_text(encoding="utf-8")).splitlines()
    results = [json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("generation_*.json")]
    assert results
    for result in results:
        assert f"    {result['command']}" in shown


@pytest.mark.parametrize("argument", ["--json {}", "--json={}"])
def test_a_result_records_no_folder_of_the_machine(argument: str) -> None:
    path = Path("/somewhere/out/result.json")
    words = ["python", "b.py", *argument.format(path).split(), "--flavor", "a b"]
    assert recorded(words, path) == f"python b.py {argument.format('result.json')} --flavor 'a b'"
    assert recorded(["python", "b.py"], None) == "python b.py"


def test_all_flags_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_generate(["--help"])
    flags = set(re.findall(r"--[a-z_]+", capsys.readouterr().out)) - {"--help"}
    assert flags <= set(re.findall(r"--[a-z_]+", PAGE.read_text(encoding="utf-8")))
