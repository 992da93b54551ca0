"""Who of the ranks is there, before any collective: whoever is missing is named while the others wait."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from lossk.errors import DistributedError

AGAIN = timedelta(seconds=30)  # between two messages about who is missing
POLL_SECONDS = 0.1
ANSWER = timedelta(seconds=60)  # within which a store that was reached answers
Peer = dict[str, Any]  # host and pid


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Wait:
    """How long a rank waits for the others, and how it says so.

    Attributes:
        limit: until it gives up.
        again: between two messages.
        say: is given each message.
    """

    limit: timedelta
    again: timedelta = AGAIN
    say: Callable[[str], None] = _print


def meet(wait: Wait) -> tuple[Any, int, int, list[Peer]]:
    """Find the ranks that the environment describes, as torchrun sets it: (store, rank, size, peers).

    Raises:
        DistributedError: the store cannot be reached, or a rank does not come, within the limit; it is named.
        ValueError: MASTER_PORT, RANK or WORLD_SIZE is no number.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host = f"torchrun at {address}:{port}" if agent else f"rank 0, which the others meet at {address}:{port},"
    started, patience = time.monotonic(), _Patience(wait, rank)
    while True:
        try:
            if agent or rank != 0:
                _reach(address, port, host, patience)
            store: Any = dist.TCPStore(
                address, port, size, is_master=rank == 0 and not agent, timeout=ANSWER, wait_for_workers=False,
                multi_tenant=not agent,
            )  # fmt: skip
            store = dist.PrefixStore(f"lossk/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            left = wait.limit - timedelta(seconds=time.monotonic() - started)
            call, peers = roll_call(store, rank, size, Wait(left, wait.again, wait.say))
            return dist.PrefixStore(f"call {call}", store), rank, size, peers
        except RuntimeError as error:  # the store's, where who holds it has gone: it may come again
            if rank == 0 and not agent:
                raise
            patience.say_or_stop(f"{host} is gone ({' '.join(str(error).split())[:100]})")
            time.sleep(POLL_SECONDS)


def roll_call(store: Any, rank: int, size: int, wait: Wait) -> tuple[int, list[Peer]]:
    """Wait until every rank has made as many calls as this one: that number, and who they are.

    Raises:
        DistributedError: one has not within the limit, or is gone; it is named.
    """
    me = {"host": socket.gethostname(), "pid": os.getpid()}
    store.set(f"who/{rank}", json.dumps(me))
    call = store.add(f"calls/{rank}", 1)
    missing, patience = [other for other in range(size) if other != rank], _Patience(wait, rank)
    while missing := [other for other in missing if store.add(f"calls/{other}", 0) < call]:
        here = [other for other in range(size) if other not in missing]
        gone = describe_gone(_peers(store, here))
        if gone:
            raise DistributedError(f"{gone} came, and stopped before {_ranks(missing)} did; start the ranks again")
        what = f"{_ranks(missing)} of {size} {'has' if len(missing) == 1 else 'have'} not come"
        patience.say_or_stop(
            f"{what}: every rank must be running and make the same call (or pass distributed=False)",
            aloud=rank == min(here),
        )
        time.sleep(POLL_SECONDS)
    found = _peers(store, range(size))
    return call, [found[other] for other in range(size)]


@contextmanager
def telling(peers: Sequence[Peer], rank: int, wait: Wait) -> Iterator[None]:
    """Meanwhile say, again and again, which ranks of this machine have stopped: a collective only waits for them."""
    done = threading.Event()

    def watch() -> None:
        waited = 0.0
        while not done.wait(wait.again.total_seconds()):
            waited += wait.again.total_seconds()
            gone = describe_gone(dict(enumerate(peers)))
            what = f"{gone} has stopped" if gone else "the ranks have met, and do not all answer"
            wait.say(f"lossk: rank {rank}: waiting for {waited:.0f} s: {what}")

    watcher = threading.Thread(target=watch, name="lossk-ranks", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def describe_gone(peers: dict[int, Peer]) -> str:
    """The ranks whose processes, on this machine, are no longer running; "" where there is none."""
    here = socket.gethostname()
    return ", ".join(
        f"rank {rank} (process {peer['pid']} on {peer['host']})"
        for rank, peer in peers.items()
        if peer and peer["host"] == here and not _is_running(peer["pid"])
    )


class _Patience:
    """Says what is waited for, every now and then, and gives up in the end."""

    def __init__(self, wait: Wait, rank: int) -> None:
        self.wait, self.rank = wait, rank
        self.started = self.said = time.monotonic()

    def say_or_stop(self, what: str, *, aloud: bool = True) -> None:
        now = time.monotonic()
        if now - self.started > self.wait.limit.total_seconds():
            raise DistributedError(f"after {_seconds(now - self.started)} {what}")
        if now - self.said < self.wait.again.total_seconds():
            return
        self.said = now
        if aloud:  # one of those that wait is enough
            waited = _seconds(now - self.started)
            self.wait.say(f"lossk: rank {self.rank}: waiting for {waited} of {self.wait.limit}: {what}")


def _reach(address: str, port: int, host: str, patience: _Patience) -> None:
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
            return
        except OSError as error:
            patience.say_or_stop(f"{host} has not come ({error})")
            time.sleep(POLL_SECONDS)


def _peers(store: Any, ranks: Sequence[int]) -> dict[int, Peer]:
    return {rank: json.loads(store.get(f"who/{rank}")) for rank in ranks}


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s"


def _is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    except psutil.Error:
        return False
