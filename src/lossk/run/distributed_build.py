"""`build_kernel` on many ranks: every rank's panels go into its own tiles, or its share of the store.

Panels are taken in as `lossk.run.distributed_run` yields them: into this rank's tiles and, where there is a store, into
the log: each rank writes some chunks, the first of a row its chain's state, and, once all are durable, rank 0 the
commit of all of them. So a kill costs two panels at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lossk.accumulate.exchange import Received
from lossk.accumulate.factor_pass import HeldFactor, LoggedFactor, create_factor
from lossk.accumulate.panel import Panel
from lossk.accumulate.runlog import RunLog, commit_of
from lossk.accumulate.tile_pass import OutOfCore, Share, prepare_tiles
from lossk.accumulate.tiles import DTYPES, TileAccumulator
from lossk.disk.chunks import Chunks
from lossk.errors import DistributedError
from lossk.forms.blocks import Blocks, Moments, TileBlocks
from lossk.kernel.from_store import open_kernel
from lossk.kernel.kernel import LossKernel
from lossk.memory import Budget
from lossk.plan.layout import log_columns
from lossk.ranks.distributed import Ranks, gather_tiles
from lossk.ranks.mesh import Mesh
from lossk.run import record
from lossk.run.distributed_run import Work, chosen_by_first, meta, rounds, start_clock, usual_panel
from lossk.run.restart import until_it_lasts
from lossk.run.run import Run
from lossk.run.run_diagnostics import diagnosed_kernel
from lossk.store.store import open_finished, saved_panel
from lossk.store.stored_tiles import CACHE_BYTES, StoredTiles, create_tiles
from lossk.task.passes import Passes
from lossk.timings import Progress

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


def build_on_ranks(
    ranks: Ranks, run: Run, settings: dict[str, Any], *, passes: Passes | None, panel: int | None, path: Path | None,
    resume: bool, budget: Budget, bar: Progress,
) -> LossKernel:  # fmt: skip
    """`build_kernel`, called by every rank with its own copy of model and data.

    Args:
        settings: tile, dtype, centering and form.

    Returns:
        The kernel of the store on every rank; without a store, the kernel on rank 0 and, on the others, one that knows
        its moments and diagnostics, but not its tiles.

    Raises:
        DivergedError: a chain left the neighborhood of the trained weights, on some rank.
        DistributedError: the ranks disagree, or one of them has stopped.
    """
    start_clock(ranks, run)
    saved = ranks.decide(lambda: _look(path, resume))
    panel = panel or saved or usual_panel(ranks, run, budget)
    request = {**record.request(run), **settings, "panel": panel}
    ranks.agree({**request, "passes": None if passes is None else passes.to_dict(), "out": str(path), "resume": resume})
    if path is not None and ranks.decide(lambda: path.exists() and open_finished(path, request) is not None):
        bar.say(f"{path} is already complete")
        return open_kernel(path)
    log: RunLog | None = None
    try:
        if path is not None and ranks.first:
            log = ranks.first_makes(lambda: RunLog.open(path, request) if path.exists() else None)
        elif path is not None:
            ranks.decide(lambda: None)
        with chosen_by_first(ranks, run, request, passes, path, log, budget, bar) as (chosen, layout):
            ranks.use_device(run.task.device)
            if path is not None and ranks.first and log is None:
                read_back = layout.tiles in ("store", "factor")
                columns = log_columns(len(run.probe), request["tile"]) if read_back else None
                with run.timings.measure("store"):
                    log = RunLog.create(path, request, chosen, columns)
            if path is not None:
                ranks.barrier()
                with run.timings.measure("store"):
                    log = log or RunLog.open(path, request, lock=False)

            def attempt() -> LossKernel:
                return _accumulate(Work(ranks, run, request, layout, Mesh(**chosen["mesh"]), budget, bar, log))

            def forget() -> None:
                nonlocal log
                if log is not None and path is not None:
                    log = _restart(ranks, log, path, request, {**chosen, **run.choices.to_dict()})

            return until_it_lasts(run, bar, attempt, forget)
    finally:
        if log is not None:
            log.close()


def _restart(ranks: Ranks, log: RunLog, path: Path, request: dict[str, Any], chosen: dict[str, Any]) -> RunLog:
    """The log without draws, for other settings: rank 0 forgets them, the others read that they are gone."""
    if ranks.first:
        log.restart(request, chosen)
    ranks.barrier()
    again = log if ranks.first else RunLog.open(path, request, lock=False)
    assert again is not None
    return again


def _look(path: Path | None, resume: bool) -> int | None:
    """Refuse a taken path; the panel of a run to go on with."""
    if path is not None and path.exists() and not resume:
        raise FileExistsError(f"out={str(path)!r} exists; pass resume=True to continue it, or another path")
    return saved_panel(path)


def _accumulate(work: Work) -> LossKernel:
    sums = _sums(work)
    log, run = work.log, work.run
    if log is not None:
        log.replay(sums, run.watch)
        if log.commits:
            work.bar.say(f"resuming after {sum(len(commit['excess']) for commit in log.commits)} draws")
    for received, sent in rounds(work):
        _take(work, sums, received, sent)
    return _finish(work, sums)


def _sums(work: Work) -> Sums:
    """Where panels go: into this rank's tiles, a factor that every rank has, or by way of the log into the store."""
    num_samples, tile, rank = work.request["num_samples"], work.request["tile"], work.ranks.rank
    settings = {key: work.request[key] for key in ("num_chains", "num_draws", "centering", "dtype")}
    if work.layout.tiles == "traces":
        return HeldFactor(num_samples, tile, **settings)
    if work.layout.tiles == "factor":
        assert work.log is not None
        return LoggedFactor(work.log, num_samples, tile, **settings, share=(rank, work.ranks.size))
    own = work.owners[rank]
    if work.layout.tiles == "memory":
        return TileAccumulator(num_samples, tile, **settings, keys=own)
    assert work.log is not None
    share = Share(f"tiles-{rank}.jsonl", frozenset(work.shapes) - frozenset(own))
    return OutOfCore(work.log, num_samples, tile, **settings, layout=work.layout, cache_bytes=CACHE_BYTES, share=share)


