"""The kernel of a run, from its panels: into tiles or a factor in memory, or by way of the log into its store.

Where there is a store each rank writes some chunks of a round's panels, the first of a row its chain's state, and, once
all are durable, rank 0 the commit of all of them. So a kill costs two panels at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lossk.accumulate.exchange import Received
from lossk.accumulate.factor_pass import HeldFactor, LoggedFactor
from lossk.accumulate.host_tiles import HostTiles
from lossk.accumulate.panel import Panel
from lossk.accumulate.runlog import RunLog, commit_of
from lossk.accumulate.tile_pass import OutOfCore, Share
from lossk.accumulate.tiles import DTYPES, TileAccumulator
from lossk.disk.files import sync_tree
from lossk.errors import DistributedError
from lossk.forms.blocks import TileBlocks
from lossk.kernel.from_store import open_kernel
from lossk.kernel.kernel import LossKernel
from lossk.plan.places import DEVICE, FACTOR, MEMORY, STORE, TRACES, Place
from lossk.ranks.distributed import gather_tiles
from lossk.run.run_diagnostics import diagnosed_kernel
from lossk.run.work import Work, meta, rounds
from lossk.store.stored_tiles import CACHE_BYTES, StoredTiles, begin_tiles, write_own_tiles

SETTINGS = ("num_samples", "tile", "num_chains", "num_draws", "centering", "dtype")  # of a request, that all sums have
Key = tuple[int, int]
Sums = TileAccumulator | OutOfCore | HeldFactor | LoggedFactor


class TilesElsewhere(Mapping[Key, Tensor]):
    """The tiles, on a rank that has none of them: asking for one says where they are."""

    def __getitem__(self, key: Key) -> Tensor:
        raise DistributedError(
            "the kernel's entries are on rank 0 only; give build_kernel out=, and every rank has them"
        )

    def __iter__(self) -> Iterator[Key]:
        return iter(())

    def __len__(self) -> int:
        return 0


def make_kernel(work: Work) -> LossKernel:
    """Sample what is left to sample, and make the kernel of all draws.

    Returns:
        With a store, its kernel, on every rank; else the kernel on rank 0 and, on the others, one that knows its
        moments and diagnostics, but not its tiles.

    Raises:
        DivergedError: a chain left the neighborhood of the trained weights, on some rank.
        DistributedError: one of the ranks has stopped.
    """
    sums, log = SUMS[work.layout.place](work), work.log
    if log is not None:
        log.replay(sums, work.run.watch)
        if log.commits:
            work.bar.say(f"resuming after {sum(commit.draws for commit in log.commits)} draws")
    for received, own in rounds(work):
        _take(work, sums, received, own)
    return _finish(work, sums)


def _settings(work: Work) -> dict[str, Any]:
    """What sums in any place are told."""
    return {key: work.request[key] for key in SETTINGS}


def _factor_in_memory(work: Work) -> HeldFactor:
    return HeldFactor(**_settings(work))


def _factor_in_store(work: Work) -> LoggedFactor:
    assert work.log is not None
    return LoggedFactor(work.log, **_settings(work), share=(work.world.rank, work.world.size))


def _tiles_in_store(work: Work) -> OutOfCore:
    """Those of this rank, by way of the log; a process alone makes all."""
    assert work.log is not None
    asked, share, rank = work.budget.asked, Share(), work.world.rank
    cache = CACHE_BYTES if asked is None else min(CACHE_BYTES, asked // 4)
    if work.world.size > 1:
        share = Share(f"tiles-{rank}.jsonl", frozenset(work.shapes) - frozenset(work.owners[rank]))
    return OutOfCore(work.log, **_settings(work), layout=work.layout, cache_bytes=cache, share=share)


def _held_tiles(work: Work) -> TileAccumulator:
    """This rank's tiles: on the device of a process alone that has the room, else in host memory."""
    run, layout = work.run, work.layout
    settings = _settings(work) | {"keys": work.owners[work.world.rank], "precision": run.task.passes.update_precision}
    on_device: dict[str, Any] = {"backend": run.ops["rank_update"], "device": run.task.device}
    if layout.place == DEVICE or run.task.device.type == "cpu":
        return TileAccumulator(**settings, **on_device)
    if layout.super_panel:
        return HostTiles(**settings, **on_device, waiting=layout.super_panel)
    return TileAccumulator(**settings)


