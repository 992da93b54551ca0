"""The memory budget: what can be said, where tiles then go, and refusals that name what would do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lossk
from lossk.accumulate.panel import choose_panel
from lossk.memory import Budget, parse_memory
from lossk.plan.layout import Size, choose_layout, in_memory, in_store, log_columns, smallest_in_store

Build = Callable[..., lossk.LossKernel]
SIZE = Size(num_samples=50_000, tile=4096, panel=50, num_chains=4, num_draws=50, dtype="float32", num_weights=50_000)
BIG = 10**12


@pytest.fixture(autouse=True)
def much_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    class Free:
        available = BIG

    monkeypatch.setattr("psutil.virtual_memory", Free)


def asked(count: int | None) -> Budget:
    return Budget(count, 0)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (None, None), (1, 1), (10**9, 10**9), ("8GB", 8 * 10**9), (" 1.5 gb ", 1_500_000_000), ("60MB", 60_000_000),
        ("2GiB", 2 * 2**30), ("500 kB", 500_000), (".5TB", 5 * 10**11), ("7B", 7),
    ],
)  # fmt: skip
def test_what_can_be_said(text: Any, count: int | None) -> None:
    assert parse_memory(text) == count


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ("8 gigs", ValueError), ("8", ValueError), ("GB", ValueError), ("-8GB", ValueError), ("", ValueError),
        ("0GB", ValueError), (0, ValueError), (-1, ValueError), ("0.1B", ValueError), ("nanGB", ValueError),
        (True, TypeError), (8.0, TypeError), (b"8GB", TypeError),
    ],
)  # fmt: skip
def test_bad_values(build: Build, problem: Any, bad: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"memory must be .*got {re.escape(repr(bad))}"):
        build(problem.model(), problem.data, memory=bad)


def test_in_memory_where_it_fits() -> None:
    """13 x 14 / 2 tiles of 4096^2 float32, less what the last column lacks: 5.4 GB."""
    layout = choose_layout(SIZE, asked(None), 0, on_disk=True)
    assert layout.place.name == "memory"
    assert 5.0e9 < layout.tile_bytes < 5.7e9
    assert choose_layout(SIZE, asked(layout.peak_bytes), 0, on_disk=True) == layout


def test_the_nearest_budget_is_enough_and_no_more() -> None:
    """One byte less than what the plan needs sends tiles to the store, or is refused; every answer is within it."""
    needed = in_memory(SIZE, 0, on_disk=True).peak_bytes
    least = smallest_in_store(SIZE, 0).peak_bytes
    assert least < 0.6e9
    for budget in (least, 2 * least, needed - 1):
        layout = choose_layout(SIZE, asked(budget), 0, on_disk=True)
        assert layout.place.name == "store"
        assert layout.peak_bytes <= budget
    assert choose_layout(SIZE, asked(needed - 1), 0, on_disk=True).stripes == SIZE.tile_rows
    with pytest.raises(MemoryError, match=r"tile=2048; or memory='\d+MB'") as caught:
        choose_layout(SIZE, asked(least - 1), 0, on_disk=True)
    named = parse_memory(re.search(r"memory='(\d+MB)'; or for", str(caught.value))[1])
    assert least <= named < least + 10**6
    assert choose_layout(SIZE, asked(named), 0, on_disk=True).place.name == "store"
    smaller = dataclasses.replace(SIZE, tile=2048)
    assert choose_layout(smaller, asked(least - 1), 0, on_disk=True).place.name == "store"


def test_without_a_store() -> None:
    with pytest.raises(MemoryError, match=r"the kernel of 50000 samples needs 5\.\d+ GB.*1000MB.*out=PATH.*memory='5"):
        choose_layout(SIZE, asked(10**9), 0, on_disk=False)
    with pytest.raises(MemoryError, match=r"out=PATH and tile=\d+") as caught:
        choose_layout(SIZE, asked(10**8), 0, on_disk=False)
    count = int(re.search(r"about (\d+) samples", str(caught.value))[1])
    fits = [
        in_memory(dataclasses.replace(SIZE, num_samples=n), 0, on_disk=False).peak_bytes for n in (count, count + 1)
    ]
    assert fits[0] <= 10**8 < fits[1]


def test_what_is_free_bounds_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", type("Free", (), {"available": 10**9}))
    with pytest.raises(MemoryError, match=r"1\.00 GB are free"):
        choose_layout(SIZE, asked(8 * 10**9), 0, on_disk=False)
    assert choose_layout(SIZE, asked(8 * 10**9), 0, on_disk=True).peak_bytes <= 10**9
    assert choose_layout(SIZE, asked(None), 0, on_disk=True).peak_bytes <= 10**9


def test_what_is_taken_counts() -> None:
    """Memory the call has taken already is within its budget, and is not free any more."""
    least = smallest_in_store(SIZE, 0).peak_bytes
    with pytest.raises(MemoryError, match="of which 300 MB are taken already"):
        choose_layout(SIZE, asked(least + 10**6), 3 * 10**8, on_disk=True)
    assert choose_layout(SIZE, asked(least + 3 * 10**8), 3 * 10**8, on_disk=True).taken_bytes == 3 * 10**8


@pytest.mark.parametrize("draws", [50, 5_000, 200_000])
def test_super_panels(draws: int) -> None:
    """As many draws in a product as the budget lets, in whole panels; all of them where that is possible."""
    size = dataclasses.replace(SIZE, num_draws=draws)
    layout = choose_layout(size, asked(900_000_000), 0, on_disk=True)
    assert layout.peak_bytes <= 900_000_000
    if draws == 50:
        assert layout.super_panel == 200
        assert layout.stripes > 1
    else:
        assert layout.super_panel < size.draws
        assert layout.super_panel % size.panel == 0
        assert layout.stripes == 1
        longer = in_store(size, 0, super_panel=layout.super_panel + 2 * size.panel, stripes=1)
        assert longer.peak_bytes > 900_000_000


def test_a_resumed_run_keeps_its_layout() -> None:
    saved = {"tiles": "store", "super_panel": 100}
    layout = choose_layout(SIZE, asked(None), 0, on_disk=True, saved=saved)
    assert layout.to_dict() == saved
    with pytest.raises(MemoryError, match="in memory, where the run that is resumed has them"):
        choose_layout(SIZE, asked(10**9), 0, on_disk=True, saved={"tiles": "memory", "super_panel": 0})


@pytest.mark.parametrize("memory", [10**6, 6 * 10**7, 10**9, 10**12])
def test_the_panel_keeps_to_its_share(memory: int) -> None:
    panel = choose_panel(50_000, 200, memory)
    assert 1 <= panel <= choose_panel(50_000, 200)
    assert panel == 1 or panel * (12 * 50_000 + 40 * 4096) <= memory / 8


@pytest.mark.parametrize(
    ("samples", "tile", "width"), [(21, 16, 21), (6000, 16, 1024), (6000, 720, 1440), (9999, 4096, 4096)]
)
def test_the_log_is_cut_into_whole_tiles(samples: int, tile: int, width: int) -> None:
    assert log_columns(samples, tile) == width


def test_refused_before_sampling(build: Build, problem: Any, tmp_path: Path) -> None:
    with pytest.raises(MemoryError, match=r"memory='\d+MB'"):
        build(problem.model(), problem.data, memory="1MB", out=tmp_path / "k.lossk")
    assert not (tmp_path / "k.lossk").exists()


def test_the_plan_is_printed(build: Build, problem: Any, capsys: pytest.CaptureFixture[str]) -> None:
    build(problem.model(), problem.data, memory="4GB", progress=True)
    said = capsys.readouterr().err
    assert re.search(
        r"cost: about .*; tiles in memory, at most \d+ MB of memory \(.* tiles, .* panel, .* weights", said
    )


def test_a_full_disk_is_refused(build: Build, problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(lossk.errors.StoreError, match=r"k\.lossk' needs .* of disk and 1 kB are free"):
        build(problem.model(), problem.data, out=tmp_path / "k.lossk")
    assert not (tmp_path / "k.lossk").exists()
