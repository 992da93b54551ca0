"""The processes of one run: torchrun's ranks, what they tell one another, and how one that is gone is named.

Only tensors of numbers and JSON pass between ranks; nothing is pickled. Small things go over gloo, on the CPU; panels
too, or over NCCL where the chains run on CUDA devices.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lossk.device import make_current
from lossk.errors import DistributedError
from lossk.ranks.roll_call import Wait, describe_gone, meet, roll_call, telling
from lossk.ranks.world import ALONE, Made, World
from lossk.store.witness import WITNESS, losses_apart
from lossk.timings import Timings

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets, and env:// needs
TIMEOUT = timedelta(hours=3)  # of a collective: longer than a panel, or a pilot that the others wait for, may take
LINGERING = 5.0  # seconds that a killed process may take to be gone
MEETING = timedelta(minutes=10)  # within which every rank must have called


class Ranks(World):
    """This process among the several of the run.

    Args:
        group: a gloo group of all of them.
        called: `time.perf_counter()` when this rank began to look for the others.
    """

    def __init__(self, group: Any, called: float) -> None:
        self.group, self.called = group, called
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.peers: list[dict[str, Any]] = [{}] * self.size
        self.timings = Timings()  # of the run, once there is one
        self.panel_group, self.device = group, torch.device("cpu")  # of panels
        self._current: int | None = None  # the CUDA device that was current before
        me = {"host": socket.gethostname(), "pid": os.getpid()}
        self.peers = self.gather_json(me)
        here = [rank for rank, peer in enumerate(self.peers) if peer["host"] == me["host"]]
        self.local_rank, self.local_size = here.index(self.rank), len(here)
        self.start_seconds = time.perf_counter() - called  # until all had called

    def begin(self, timings: Timings, started: float) -> float:
        """Count what this rank waits for others among the run's stages, and its time from the call on."""
        self.timings = timings
        timings.seconds["start"] = self.start_seconds
        return self.called

    def own_device(self, device: str | torch.device | None) -> str | torch.device | None:
        """A rank's own GPU where "cuda" was asked for without an index; whatever else was asked for, as it is."""
        own = torch.device("cuda", self.local_rank) if str(device) == "cuda" else device
        if own is not None:
            self._current = make_current(torch.device(own), self._current)
        return own

    def leave_device(self) -> None:
        """Give the caller's current CUDA device back."""
        if self._current is not None:
            torch.cuda.set_device(self._current)

    def use_device(self, device: torch.device) -> None:
        """Have panels travel between CUDA devices by NCCL, where the chains run on one. Called by every rank."""
        if device.type == "cuda":
            self._current = make_current(device, self._current)
            self.device = device
            self.panel_group = dist.new_group(backend="nccl", timeout=TIMEOUT)

    def barrier(self) -> None:
        """Wait for every rank."""
        with self.watched():
            dist.all_reduce(torch.zeros(1, dtype=torch.float32, device="cpu"), group=self.group)

    def broadcast_json(self, content: Any) -> Any:
        """Rank 0's content, on every rank."""
        data = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
        length = torch.tensor([len(data)], dtype=torch.int64, device="cpu")
        with self.watched():
            dist.broadcast(length, 0, group=self.group)
            if not self.first:
                data = torch.zeros(int(length), dtype=torch.uint8, device="cpu")
            dist.broadcast(data, 0, group=self.group)
        return json.loads(data.numpy().tobytes())

    def gather_json(self, content: Any) -> list[Any]:
        """Every rank's content, on every rank."""
        data = json.dumps(content).encode()
        lengths = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(self.size)]
        with self.watched():
            dist.all_gather(lengths, torch.tensor([len(data)], dtype=torch.int64, device="cpu"), group=self.group)
            longest = max(int(length) for length in lengths)
            padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
            parts = [torch.zeros(longest, dtype=torch.uint8, device="cpu") for _ in range(self.size)]
            dist.all_gather(parts, padded, group=self.group)
        return [json.loads(part.numpy().tobytes()) for part in parts]

    def decide(self, choose: Callable[[], Any]) -> Any:
        """What `choose` returns on rank 0, as JSON, on every rank; where it raises there, every rank raises."""
        if not self.first:
            said = self.broadcast_json(None)
            if "error" in said:
                raise DistributedError(f"rank 0 stopped: {said['error']}")
            return said["found"]
        try:
            found = choose()
        except Exception as error:
            self.broadcast_json({"error": " ".join(str(error).split()) or type(error).__name__})
            raise
        return self.broadcast_json({"found": found})["found"]

    def first_makes(self, make: Callable[[], Made]) -> Made | None:
        """On rank 0, what `make` returns, not as JSON; None elsewhere. Where it raises, every rank raises."""
        made: list[Made] = []
        self.decide(lambda: made.append(make()))
        return made[0] if made else None

    def agree(self, content: dict[str, Any]) -> None:
        """Refuse, on every rank, to go on unless all have the same content.

        Raises:
            DistributedError: naming the ranks, and what differs.
        """
        every = self.gather_json(content)
        differing = [
            f"rank {rank} has another {key!r} ({other.get(key)!r}, rank 0 {every[0].get(key)!r})"
            for rank, other in enumerate(every)
            for key in every[0]
            if key != WITNESS and other.get(key) != every[0].get(key)
        ]
        differing += [
            f"rank {rank}: {text}" for rank, other in enumerate(every) for text in losses_apart(every[0], other)
        ]
        if differing:
            raise DistributedError(
                "every rank must make the same call, with the same model, data and arguments, but "
                + "; ".join(differing)
            )

    def together(self, work: Callable[[], Made]) -> Made:
        """What `work` returns on this rank, unless it raises a MemoryError on one: then every rank raises one.

        Raises:
            MemoryError: naming the ranks.
        """
        problem, made = None, []
        try:
            made.append(work())
        except MemoryError as error:
            problem = str(error)
        found = [f"rank {rank}: {text}" for rank, text in enumerate(self.gather_json(problem)) if text is not None]
        if found:
            raise MemoryError("; ".join(found))
        return made[0]

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """A rank's tensor, on every rank; theirs, of the same shape and dtype, stays as it is."""
        held = tensor.cpu() if self.rank == source else torch.empty_like(tensor, device="cpu")
        with self.watched():
            dist.broadcast(held, source, group=self.group)
        return held.to(tensor.device)

    def exchange_spans(self, vector: Tensor, spans: Sequence[slice]) -> None:
        """Fill a vector, on the CPU, of which each rank has its own span."""
        with self.watched():
            for source, span in enumerate(spans):
                if span.start < span.stop:
                    dist.broadcast(vector[span], source, group=self.group)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Say which rank is gone when a collective fails, as far as this host can tell; its time counts as "wait"."""
        try:
            with self.timings.measure("wait"):
                yield
        except (RuntimeError, ValueError) as error:
            raise DistributedError(self._what_happened(error)) from error

    def _what_happened(self, error: Exception) -> str:
        gone = ""
        until = time.monotonic() + LINGERING
        while not gone and time.monotonic() < until:  # its connections are closed a little before the process is gone
            gone = describe_gone(dict(enumerate(self.peers)))
            time.sleep(0.05)
        who = gone or "another rank"
        verb = "have" if ", " in who else "has"
        reason = " ".join(str(error).split())
        return (
            f"{who} {verb} stopped, so this run ends; what is in its store is whole, and resume=True goes on "
            f"from there, with any number of ranks ({reason[:160]})"
        )


def is_launched() -> bool:
    """Whether this process is one of several: started by torchrun, or in a process group already."""
    if not dist.is_available():
        return False
    if dist.is_initialized():
        return dist.get_world_size() > 1
    return all(name in os.environ for name in LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


def rank_name() -> str:
    """Who this process is, to begin a message with; nothing for a process alone."""
    return f"rank {os.environ.get('RANK', '?')}: " if is_launched() else ""


@contextmanager
def joined(distributed: bool | None) -> Iterator[World]:
    """The processes of this run while the block lasts; a world of one for a process alone.

    A process group that exists is used, and left as it is; else one is made, of gloo, and ended.

    Args:
        distributed: None for what the process was started as; False for a process alone; True to insist.

    Raises:
        ValueError: True, and this is a process alone.
        DistributedError: a rank does not come.
    """
    if distributed is True and not is_launched():
        raise ValueError("distributed=True needs the processes of torchrun (torchrun --nproc-per-node=K ...)")
    if distributed is False or not is_launched():
        yield ALONE
        return
    own, called = not dist.is_initialized(), time.perf_counter()
    group = _form_group(own)
    try:
        ranks = Ranks(group, called)
        try:
            yield ranks
        finally:
            ranks.leave_device()
    finally:
        dist.destroy_process_group(None if own else group)  # a rank that leaves early is seen by the others at once


def _form_group(own: bool) -> Any:
    """A gloo group of all ranks, for which they wait aloud; with the default group, where it is this run's `own`."""
    try:
        if own:
            store, rank, size, peers = meet(Wait(TIMEOUT))
        else:
            rank, size = dist.get_rank(), dist.get_world_size()
            store = dist.PrefixStore("lossk", dist.distributed_c10d._get_default_store())
            _, peers = roll_call(store, rank, size, Wait(MEETING))
        with telling(peers, rank, Wait(MEETING)):
            if own:
                dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
            group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            dist.monitored_barrier(group, timeout=MEETING, wait_all_ranks=True)
    except (RuntimeError, ValueError) as error:
        if own and dist.is_initialized():
            dist.destroy_process_group()
        raise DistributedError(f"the ranks did not find one another: {error}") from error
    return group


def gather_tiles(
    world: World, own: dict[tuple[int, int], Tensor], shapes: dict[tuple[int, int], tuple[int, int]],
    owners: Sequence[Sequence[tuple[int, int]]], dtype: torch.dtype,
) -> dict[tuple[int, int], Tensor] | None:  # fmt: skip
    """All tiles on rank 0, one after the other; None elsewhere.

    Args:
        shapes: of every tile.
        owners: the tiles of each rank.
    """
    if not isinstance(world, Ranks):
        return own
    ranks, every = world, dict[tuple[int, int], Tensor]()
    for rank, keys in enumerate(owners):
        for key in keys:
            with ranks.watched():
                if ranks.rank == rank:
                    if ranks.first:
                        every[key] = own[key]
                    else:
                        dist.send(own[key].cpu().contiguous(), group_dst=0, group=ranks.group)
                        del own[key]
                elif ranks.first:
                    every[key] = torch.zeros(shapes[key], dtype=dtype, device="cpu")
                    dist.recv(every[key], group_src=rank, group=ranks.group)
    return every if ranks.first else None
