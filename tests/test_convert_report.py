"""What a conversion says: lines in a log, a table at the end."""

import pytest
import torch

from torchtitan.convert.report import progress, summary
from torchtitan.convert.weights import LeftOut, Tensors, Weight
from torchtitan.logging import logger


def test_a_log_gets_a_line_every_tenth(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    monkeypatch.setattr(logger, "info", lines.append)
    weights = {str(number): Weight((1000,), torch.float32) for number in range(40)}
    with progress(Tensors(weights, lambda _: torch.zeros(1000))) as tensors:
        for name in weights:
            tensors.read(name)
    assert lines[0] == "converting 40 tensors, 160kB"
    assert [line.partition(" %")[0] for line in lines[1:]] == [str(10 * tenth) for tenth in range(1, 11)]
    assert "80.0kB of 160kB" in lines[5]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress(Tensors({"a": Weight((1000,), torch.float32)}, lambda _: torch.zeros(1000))) as tensors:
        tensors.read("a")
    assert "100%|" in capsys.readouterr().err


def test_the_table() -> None:
    narrow = Weight((8,), torch.bfloat16)
    weights = {"a": Weight((1000,), torch.float32), "b": narrow, "c": narrow}
    table = summary(weights, [LeftOut("freqs_cis", 1, 64, "complex64", "it follows")])
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["converted", "1", "4,000", "float32"],
        ["converted", "2", "32", "bfloat16"],
        ["left", "out:", "freqs_cis", "1", "64", "complex64", "it", "follows"],
    ]
