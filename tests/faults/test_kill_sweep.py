"""Kills before changes to files, and losses of power after them: `make test-kills` tries all, `make test` some."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kill_sweep
import power_loss
from sweep_kinds import KINDS


def run(program: Any, folder: Path, every: int) -> list[dict[str, Any]]:
    """In a process of its own, which has no threads when it forks."""
    command = [sys.executable, str(Path(program.__file__)), str(folder), str(every)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=6000)
    assert done.returncode == 0, done.stderr
    print(done.stdout + done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_kills(found: list[dict[str, Any]]) -> None:
    assert [swept["kind"] for swept in found] == list(KINDS)
    for swept in found:
        assert (swept["raw"], swept["different"], swept["leftovers"]) == ([], [], []), swept["kind"]
        assert swept["same"] == swept["kills"] > 0


def check_losses(found: list[dict[str, Any]]) -> None:
    assert [(lost["kind"], lost["names_too"]) for lost in found] == [
        (kind, names_too) for kind in power_loss.RUNS for names_too in (False, True)
    ]
    for lost in found:
        assert lost["faults"] == [], (lost["kind"], lost["names_too"])
        assert lost["same"] == lost["states"] > 0


@pytest.mark.long("every kind of run is killed and resumed in processes of its own")
def test_killed_before_some_changes(tmp_path: Path) -> None:
    """Every 61st of each kind, another one first in each."""
    check_kills(run(kill_sweep, tmp_path, 61))


@pytest.mark.long("the disk of every kind of run is made again from its changes, and the run goes on from there")
def test_power_lost_after_some_changes(tmp_path: Path) -> None:
    check_losses(run(power_loss, tmp_path, 97))


@pytest.mark.slow
def test_killed_before_every_change(tmp_path: Path) -> None:
    check_kills(run(kill_sweep, tmp_path, 1))


@pytest.mark.slow
def test_power_lost_after_every_change(tmp_path: Path) -> None:
    check_losses(run(power_loss, tmp_path, 1))
