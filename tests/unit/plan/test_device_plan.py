"""What a CUDA device holds, as arithmetic; and data that come to a device batch by batch, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import lossk
from lossk.data.data import Samples
from lossk.device import SideStream, ahead, free_bytes, peak_bytes, settle
from lossk.memory import Budget
from lossk.plan import device_room
from lossk.plan.device_plan import (
    Room,
    choose_with_device,
    data_fits,
    describe_room,
    most_samples,
    on_device,
    waiting_draws,
)
from lossk.plan.layout import Size, panel_bytes
from lossk.task.losses import resolve_loss
from lossk.task.task import Task

CPU = torch.device("cpu")
GB = 10**9
# N = 50,000 and 4 x 200 draws of a network of 7 million weights; 5 GB of tiles.
IMAGENET = Size(50_000, 4096, 200, 4, 200, "float32", 7_000_000)
HOST = Budget(40 * GB, 0)


def plan(free: float, working: float = 4 * GB, *, budget: Budget = HOST, size: Size = IMAGENET, **options: Any) -> Any:
    room = Room(int(free), int(working))
    layout = choose_with_device(size, room, budget, 0, on_disk=options.pop("on_disk", False), **options)
    return layout, describe_room(layout, room)


def test_data_come_first() -> None:
    """50,000 images of 224 x 224 in uint8 are 7.5 GB: resident on 80 GB, streamed on 8."""
    images = 50_000 * 224 * 224 * 3
    assert data_fits(78 * GB, images, 7_000_000)
    assert not data_fits(8 * GB, images, 7_000_000)
    assert data_fits(4 * 100, 300, 0)
    assert not data_fits(4 * 100, 301, 0)
    assert not data_fits(4 * 100, 300, 1)


def test_tiles_on_a_device_that_has_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lossk.memory.psutil.virtual_memory", lambda: type("M", (), {"available": 100 * GB}))
    layout, told = plan(60 * GB)
    assert layout.place.name == "device"
    assert layout.device_bytes == 4 * IMAGENET.entries + panel_bytes(IMAGENET)
    assert layout.device_bytes > 5 * GB
    assert layout.peak_bytes < GB  # the host holds a panel and two tiles
    assert "tiles on the device" in told
    assert "4.00 GB for the passes" in told


def test_tiles_in_host_memory_where_it_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """7 GB free, 4 of them for the passes: all 804 rows of draws wait, each tile makes one journey."""
    monkeypatch.setattr("lossk.memory.psutil.virtual_memory", lambda: type("M", (), {"available": 100 * GB}))
    layout, told = plan(7 * GB)
    assert layout.place.name == "memory"
    assert layout.super_panel == 800 + 4
    assert "once per 804 rows of draws" in told
    tight, _ = plan(4.7 * GB)
    assert 200 < tight.super_panel < 804
    none, told = plan(4.2 * GB)
    assert (none.super_panel, none.device_bytes) == (0, 0)
    assert "no room for any" in told


def test_tiles_in_the_store_where_the_host_has_no_room_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lossk.memory.psutil.virtual_memory", lambda: type("M", (), {"available": 100 * GB}))
    layout, told = plan(7 * GB, budget=Budget(3 * GB, 0), on_disk=True)
    assert layout.place.name == "store"
    assert "no tiles" in told
    with pytest.raises(MemoryError, match="the kernel of 50000 samples needs"):
        plan(7 * GB, budget=Budget(3 * GB, 0))


def test_the_edge_is_where_it_says() -> None:
    needed = 4 * IMAGENET.entries + panel_bytes(IMAGENET)
    free = int(needed / 0.95) + 2
    assert on_device(IMAGENET, Room(free, 0)) is not None
    assert on_device(IMAGENET, Room(free, 10)) is None
    stacked = replace(IMAGENET, stack_bytes=10)
    assert on_device(stacked, Room(free, 0)) is None


def test_more_room_never_waits_less() -> None:
    counts = [waiting_draws(IMAGENET, Room(free * 10**8, 0)) for free in range(1, 60)]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 804


def test_a_resumed_run_keeps_its_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lossk.memory.psutil.virtual_memory", lambda: type("M", (), {"available": 100 * GB}))
    for free in (60 * GB, 7 * GB):
        first, _ = plan(free)
        again, _ = plan(65 * GB, saved=first.to_dict())
        assert again.to_dict() == first.to_dict()
    first, _ = plan(60 * GB)
    with pytest.raises(MemoryError, match="has its tiles on the device"):
        plan(7 * GB, saved=first.to_dict())


def test_samples_of_a_pass() -> None:
    assert most_samples(GB, 1e6) == 950
    assert most_samples(10, 1e6) == 1
    assert most_samples(GB, 0.0) == int(0.95 * GB)


def test_on_a_cpu_nothing_is_asked_of_a_device(problem: Any) -> None:
    settle(CPU)
    ran: list[int] = []
    assert peak_bytes(CPU, lambda: ran.append(1)) == 0
    assert ran == [1]
    assert free_bytes(CPU) > 0
    side = SideStream(CPU)
    with side.after(torch.zeros(1)):
        ran.append(2)
    side.join()
    assert ran == [1, 2]
    assert device_room.place_data(Task(problem.model(), resolve_loss("cross_entropy")), []) == []


# --- data that are streamed --------------------------------------------------------------------------------------


def test_the_next_batch_is_under_way_before_this_one_is_given() -> None:
    moved: list[int] = []

    def move(item: int) -> int:
        moved.append(item)
        return -item

    given = []
    for item in ahead([1, 2, 3], move, lambda _: [], CPU):
        given.append((item, len(moved)))
    assert given == [(-1, 2), (-2, 3), (-3, 3)]
    assert list(ahead([], move, lambda _: [], CPU)) == []


@pytest.mark.parametrize("size", [1, 4, 21, 50])
def test_streamed_batches_are_the_same(problem: Any, size: int) -> None:
    held = Samples(problem.data, 21, transform=lambda x: x * 2)
    streamed = replace(held, device=CPU)
    for (a, (x, y)), (b, (u, v)) in zip(held.batches(size), streamed.batches(size), strict=True):
        assert a == b
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    index = torch.tensor([3, 1])
    assert torch.equal(held[index][0], streamed[index][0])


def test_a_kernel_of_streamed_data(
    build: Callable[..., lossk.LossKernel], problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streaming path from end to end, its device being the CPU: the same numbers."""
    expected = build(problem.model(), problem.data)

    def stream(task: Task, every: Any) -> list[str]:
        task.streams = True
        return ["data = streamed: in a test"]

    def placed(task: Task, samples: Samples) -> Samples:
        return replace(place(task, samples), device=task.device)

    place = Task.place
    monkeypatch.setattr("lossk.run.prepare.place_data", stream)
    monkeypatch.setattr(Task, "place", placed)
    found = build(problem.model(), problem.data)
    np.testing.assert_array_equal(found.to_numpy(), expected.to_numpy())
    assert "data = streamed: in a test" in found.meta["passes_reasons"]