SUMS: dict[Place, Callable[[Work], Sums]] = {  # what takes panels in, for each place: this rank's share of it
    MEMORY: _held_tiles,
    DEVICE: _held_tiles,
    STORE: _tiles_in_store,
    TRACES: _factor_in_memory,
    FACTOR: _factor_in_store,
}


def _take(work: Work, sums: Sums, received: list[Received], own: Panel | None) -> None:
    """Take in a panel of each row: into the tiles, into the diagnostics, into the log."""
    timings, here = work.run.timings, []
    for part in received:
        with timings.measure("update"):
            sums.update(part.chain, part.losses)
            here.append(part.on_host())
        with timings.measure("diagnostics"):
            work.run.watch.note(here[-1].losses, part.draws)
    if work.log is not None:
        with timings.measure("store"):
            _commit(work, work.log, here, own)


def _commit(work: Work, log: RunLog, received: list[Received], own: Panel | None) -> None:
    """Make them durable: chunks dealt over all ranks, the state of a chain by the first rank of its row."""
    width, total = log.losses.chunks[2], work.request["num_samples"]
    chunks = [(part, slice(first, min(first + width, total))) for part in received for first in range(0, total, width)]
    for part, columns in chunks[work.world.rank :: work.world.size]:
        log.write_losses(part.chain, part.first_draw, part.losses, columns)
    row, shard = work.mesh.place(work.world.rank)
    if own is not None and shard == 0:
        log.write_state(own.state, len(log.commits) + [part.row for part in received].index(row))
    work.world.barrier()
    commits = [
        commit_of(
            part.chain, part.first_draw, part.step, part.draws,
            log.checksums(part.chain, part.first_draw, part.losses),
        )
        for part in received
    ]  # fmt: skip
    log.commit(commits, durable=work.world.first)


def _finish(work: Work, sums: Sums) -> LossKernel:
    world, log, timings = work.world, work.log, work.run.timings
    if isinstance(sums, OutOfCore | LoggedFactor):
        work.bar.say("all draws are logged; making the kernel from them")
        if world.first:
            sums.prepare()
        world.barrier()
    with timings.measure(work.layout.place.stage):
        blocks, moments = sums.finalize()
    if isinstance(blocks, TileBlocks) and log is None:
        blocks = _gathered(work, blocks)
    elif isinstance(blocks, TileBlocks) and log is not None:
        blocks = _written(work, log, blocks)
    if log is not None and not world.first:
        world.barrier()
        return open_kernel(log.path)
    kernel = diagnosed_kernel(work.run, blocks, moments, sums.totals, work.names)
    kernel.meta = meta(work)
    if log is None:
        return kernel
    log.finish(kernel.contents, with_tiles=False)
    world.barrier()
    return kernel if world.size == 1 else open_kernel(log.path)


def _gathered(work: Work, blocks: TileBlocks) -> TileBlocks:
    """All tiles on rank 0, none on the others."""
    held = gather_tiles(work.world, dict(blocks.tiles), work.shapes, work.owners, DTYPES[work.request["dtype"]])
    tiles = TilesElsewhere() if held is None else {key: held[key] for key in work.shapes}
    return TileBlocks(blocks.num_samples, blocks.tile, tiles)


def _written(work: Work, log: RunLog, blocks: TileBlocks) -> TileBlocks:
    """The tiles of all ranks, in the store: each has written its own, durably, into the array that rank 0 made."""
    world = work.world
    if not work.layout.place.of_log:
        with work.run.timings.measure("store"):
            if world.first:
                begin_tiles(log.path, blocks, work.request["dtype"], log.known)
            world.barrier()
            log.known |= write_own_tiles(log.path, blocks)
            world.barrier()
            sync_tree(log.path / "tiles")
    world.barrier()
    if world.size == 1:
        return blocks
    return TileBlocks(blocks.num_samples, blocks.tile, StoredTiles(log.path, work.side, CACHE_BYTES))