def _take(work: Work, sums: Sums, received: list[Received], sent: Panel | None) -> None:
    """Take in a panel of each row: into the log, into the tiles, into the diagnostics."""
    run = work.run
    if work.log is not None:
        with run.timings.measure("store"):
            _commit(work, work.log, received, sent)
    for part in received:
        with run.timings.measure("update"):
            sums.update(part.chain, part.losses)
        with run.timings.measure("diagnostics"):
            run.watch.note(part.losses, part.draws)


def _commit(work: Work, log: RunLog, received: list[Received], sent: Panel | None) -> None:
    """Make them durable: chunks dealt over all ranks, the state of a chain by the first rank of its row."""
    width, total = log.losses.chunks[2], work.request["num_samples"]
    chunks = [(part, slice(first, min(first + width, total))) for part in received for first in range(0, total, width)]
    for part, columns in chunks[work.ranks.rank :: work.ranks.size]:
        log.write_losses(part.chain, part.first_draw, part.losses, columns)
    row, shard = work.mesh.place(work.ranks.rank)
    if sent is not None and shard == 0:
        log.write_state(sent.state, len(log.commits) + [part.row for part in received].index(row))
    work.ranks.barrier()
    commits = [
        commit_of(
            part.chain, part.first_draw, part.step, part.draws,
            log.checksums(part.chain, part.first_draw, part.losses),
        )
        for part in received
    ]  # fmt: skip
    log.commit(commits, durable=work.ranks.first)


def _finish(work: Work, sums: Sums) -> LossKernel:
    run, ranks, log = work.run, work.ranks, work.log
    num_samples, dtype = work.request["num_samples"], work.request["dtype"]
    from_log = isinstance(sums, OutOfCore | LoggedFactor)
    if from_log:
        assert log is not None
        work.bar.say("all draws are logged; making the kernel from them")
        if ranks.first and isinstance(sums, LoggedFactor):
            create_factor(log, sums.tile, dtype)
        elif ranks.first:
            prepare_tiles(log.path, num_samples, work.side, dtype)
        ranks.barrier()
    with run.timings.measure("tiles" if from_log else "update"):
        blocks, moments = sums.finalize()
    if log is None:
        if isinstance(blocks, TileBlocks):
            held = gather_tiles(ranks, dict(blocks.tiles), work.shapes, work.owners, DTYPES[dtype])
            tiles = TilesElsewhere() if held is None else {key: held[key] for key in work.shapes}
            blocks = TileBlocks(num_samples, work.request["tile"], tiles)
        return _kernel(work, blocks, moments, sums)
    if isinstance(blocks, TileBlocks):
        if not from_log:
            with run.timings.measure("store"):
                _write_tiles(work, log, blocks)
        ranks.barrier()
        if ranks.first:
            stored = StoredTiles(log.path, work.side, CACHE_BYTES)
            blocks = TileBlocks(num_samples, work.request["tile"], stored)
    else:
        ranks.barrier()
    if ranks.first:
        log.finish(_kernel(work, blocks, moments, sums).contents, with_tiles=False)
    ranks.barrier()
    return open_kernel(log.path)


def _write_tiles(work: Work, log: RunLog, blocks: TileBlocks) -> None:
    """Write this rank's tiles, durably, into the array that rank 0 makes."""
    if work.ranks.first:
        create_tiles(log.path, work.request["num_samples"], work.side, work.request["dtype"], compressed=False)
    work.ranks.barrier()
    array = Chunks.open(log.path, "tiles")
    for key, tile in blocks.tiles.items():
        array.write(key, tile.cpu().numpy())


def _kernel(work: Work, blocks: Blocks, moments: Moments, sums: Sums) -> LossKernel:
    kernel = diagnosed_kernel(work.run, blocks, moments, sums.totals)
    kernel.meta = meta(work)
    return kernel
