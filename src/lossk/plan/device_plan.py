"""What of a run a CUDA device holds: decided from free bytes and sizes alone, before work starts.

The data come first, for they are read at every draw; then the tiles, which otherwise lie in host memory and visit the
device once per many draws. Nothing here asks a device anything (`lossk.device` does), so all of it is tested without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lossk.available import gigabytes
from lossk.memory import Budget
from lossk.plan.layout import Layout, Size, choose_layout, panel_bytes, weight_bytes
from lossk.plan.places import BY_NAME, DEVICE, MEMORY
from lossk.task.passes import Passes

PASSES_SHARE = 0.25  # of what is free before any pass has run: kept for activations, gradients and workspaces
SPARE = 0.05  # of what is free: fragments, and what libraries take at first use


@dataclass(frozen=True)
class Room:
    """A device's memory as a run meets it. Bytes."""

    free: int
    working: int  # that the passes took at their peak, beyond weights and data
    beside: int = 0  # that they take more where a probe pass and a gradient run at the same time

    @property
    def usable(self) -> int:
        """What tiles and panels may take."""
        return max(int(self.free * (1 - SPARE)) - self.working, 0)


def data_fits(free: int, data_bytes: int, num_weights: int) -> bool:
    """Whether all data can be resident: they, and four copies of the weights, leave the passes their share."""
    return data_bytes + 16 * num_weights <= free * (1 - PASSES_SHARE)


def most_samples(free: int, bytes_per_sample: float) -> int:
    """Samples of one pass that fit, at least 1."""
    return max(1, int(free * (1 - SPARE) / max(bytes_per_sample, 1.0)))


def on_device(size: Size, room: Room) -> Layout | None:
    """All tiles on the device until the end, if they fit beside a panel and its float64 temporaries."""
    needed = 4 * size.entries + panel_bytes(size) + size.stack_bytes
    if needed > room.usable:
        return None
    # The host holds the copy of a panel that is logged, and two tiles on their way into a store.
    host = 8 * size.panel * size.num_samples + 2 * 4 * size.side**2
    return Layout(DEVICE, 0, host, 0, device_bytes=needed)


def waiting_draws(size: Size, room: Room) -> int:
    """Rows of centered draws that wait on the device for the tiles in host memory to visit it, or 0 if none fit.

    Every flush moves all tiles to the device and back, 8 bytes an entry; with all draws waiting there is one flush.
    """
    spare = room.usable - panel_bytes(size) - size.stack_bytes - 2 * 4 * size.side**2
    # Rows are held once as they wait and once laid one below the other for the flush.
    rows = spare // (2 * 4 * size.num_samples)
    all_of_them = size.draws + size.num_chains * -(-size.num_draws // size.panel)  # each panel brings one more
    return max(min(rows, all_of_them), 0) if rows > size.panel else 0


def choose_with_device(
    size: Size, room: Room, budget: Budget, taken: int, *, on_disk: bool, saved: Mapping[str, Any] | None = None
) -> Layout:
    """Tiles on the device if they fit, else in host memory, to be updated on the device; else as without one.

    Args:
        taken, on_disk, saved: as in `choose_layout`.

    Raises:
        MemoryError: they fit nowhere, or no longer on the device where the run that is resumed has them.
    """
    where = None if saved is None else BY_NAME[saved["tiles"]]
    if where in (None, DEVICE):
        resident = on_device(size, room)
        if resident is not None:
            resident = replace(resident, weight_bytes=weight_bytes(size), taken_bytes=taken)
            if resident.peak_bytes <= budget.limit(taken):
                return resident
        if where == DEVICE:
            raise MemoryError(
                f"the run that is resumed has its tiles on the device, where {gigabytes(room.usable)} are usable and "
                f"{gigabytes(4 * size.entries + panel_bytes(size))} are needed"
            )
    layout = choose_layout(size, budget, taken, on_disk=on_disk, saved=saved)
    if layout.place != MEMORY:
        return layout
    waiting = waiting_draws(size, room) if saved is None else saved["super_panel"]
    visiting = panel_bytes(size) + size.stack_bytes + 2 * 4 * size.side**2 + 8 * waiting * size.num_samples
    return replace(layout, super_panel=waiting, device_bytes=visiting if waiting else 0)


def overlap_bytes(size: Size, room: Room) -> int:
    """Of a probe that runs beside the next steps: its own activations, and the weights it reads unless they wait."""
    return room.beside + (0 if size.stack_bytes else 4 * size.num_weights)


def choose_overlap(passes: Passes, size: Size, layout: Layout, room: Room) -> tuple[bool, Layout, str]:
    """Whether the probe runs beside the chain's next steps: what is asked for, or if what is left has room for it.

    Returns:
        The choice, the layout with it, and both in words.

    Raises:
        MemoryError: it was asked for and does not fit.
    """
    needed, left = overlap_bytes(size, room), room.usable - layout.device_bytes
    if passes.overlap is False or passes.compile == "graphs":
        why = "CUDA graphs replay in memory of their own" if passes.compile == "graphs" else "as asked"
        return False, layout, f"overlap = no: probe and steps take turns; {why}"
    if needed <= left:
        told = f"overlap = yes: the probe runs beside the next steps, {gigabytes(needed)} more of the device"
        return True, replace(layout, device_bytes=layout.device_bytes + needed), told
    if passes.overlap is True:
        raise MemoryError(
            f"overlap=True needs {gigabytes(needed)} more of the device for a copy of the weights and a second pass, "
            f"and {gigabytes(max(left, 0))} are left; overlap='auto' has probe and steps take turns there"
        )
    return False, layout, f"overlap = no: probe and steps take turns; {gigabytes(needed)} more are not free"


def describe_room(layout: Layout, room: Room) -> str:
    """What the device will hold, in words."""
    where = {DEVICE: "tiles on the device", MEMORY: "tiles in host memory"}.get(layout.place, "no tiles")
    if layout.place == MEMORY:
        visits = f"to the device and back once per {layout.super_panel} rows of draws"
        where += f", {visits if layout.super_panel else 'updated there: the device has no room for any'}"
    return (
        f"device: {where}, {gigabytes(layout.device_bytes)} of the {gigabytes(room.free)} free; "
        f"{gigabytes(room.working)} for the passes"
    )
