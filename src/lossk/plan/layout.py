"""Where the tiles of a run live, in memory or in the store, and what a rank then holds: settled before work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lossk.available import available, gigabytes
from lossk.forms.blocks import tile_spans
from lossk.forms.watched import watched_bytes
from lossk.memory import Budget, as_setting
from lossk.plan.places import BY_NAME, MEMORY, STORE, Place
from lossk.ranks.mesh import ONE_RANK, Mesh, deal_tiles, tile_shapes

BYTES = {"float32": 4, "float16": 2}
TILES_IN_MEMORY = {"tiles": MEMORY.name, "super_panel": 0}  # what a config that says nothing of it means
SLACK = 4_000_000  # Python objects, threads, and the small arrays of the diagnostics
PLANNED = 4  # vectors of all weights: w, w* and the gradient, taken before a run is planned, and one of the sampler's
STRIPE = 4096  # columns that statistics take in at a time, which bounds their float64 temporaries
OPEN_CHAIN = 72  # bytes a sample of the statistics of a chain that is not finished, where several are stepped at a time
LOG_COLUMNS = 1024  # least width of a chunk of the log where tiles are made from it: narrower ones are too many files


@dataclass(frozen=True)
class Size:
    """What the memory of a rank of a run depends on."""

    num_samples: int
    tile: int
    panel: int  # draws
    num_chains: int
    num_draws: int  # per chain
    dtype: str  # of the finished tiles
    num_weights: int
    stack_bytes: int = 0  # of the weights of draws that are evaluated together
    pass_bytes: int = 0  # of a pass at its peak: activations, and what autograd keeps of them
    mesh: Mesh = ONE_RANK  # of the run's ranks

    @property
    def side(self) -> int:
        """Of a tile, in samples."""
        return min(self.tile, self.num_samples)

    @property
    def tile_rows(self) -> int:
        return -(-self.num_samples // self.side)

    @property
    def entries(self) -> int:
        """Of the upper triangle's tiles."""
        return self.num_samples * (self.num_samples + self.side) // 2

    @property
    def own_entries(self) -> int:
        """Of the tiles of the rank that has most."""
        return self.entries if self.mesh.ranks == 1 else largest_share(self, self.mesh.ranks)

    @property
    def travelling_bytes(self) -> int:
        """Panels on their way between ranks, and the statistics of the chains that are stepped side by side."""
        if self.mesh.ranks == 1:
            return 0
        widest = -(-self.num_samples // self.mesh.shards) + 1024
        panels = 4 * self.panel * ((widest + 8) * (self.mesh.ranks + 2) + self.num_samples * self.mesh.rows)
        return panels + OPEN_CHAIN * self.num_samples * self.mesh.rows

    @property
    def draws(self) -> int:
        """Of all chains."""
        return self.num_chains * self.num_draws


def largest_share(size: Size, ranks: int) -> int:
    """Entries of the tiles of the rank that has most."""
    shapes = tile_shapes(tile_spans(size.num_samples, size.side))
    return max(sum(shapes[key][0] * shapes[key][1] for key in keys) for keys in deal_tiles(shapes, ranks))


def log_columns(num_samples: int, tile: int) -> int:
    """Width of a chunk of the log that tiles are made from: of whole tiles, so that few draws are read in vain."""
    return min(tile * -(-LOG_COLUMNS // tile), num_samples)


@dataclass(frozen=True)
class Layout:
    """Where tiles live, and the bytes expected of each part of a run beyond what the process held at the call.

    What bears on the last bit of the result (`place`, `super_panel`) is saved with a run and kept on resuming.
    """

    place: Place
    tile_bytes: int
    panel_bytes: int
    weight_bytes: int
    taken_bytes: int = 0
    super_panel: int = 0  # rows of draws in one product of a tile in the store, or of one that visits a device
    stripes: int = 0  # tile rows whose draws are held at a time; does not bear on the result
    rows_bytes: int = 0
    reached_bytes: int = 0  # the peak until now: the last draws are judged as a pilot measures
    device_bytes: int = 0  # of a CUDA device, beside data, weights and passes
    gathered_bytes: int = 0  # of the tiles of all ranks, on the one that they are gathered on

    @property
    def peak_bytes(self) -> int:
        """The expected peak."""
        parts = self.tile_bytes + self.panel_bytes + self.weight_bytes + self.rows_bytes + self.gathered_bytes
        return max(parts + self.taken_bytes, self.reached_bytes) + SLACK

    def to_dict(self) -> dict[str, Any]:
        """What a resumed run must keep."""
        return {"tiles": self.place.name, "super_panel": self.super_panel}

    def told(self) -> dict[str, Any]:
        """All of it as plain data, for other ranks."""
        return {**vars(self), "place": self.place.name}

    @classmethod
    def heard(cls, plain: Mapping[str, Any]) -> Layout:
        """The inverse of `told`."""
        return cls(**{**plain, "place": BY_NAME[plain["place"]]})


def panel_bytes(size: Size) -> int:
    """Panels, scaled rows or the copy being written, float64 temporaries, running moments, watched traces."""
    rows, n = size.panel + 1, size.num_samples
    running = 8 * n * (16 + 2 * size.num_chains)
    one = 12 * rows * n + 40 * rows * min(n, 4096) + running + watched_bytes(n, size.draws)
    return one + size.travelling_bytes


def weight_bytes(size: Size) -> int:
    """A vector of the sampler's beside w, w* and the gradient, which are taken; draws that wait together; a pass."""
    return 4 * size.num_weights + size.stack_bytes + size.pass_bytes


def in_memory(size: Size, taken: int, *, on_disk: bool) -> Layout:
    """All tiles of the rank held until the end; without a store those of all ranks are then gathered on one."""
    writing = 3 * BYTES[size.dtype] * size.side**2 if on_disk else 0
    gathered = 0 if on_disk or size.mesh.ranks == 1 else BYTES[size.dtype] * size.entries
    tiles = 4 * size.own_entries + writing
    return Layout(MEMORY, tiles, panel_bytes(size), weight_bytes(size), taken, gathered_bytes=gathered)


def in_store(size: Size, taken: int, *, super_panel: int, stripes: int) -> Layout:
    """Tiles made one at a time from the log: one being summed while the one before is compressed and written."""
    one = size.side**2
    copies = 20 if size.dtype == "float32" else 18  # bytes per entry: two sums, their casts, a padded one, a compressed
    rows = 4 * size.side * (super_panel + size.num_chains) * (stripes + 1)
    reading = 36 * size.panel * log_columns(size.num_samples, size.tile)
    return Layout(
        STORE,
        copies * one,
        panel_bytes(size),
        weight_bytes(size),
        taken,
        super_panel=super_panel,
        stripes=stripes,
        rows_bytes=rows + reading,
    )


def smallest_in_store(size: Size, taken: int, super_panel: int | None = None) -> Layout:
    """The least memory that tiles in the store can do with: one panel's draws in a product."""
    return in_store(size, taken, super_panel=super_panel or min(size.panel, size.draws), stripes=1)


def widest_in_store(size: Size, taken: int, limit: int, super_panel: int | None) -> Layout:
    """Tiles in the store with as many draws in a product, then as many tile rows held, as the limit lets.

    With all draws in one product, tile row i reads the log once from column i on; the more tile rows are held at a
    time, the fewer such readings.
    """
    base = smallest_in_store(size, taken, super_panel)
    if base.peak_bytes > limit:
        return base
    spare = limit - in_store(size, taken, super_panel=0, stripes=1).peak_bytes
    fitting = spare // (8 * size.side)
    draws = super_panel or (size.draws if fitting >= size.draws else max(fitting // size.panel, 1) * size.panel)
    if draws < size.draws:
        return in_store(size, taken, super_panel=draws, stripes=1)
    one = in_store(size, taken, super_panel=draws, stripes=1)
    per_stripe = 4 * size.side * (draws + size.num_chains)
    stripes = min(1 + max(limit - one.peak_bytes, 0) // per_stripe, size.tile_rows)
    return in_store(size, taken, super_panel=draws, stripes=stripes)


def choose_layout(
    size: Size, budget: Budget, taken: int, *, on_disk: bool, saved: Mapping[str, Any] | None = None
) -> Layout:
    """Tiles in memory if they fit, else in the store if there is one.

    Args:
        taken: bytes the call has taken already.
        on_disk: there is a store.
        saved: `Layout.to_dict` of the run that is resumed, which is kept.

    Raises:
        MemoryError: neither fits; with the numbers, and the nearest settings that would.
    """
    limit = budget.limit(taken)
    memory = in_memory(size, taken, on_disk=on_disk)
    where, super_panel = (None, None) if saved is None else (BY_NAME[saved["tiles"]], saved["super_panel"] or None)
    if where != STORE and memory.peak_bytes <= limit:
        return memory
    if where != MEMORY and on_disk:
        store = widest_in_store(size, taken, limit, super_panel)
        if store.peak_bytes <= limit:
            return store
        raise MemoryError(_refusal(size, store, budget, limit, on_disk=True, saved=where is not None))
    raise MemoryError(_refusal(size, memory, budget, limit, on_disk=on_disk, saved=where is not None))


def _refusal(size: Size, layout: Layout, budget: Budget, limit: int, *, on_disk: bool, saved: bool) -> str:
    """Why a run does not fit, and what would."""
    least, taken, where = layout.peak_bytes, layout.taken_bytes, layout.place.where
    asked = budget.asked is not None and limit == budget.asked
    free = available()
    allowed = f"memory={as_setting(limit)!r} is all it may use" if asked else free.in_words()
    already = f", of which {gigabytes(taken)} are taken already (data, weights, passes)" if 10 * taken > least else ""
    begun = ", where the run that is resumed has them" if saved else ""
    hints = "; or ".join(_hints(size, layout, limit, on_disk=on_disk, asked=asked))
    count = _fitting_samples(size, layout, limit, on_disk)
    whole = f"the kernel of {size.num_samples} samples"
    needs = f"{whole} needs {gigabytes(least)}"
    if size.mesh.ranks > 1:
        needs = f"a rank of {size.mesh.ranks} needs {gigabytes(least)} for {whole}"
    return (
        f"{needs} with its tiles in {where}{begun}{already}, and {allowed}; about {count} samples would fit, or {hints}"
    )


def _hints(size: Size, layout: Layout, limit: int, *, on_disk: bool, asked: bool) -> list[str]:
    """Other settings that would fit, the nearest first."""
    hints, taken = [], layout.taken_bytes
    outside = smallest_in_store(size, taken).peak_bytes
    tile = _fitting_tile(size, taken, limit)
    if not on_disk and outside <= limit:
        hints.append("out=PATH, with the tiles in that store")
    elif tile is not None:
        hints.append(f"tile={tile}" if on_disk else f"out=PATH and tile={tile}, with the tiles in that store")
    if asked:
        least = f"memory={as_setting(layout.peak_bytes)!r}"
        beside = not on_disk and outside < layout.peak_bytes
        hints.append(f"{least} ({as_setting(outside)!r} with out=PATH)" if beside else least)
    return [*hints, "for few draws, lossk.sample_losses and LossKernel.from_traces"]


def _fitting_samples(size: Size, layout: Layout, limit: int, on_disk: bool) -> int:
    """The most samples that would fit, by bisection."""

    def least(num_samples: int) -> int:
        smaller = replace(size, num_samples=num_samples)
        if layout.place == STORE:
            return smallest_in_store(smaller, layout.taken_bytes).peak_bytes
        return in_memory(smaller, layout.taken_bytes, on_disk=on_disk).peak_bytes

    low, high = 0, size.num_samples
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if least(middle) <= limit else (low, middle)
    return low


def _fitting_tile(size: Size, taken: int, limit: int) -> int | None:
    """The largest tile, of halves of what was asked for, that would fit in the store."""
    tile = size.tile // 2 // 16 * 16
    while tile >= 16:
        if smallest_in_store(replace(size, tile=tile), taken).peak_bytes <= limit:
            return tile
        tile = tile // 2 // 16 * 16
    return None
