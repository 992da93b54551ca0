"""`build_kernel` on many ranks: rank 0 decides, every rank samples its share, panels are gathered, tiles are dealt.

A step of the loop is one panel of each row of the mesh. While a panel is on its way the next one is computed; then it
goes into this rank's tiles and, where there is a store, into the log: each rank writes some chunks, the first of a row
its chain's state, and, once all are durable, rank 0 the commit of all of them. So a kill costs two panels at most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr
from torch import Tensor

from lossk import record
from lossk.blocks import Moments, TileBlocks, tile_spans
from lossk.disk import sync
from lossk.distributed import Ranks, gather_tiles
from lossk.distributed_plan import peak_of, plan_share, rank_limit
from lossk.errors import DistributedError
from lossk.exchange import Exchange, Received
from lossk.kernel import LossKernel
from lossk.layout import Layout, log_columns
from lossk.memory import Budget, gigabytes
from lossk.mesh import Mesh, choose_mesh, cut_probe, deal_chains, deal_tiles, schedule, tile_shapes
from lossk.panel import Panel, choose_panel
from lossk.passes import Passes
from lossk.run import Run
from lossk.runlog import RunLog, commit_of
from lossk.store import open_finished, open_kernel, saved_panel
from lossk.stored_tiles import CACHE_BYTES, CHECKED, StoredTiles, chunk_path, create_tiles, write_tile
from lossk.tile_pass import OutOfCore, Share, prepare_tiles
from lossk.tiles import DTYPES, TileAccumulator
from lossk.timings import Progress

Key = tuple[int, int]


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


@dataclass(frozen=True)
class Work:
    """What one rank of a run works with."""

    ranks: Ranks
    run: Run
    request: dict[str, Any]
    layout: Layout
    mesh: Mesh
    budget: Budget
    bar: Progress
    log: RunLog | None

    @property
    def side(self) -> int:
        """Of a tile, in samples."""
        return min(self.request["tile"], self.request["num_samples"])

    @property
    def shapes(self) -> dict[Key, tuple[int, int]]:
        """Of all tiles."""
        return tile_shapes(tile_spans(self.request["num_samples"], self.side))

    @property
    def owners(self) -> list[list[Key]]:
        """The tiles of each rank."""
        return deal_tiles(self.shapes, self.ranks.size)


def build_on_ranks(
    ranks: Ranks, run: Run, settings: dict[str, Any], *, passes: Passes | None, panel: int | None, path: Path | None,
    resume: bool, budget: Budget, bar: Progress,
) -> LossKernel:  # fmt: skip
    """`build_kernel`, called by every rank with its own copy of model and data.

    Args:
        settings: tile, dtype and centering.

    Returns:
        The kernel of the store on every rank; without a store, the kernel on rank 0 and, on the others, one that knows
        its moments and diagnostics, but not its tiles.

    Raises:
        DistributedError: the ranks disagree, or one of them has stopped.
    """
    saved = ranks.decide(lambda: _look(path, resume))
    at_a_time = min(ranks.size, run.num_chains)
    usual = max(1, choose_panel(len(run.probe), run.num_draws, budget.asked) // at_a_time)
    request = {**record.request(run), **settings, "panel": panel or saved or usual}
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
        with _chosen(ranks, run, request, passes, path, log, budget, bar) as (chosen, layout):
            ranks.use_device(run.task.device)
            if path is not None and ranks.first and log is None:
                columns = log_columns(len(run.probe), request["tile"]) if layout.tiles == "store" else None
                log = RunLog.create(path, request, chosen, columns)
            if path is not None:
                ranks.barrier()
                log = log or RunLog.open(path, request, lock=False)
            return _accumulate(Work(ranks, run, request, layout, Mesh(**chosen["mesh"]), budget, bar, log))
    finally:
        if log is not None:
            log.close()


def _look(path: Path | None, resume: bool) -> int | None:
    """Refuse a taken path; the panel of a run to go on with."""
    if path is not None and path.exists() and not resume:
        raise FileExistsError(f"out={str(path)!r} exists; pass resume=True to continue it, or another path")
    return saved_panel(path)


@contextmanager
def _chosen(
    ranks: Ranks, run: Run, request: dict[str, Any], passes: Passes | None, path: Path | None, log: RunLog | None,
    budget: Budget, bar: Progress,
) -> Iterator[tuple[dict[str, Any], Layout]]:  # fmt: skip
    """What rank 0 chooses, as a process alone would, on every rank, with the task entered."""
    if not ranks.first:
        run.arrange(None, {"passes": ranks.decide(lambda: None)})
        with run.task:
            run.evaluate_anchor()  # while rank 0 has its pilot
            chosen, plain = ranks.decide(lambda: None)
            run.settle(chosen)
            layout = Layout(**plain)
            ranks.all_or_none(_too_large(ranks, request, layout, budget, path))
            yield chosen, layout
        return
    before = None if log is None else log.chosen
    waiting = True
    try:
        run.arrange(passes, before)
        ranks.broadcast_json({"found": run.task.passes.to_dict()})
        with run.task:
            run.tune(before, bar)
            run.announce(bar)
            step = run._time_a_step()
            mesh = _mesh(run, ranks, log, step)
            layout = plan_share(
                run,
                request,
                mesh,
                ranks.local_size,
                budget,
                bar,
                step,
                path,
                None if before is None else before["layout"],
            )
            chosen = {**record.chosen(run), "layout": layout.to_dict(), "mesh": dataclasses.asdict(mesh)}
            waiting = False
            ranks.broadcast_json({"found": [chosen, dataclasses.asdict(layout)]})
            ranks.all_or_none(_too_large(ranks, request, layout, budget, path))
            yield chosen, layout
    except Exception as error:
        if waiting:
            ranks.broadcast_json({"error": " ".join(str(error).split())})
        raise


def _mesh(run: Run, ranks: Ranks, log: RunLog | None, step_seconds: float) -> Mesh:
    """The mesh of the run that is resumed, if it had as many ranks; else the quickest."""
    saved = None if log is None or log.chosen is None else log.chosen.get("mesh")
    if saved is not None and Mesh(**saved).ranks == ranks.size:
        return Mesh(**saved)
    draws = dict.fromkeys(range(run.num_chains), 0) if log is None else log.unfinished()
    steps_per_draw = run.sampler.steps(run.num_draws) / run.num_draws
    return choose_mesh(
        ranks.size,
        [run.num_draws - made for made in draws.values()],
        steps_per_draw * step_seconds,
        run.timings.seconds["anchor"] / len(run.train) * run.probe.num_samples,
    )


def _too_large(ranks: Ranks, request: dict[str, Any], layout: Layout, budget: Budget, path: Path | None) -> str | None:
    """Why this rank cannot hold its share, or None."""
    needed = peak_of(layout, request, ranks.first and path is None) - layout.taken_bytes
    taken = budget.taken()
    limit = rank_limit(budget, taken, ranks.local_size) - taken
    if needed <= limit:
        return None
    return f"needs {gigabytes(needed)} more for its share of the kernel, and {gigabytes(limit)} are left for it"


def _accumulate(work: Work) -> LossKernel:
    sums = _sums(work)
    log, run, panel = work.log, work.run, work.request["panel"]
    if log is not None:
        for commit in log.commits:
            losses = log.read_panel(commit)
            sums.update(commit["chain"], losses)
            run.watch.note(losses, log.read_draws(commit))
        if log.commits:
            work.bar.say(f"resuming after {sum(len(commit['excess']) for commit in log.commits)} draws")
    made = dict.fromkeys(range(run.num_chains), 0) if log is None else log.unfinished()
    dealt = deal_chains(sorted(made), work.mesh)
    steps = schedule(dealt, made, panel, run.num_draws)
    row, shard = work.mesh.place(work.ranks.rank)
    probes = cut_probe(run.probe, run.task.passes.probe_batch, work.mesh.shards)
    exchange = Exchange(work.ranks, work.mesh, [probe.rows for probe in probes], panel)
    starts = {chain: None if log is None else log.state_of(chain) for chain in dealt[row]}
    done = sum(start.step for start in starts.values() if start is not None)
    work.bar.start(len(starts) * run.sampler.steps(run.num_draws), done)
    own = (
        part
        for chain, start in starts.items()
        for part in run.chain_panels(chain, probes[shard], panel, work.bar, start)
    )
    sent: Panel | None = None
    for number in range(max(map(len, steps)) + 1):
        items = [items[number] if number < len(items) else None for items in steps]
        part = next(own) if items[row] is not None else None
        if number > 0:
            with run.timings.measure("wait"):
                received = exchange.receive()
            _take(work, sums, received, sent)
        if any(items):
            exchange.send(items, part)
            sent = part
    return _finish(work, sums)


def _sums(work: Work) -> TileAccumulator | OutOfCore:
    """Where panels go: into this rank's tiles, or by way of the log into the store."""
    num_samples, tile, rank = work.request["num_samples"], work.request["tile"], work.ranks.rank
    settings = {key: work.request[key] for key in ("num_chains", "num_draws", "centering", "dtype")}
    own = work.owners[rank]
    if work.layout.tiles == "memory":
        return TileAccumulator(num_samples, tile, **settings, keys=own)
    assert work.log is not None
    share = Share(f"tiles-{rank}.jsonl", frozenset(work.shapes) - frozenset(own))
    return OutOfCore(work.log, num_samples, tile, **settings, layout=work.layout, cache_bytes=CACHE_BYTES, share=share)


