"""The budget of CPU that a test has: whoever goes beyond fails, its children counted, and is printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONFTEST = """
import sys; sys.path.insert(0, {folder!r})
import budget
budget.BUDGET, budget.SLACK, budget.WORTH_PRINTING = 0.5, 1.0, 0.2
def pytest_configure(config):
    config.addinivalue_line("markers", "long(why): ...")
    config.pluginmanager.register(budget)
"""
TESTS = """
import subprocess, sys, time
import pytest
SPIN = "import time\\nwhile time.process_time() < 0.7: pass"
def test_quick(): pass
def test_that_waits(): time.sleep(1.0)
def test_child(): subprocess.run([sys.executable, "-c", SPIN], check=True)
@pytest.mark.long("why")
def test_long(): subprocess.run([sys.executable, "-c", SPIN], check=True)
"""


def test_a_child_beyond_the_budget_fails_and_time_without_work_does_not(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.format(folder=str(Path(__file__).parents[1])))
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, "-c", "/dev/null"]
    told = subprocess.run([*command, tmp_path], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert "1 failed, 3 passed" in told.stdout, told.stdout + told.stderr
    assert "took 1 s of CPU" in told.stdout
    printed = told.stdout.split("seconds of CPU, of ")[-1]
    assert "::test_child" in printed
    assert "::test_long" in printed
    assert "::test_that_waits" not in printed
