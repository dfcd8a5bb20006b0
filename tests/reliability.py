"""Collects what the tests marked as faults have shown into the table of docs/reliability.md.

`@pytest.mark.fault(what, how, times, outcome)`: which fault, how it is injected, how often one such test does it, and
what has to come of it. With `--all-faults` (`make faults`) they do so more often, and the table is written.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tabulate import tabulate

PAGE = Path(__file__).resolve().parents[1] / "docs/reliability.md"
BEGIN, END = "<!-- written by make faults -->", "<!-- end -->"
results: dict[tuple[str, str, str], list[tuple[str, int]]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-faults", action="store_true", help="inject all faults, and write docs/reliability.md")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(what, how, times, outcome): a row of docs/reliability.md")


@pytest.fixture
def all_faults(request: pytest.FixtureRequest) -> bool:
    """Whether all faults are wanted, or a quick share of them."""
    return bool(request.config.getoption("--all-faults"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    mark = item.get_closest_marker("fault")
    if mark is not None and (report.when == "call" or report.skipped):  # type: ignore[attr-defined]
        what, how, times, outcome = mark.args
        results.setdefault((what, how, outcome), []).append((report.outcome, times))  # type: ignore[attr-defined]
    return report  # type: ignore[return-value]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    # A part of the tests, or a run that was broken off, must not take the place of all.
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not config.getoption("keyword")
    ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if not (config.getoption("--all-faults") and whole and ended):
        return
    rows = []
    for (what, how, expected), reports in results.items():
        done = sum(times for state, times in reports if state == "passed")
        failed = sum(state == "failed" for state, _ in reports)
        outcome = expected if done and not failed else f"FAILED in {failed} tests" if failed else "not run here"
        rows.append((what, how, done, outcome))
    table = tabulate(rows, headers=("fault", "injected", "times", "outcome"), tablefmt="github")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\nWith torch {torch.__version__}:\n\n{table}\n\n{END}{after}")
