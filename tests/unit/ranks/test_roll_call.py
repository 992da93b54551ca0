"""Ranks that wait: who is missing is named, again and again, and one that comes late is not given up."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from lossk.errors import DistributedError
from lossk.ranks.roll_call import Wait, meet, roll_call, telling

HERE = socket.gethostname()


def wait(said: list[str], limit: float = 20.0, again: float = 0.25) -> Wait:
    return Wait(timedelta(seconds=limit), timedelta(seconds=again), said.append)


@pytest.fixture
def dead() -> int:
    """A process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_who_is_missing_is_said_until_all_have_come() -> None:
    store, said = dist.HashStore(), []
    found: list[Any] = []
    first = threading.Thread(target=lambda: found.append(roll_call(store, 0, 3, wait(said))))
    first.start()
    time.sleep(0.6)
    assert any("ranks 1, 2 of 3 have not come: every rank must be running" in text for text in said)
    others = [threading.Thread(target=roll_call, args=(store, rank, 3, wait([]))) for rank in (2, 1)]
    others[0].start()
    time.sleep(0.6)
    assert "lossk: rank 0: waiting for " in said[-1]
    assert "rank 1 of 3 has not come" in said[-1]
    others[1].start()
    for thread in (first, *others):
        thread.join(10)
    me = {"host": HERE, "pid": os.getpid()}
    assert found == [(1, [me] * 3)]


def test_one_of_those_that_wait_speaks() -> None:
    store, said = dist.HashStore(), {1: [], 2: []}  # type: ignore[var-annotated]
    threads = [
        threading.Thread(target=_caught, args=(roll_call, store, rank, 3, wait(said[rank], limit=1.0))) for rank in said
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert said[1]
    assert len(said[2]) <= 1  # before the first had come, at most
    assert all("rank 0 of 3 has not come" in text for text in said[1])


def _caught(function: Any, *arguments: Any) -> None:
    with pytest.raises(DistributedError, match="rank 0 of 3 has not come"):
        function(*arguments)


def test_calls_are_counted() -> None:
    store = dist.HashStore()
    assert roll_call(store, 0, 1, wait([]))[0] == 1
    store.set("who/1", json.dumps({"host": HERE, "pid": os.getpid()}))
    store.add("calls/1", 1)  # of the call before, not of this one
    with pytest.raises(DistributedError, match=r"after \d+ s rank 1 of 2 has not come"):
        roll_call(store, 0, 2, wait([], limit=0.5))
    store.add("calls/1", 2)
    assert roll_call(store, 0, 2, wait([]))[0] == 3


def test_a_rank_that_came_and_died_ends_the_wait_by_name(dead: int) -> None:
    store = dist.HashStore()
    store.set("who/1", json.dumps({"host": HERE, "pid": dead}))
    store.add("calls/1", 1)
    started = time.monotonic()
    with pytest.raises(DistributedError, match=rf"rank 1 \(process {dead} on .*\) came, and stopped before rank 2 did"):
        roll_call(store, 0, 3, wait([]))
    assert time.monotonic() - started < 10


def test_a_death_while_the_group_forms_is_said_again_and_again(dead: int) -> None:
    said: list[str] = []
    peers = [{"host": HERE, "pid": os.getpid()}, {"host": HERE, "pid": dead}, {"host": "elsewhere", "pid": dead}]
    with telling(peers, 0, wait(said, again=0.1)):
        time.sleep(0.5)
    assert len(said) >= 2
    assert all(f"rank 1 (process {dead} on {HERE}) has stopped" in text for text in said)
    quiet: list[str] = []
    with telling(peers, 0, wait(quiet, again=5.0)):
        pass
    assert quiet == []


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    for name, value in {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return monkeypatch


def test_the_absence_of_rank_0_is_said_too(launched: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with pytest.raises(DistributedError, match=r"after \d+ s rank 0, which the others meet at 127.0.0.1:\d+, has not"):
        meet(wait(said, limit=1.0))
    assert len(said) >= 2
    assert all("rank 0, which the others meet at" in text for text in said)


def test_rank_0_names_the_rank_that_never_started(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("RANK", "0")
    said: list[str] = []
    with pytest.raises(DistributedError, match="rank 1 of 2 has not come"):
        meet(wait(said, limit=1.0))
    assert len(said) >= 2


def test_a_survivor_of_a_real_start_says_it(launched: pytest.MonkeyPatch) -> None:
    """Rank 1 of 2 is alone for a while; rank 0 comes late, and both go on."""
    program = (
        "from datetime import timedelta\n"
        "import lossk.ranks.distributed as d, lossk.ranks.roll_call as r\n"
        "d.Wait = lambda limit: r.Wait(limit, timedelta(seconds=0.3))\n"
        "with d.joined(None) as ranks:\n"
        "    print(ranks.gather_json(ranks.rank))\n"
        "with d.joined(None) as ranks:\n"
        "    print(ranks.gather_json(ranks.rank))\n"
    )
    second = _start(program, "1")
    assert second.stderr is not None
    line = second.stderr.readline()
    assert "lossk: rank 1: waiting for " in line
    assert "rank 0, which the others meet at" in line
    first = _start(program, "0")
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [out for out, _ in outputs] == ["[0, 1]\n[0, 1]\n"] * 2, outputs


def _start(program: str, rank: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RANK": rank, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