def _take(work: Work, sums: TileAccumulator | OutOfCore, received: list[Received], sent: Panel | None) -> None:
    """Take in a panel of each row: into the log, into the tiles, into the diagnostics."""
    run = work.run
    if work.log is not None:
        with run.timings.measure("store"):
            _commit(work, work.log, received, sent)
    for part in received:
        with run.timings.measure("update"):
            sums.update(part.chain, part.losses)
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
    commits = [commit_of(part.chain, part.first_draw, part.step, part.draws) for part in received]
    log.commit(commits, durable=work.ranks.first)


def _finish(work: Work, sums: TileAccumulator | OutOfCore) -> LossKernel:
    run, ranks, log = work.run, work.ranks, work.log
    num_samples, dtype = work.request["num_samples"], work.request["dtype"]
    out_of_core = isinstance(sums, OutOfCore)
    if out_of_core:
        assert log is not None
        work.bar.say("all draws are logged; making the tiles from them")
        if ranks.first:
            prepare_tiles(log.path, num_samples, work.side, dtype)
        ranks.barrier()
    with run.timings.measure("tiles" if out_of_core else "update"):
        blocks, moments = sums.finalize()
    if log is None:
        held = gather_tiles(ranks, dict(blocks.tiles), work.shapes, work.owners, DTYPES[dtype])
        tiles = TilesElsewhere() if held is None else {key: held[key] for key in work.shapes}
        return _kernel(work, TileBlocks(num_samples, work.request["tile"], tiles), moments, sums)
    if not out_of_core:
        with run.timings.measure("store"):
            _write_tiles(work, log, blocks)
    ranks.barrier()
    if ranks.first:
        array = zarr.open_array(log.path / "tiles", mode="r")
        stored = TileBlocks(num_samples, work.request["tile"], StoredTiles(array, work.side, CACHE_BYTES))
        log.finish(_kernel(work, stored, moments, sums), with_tiles=False)
    ranks.barrier()
    return open_kernel(log.path)


def _write_tiles(work: Work, log: RunLog, blocks: TileBlocks) -> None:
    """Write this rank's tiles, durably, into the array that rank 0 makes."""
    if work.ranks.first:
        group = zarr.open_group(log.path, mode="r+")
        create_tiles(group, work.request["num_samples"], work.side, work.request["dtype"], CHECKED)
    work.ranks.barrier()
    array = zarr.open_array(log.path / "tiles", mode="r+", config={"write_empty_chunks": True})
    for key, tile in blocks.tiles.items():
        write_tile(array, work.side, key, tile)
        sync(chunk_path(log.path, key))


def _kernel(work: Work, blocks: TileBlocks, moments: Moments, sums: TileAccumulator | OutOfCore) -> LossKernel:
    run = work.run
    kernel = LossKernel(
        blocks,
        moments,
        diagnostics=run.diagnose(moments, sums.totals),
        tokens=run.probe.tokens,
        sets=run.probe.sets,
    )
    kernel.meta = {
        **record.meta(run, work.request),
        "memory": {**work.layout.to_dict(), "planned_peak_bytes": work.layout.peak_bytes},
        "ranks": {"size": work.ranks.size, **dataclasses.asdict(work.mesh)},
    }
    return kernel
