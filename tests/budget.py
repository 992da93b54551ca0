"""No test takes long: the seconds of CPU of each, its fixtures and the processes that it waited for included.

CPU time and not wall time: a busy machine makes no test fail. A fixture counts for the first test that asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

BUDGET = 20.0  # seconds of CPU a test; what is marked `slow`, or `long` with its reason, may take more
SLACK = 2.0  # times as much before it fails: so much do seconds of CPU vary from one machine to the next, and with load
WORTH_PRINTING = 5.0  # seconds of CPU
START = pytest.StashKey[float]()


def cpu_seconds() -> float:
    """Seconds of CPU of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    item.stash[START] = cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    result = yield
    used = cpu_seconds() - item.stash[START]
    item.user_properties.append(("cpu_seconds", used))
    if used > SLACK * BUDGET and not any(item.iter_markers("slow")) and not any(item.iter_markers("long")):
        pytest.fail(f"took {used:.0f} s of CPU, of {BUDGET:.0f} that a test may take", pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the ten that took the most."""
    reports = [report for state in ("passed", "failed") for report in terminalreporter.getreports(state)]
    used = [(dict(report.user_properties).get("cpu_seconds", 0.0), report.nodeid) for report in reports]
    slowest = sorted((one for one in used if one[0] > WORTH_PRINTING), reverse=True)[:10]
    if slowest:
        terminalreporter.section(f"seconds of CPU, of {BUDGET:.0f} a test")
    for seconds, name in slowest:
        terminalreporter.write_line(f"{seconds:5.1f}  {name}")
