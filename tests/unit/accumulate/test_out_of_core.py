"""Tiles made in the store equal those held in memory, within rounding; the moments are the same; kills lose nothing.

The bound. Both tiles are within (D + 12) u sqrt(K_ii K_jj) of the exact sum (test_streaming.py says why), so they are
within 2 (D + 12) u sqrt(K_ii K_jj) of each other. Stored in float16 each is rounded once more, by half a unit in the
last place of an entry: together 2^-10 |K_ij|, or 2^-24 s_i s_j below float16's normal range, s at most 2^0.5 sd.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from tests.unit.accumulate.test_streaming import correlated, late, near_two, outgrown, panels, tiny, wide

import lossk
import oracles
from lossk.accumulate.panel import ChainTotals
from lossk.accumulate.runlog import RunLog, commit_of
from lossk.accumulate.tile_pass import OutOfCore, TileWriter
from lossk.accumulate.tiles import TileAccumulator
from lossk.kernel.kernel import LossKernel
from lossk.plan.layout import Layout, in_store, log_columns
from lossk.plan.places import STORE
from lossk.samplers.chain import ChainState, Draw
from lossk.store.stored_tiles import StoredTiles

Build = Callable[..., lossk.LossKernel]
Same = Callable[[lossk.LossKernel, lossk.LossKernel], None]


def make(
    losses: np.ndarray, path: Path, tile: int, *, panel: int = 4, centering: str = "chain", dtype: str = "float32",
    super_panel: int | None = None, stripes: int = 1,
) -> tuple[LossKernel, ChainTotals]:  # fmt: skip
    """The kernel of traces [C, T, N] by way of a log, with the given layout; and the totals for the criteria."""
    chains, draws, n = losses.shape
    settings: dict[str, Any] = {"num_chains": chains, "num_draws": draws, "centering": centering, "dtype": dtype}
    layout = Layout(STORE, 0, 0, 0, super_panel=super_panel or chains * draws, stripes=stripes)
    request = {"panel": panel, "num_samples": n, **settings}
    log = RunLog.create(path, request, {}, log_columns(n, tile))
    try:
        sums = OutOfCore(log, n, tile, **settings, layout=layout, cache_bytes=2**20)
        first: dict[int, int] = {}
        for chain, part in panels(losses, panel):
            start = first.get(chain, 0)
            draw = Draw(chain, start, excess_loss=0.0, distance=0.0, acceptance=1.0)
            log.write_state(ChainState(chain, start, start + len(part), torch.zeros(1)), len(log.commits))
            crcs = log.write_losses(chain, start, part)
            log.commit([commit_of(chain, start, start, [draw] * len(part), crcs)])
            first[chain] = start + len(part)
            sums.update(chain, part)
        blocks, moments = sums.finalize()
        return LossKernel(blocks, moments), sums.totals
    finally:
        log.close()


def in_memory(
    losses: np.ndarray, tile: int, *, panel: int = 4, centering: str = "chain", dtype: str = "float32"
) -> tuple[LossKernel, ChainTotals]:
    chains, draws, n = losses.shape
    sums = TileAccumulator(n, tile, num_chains=chains, num_draws=draws, centering=centering, dtype=dtype)
    for chain, part in panels(losses, panel):
        sums.update(chain, part)
    blocks, moments = sums.finalize()
    return LossKernel(blocks, moments), sums.totals


def assert_close(out: LossKernel, held: LossKernel) -> None:
    """The bound above; symmetric; the same moments to the bit."""
    for name in ("mean", "variance", "scale", "chain_mean", "lag1"):
        np.testing.assert_array_equal(
            getattr(out.contents.moments, name), getattr(held.contents.moments, name), err_msg=name
        )
    a, b = (k.contents.blocks.gather(*[torch.arange(k.num_samples)] * 2).double().numpy() for k in (out, held))
    np.testing.assert_array_equal(a, a.T)
    sd = (held.variance.sqrt() / held.contents.moments.scale).numpy()
    draws = held.num_chains * held.num_draws
    bound = 2 * (draws + 12) * oracles.UNIT32 * np.outer(sd, sd)
    if held.dtype == "float16":
        bound = bound + 2.0**-10 * np.abs(b) + 2.0**-24
    assert out.dtype == held.dtype
    assert np.all(np.abs(a - b) <= bound), np.max(np.abs(a - b) / np.maximum(bound, 1e-300))


@pytest.mark.parametrize("kind", [correlated, near_two, wide, tiny, late, outgrown], ids=lambda f: f.__name__)
@pytest.mark.parametrize("centering", ["chain", "pooled"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_equals_in_memory(kind: Callable[..., np.ndarray], centering: str, dtype: str, tmp_path: Path) -> None:
    """Also samples whose scale changes on the way (`late`, `outgrown`): 37 samples, tiles of 16, 23 draws by 4."""
    losses = kind(np.random.default_rng(5), (3, 23, 37)).astype(np.float32)
    held, totals = in_memory(losses, 16, centering=centering, dtype=dtype)
    out, same = make(losses, tmp_path / "k", 16, centering=centering, dtype=dtype)
    assert_close(out, held)
    assert torch.equal(totals.variance, same.variance)
    assert torch.equal(totals.log_likelihood, same.log_likelihood)


@pytest.mark.parametrize(("n", "tile"), [(2, 16), (16, 16), (17, 16), (53, 16), (53, 4096), (1031, 256)])
@pytest.mark.parametrize("panel", [1, 4, 11])
def test_ragged_shapes(n: int, tile: int, panel: int, tmp_path: Path) -> None:
    """N = 1031 has two chunks of the log to a panel."""
    losses = near_two(np.random.default_rng(n), (2, 11, n)).astype(np.float32)
    assert_close(make(losses, tmp_path / "k", tile, panel=panel)[0], in_memory(losses, tile, panel=panel)[0])


@pytest.mark.parametrize("centering", ["chain", "pooled"])
def test_dead_samples(centering: str, tmp_path: Path) -> None:
    losses = near_two(np.random.default_rng(14), (2, 13, 20)).astype(np.float32)
    losses[:, :, [0, 7, 19]] = np.float32([0.1, 0.0, 1e-20])
    losses[:, :, 3] = np.float32([1.0, 2.0])[:, None]  # alive under pooled centering only
    out = make(losses, tmp_path / "k", 16, centering=centering)[0]
    assert_close(out, in_memory(losses, 16, centering=centering)[0])
    dead = [0, 7, 19] + ([] if centering == "pooled" else [3])
    np.testing.assert_array_equal(out[dead, :], 0)
    np.testing.assert_array_equal(out[:, dead], 0)
    assert np.isfinite(out.correlation().numpy()).all()


@pytest.mark.parametrize("centering", ["chain", "pooled"])
def test_super_panels_and_stripes(centering: str, tmp_path: Path) -> None:
    """How many tile rows are held does not change a bit; how many draws are multiplied at a time, rounding only."""
    losses = wide(np.random.default_rng(3), (2, 23, 53)).astype(np.float32)
    held = in_memory(losses, 16, centering=centering)[0]
    one = make(losses, tmp_path / "1", 16, centering=centering)[0]
    for stripes in (2, 3, 4):
        other = make(losses, tmp_path / f"s{stripes}", 16, centering=centering, stripes=stripes)[0]
        assert all(
            torch.equal(one.contents.blocks.tiles[key], other.contents.blocks.tiles[key])
            for key in one.contents.blocks.tiles
        )
    for super_panel in (4, 9, 45):
        assert_close(
            make(losses, tmp_path / f"d{super_panel}", 16, centering=centering, super_panel=super_panel)[0], held
        )


# --- through build_kernel --------------------------------------------------------------------------------------------


@pytest.fixture
def tiles_in_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of 21 samples is smaller than the work space of one tile: no budget would send it out of core."""

    def choose(size: Any, budget: Any, taken: int, **_: Any) -> Layout:
        return in_store(size, taken, super_panel=size.draws, stripes=1)

    monkeypatch.setattr("lossk.run.cost.choose_layout", choose)


@pytest.mark.parametrize("change", [{}, {"centering": "pooled"}, {"dtype": "float16"}], ids=str)
def test_build(
    build: Build, problem: Any, tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest, assert_same_kernel: Same,
) -> None:  # fmt: skip
    held = build(problem.model(), problem.data, **change)
    request.getfixturevalue("tiles_in_store")
    out = build(problem.model(), problem.data, out=tmp_path / "k.lossk", **change)
    assert_close(out, held)
    assert str(out.diagnostics) == str(held.diagnostics)
    assert_same_kernel(lossk.open(tmp_path / "k.lossk"), out)
    assert not (tmp_path / "k.lossk" / "tiles.jsonl").exists()
    out.save(tmp_path / "again.lossk")
    assert_same_kernel(lossk.open(tmp_path / "again.lossk"), out)


def stop_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """The disk fails at tile write number `writes`."""
    write, count = TileWriter._write, [0]

    def failing(self: TileWriter, key: tuple[int, int], tile: torch.Tensor) -> None:
        if count[0] == writes:
            raise OSError("no space left, says the test")
        count[0] += 1
        write(self, key, tile)

    monkeypatch.setattr(TileWriter, "_write", failing)


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_failed_tile_write_resumes(
    build: Build, problem: Any, assert_same_kernel: Same, tiles_in_store: None, tmp_path: Path, writes: int
) -> None:
    """Three tiles: what was committed is kept, no draw is made again, and the end is the same to the bit."""
    whole = build(problem.model(), problem.data, out=tmp_path / "whole.lossk")
    path = tmp_path / "k.lossk"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, writes)
        with pytest.raises(OSError, match="says the test"):
            build(problem.model(), problem.data, out=path)
    with pytest.raises(lossk.errors.StoreError, match=rf"12 of 12 draws.*{f'{writes} tiles' if writes else ''}"):
        lossk.open(path)
    kept = {file: file.stat().st_mtime_ns for file in (path / "tiles" / "c").rglob("*") if file.is_file()}
    assert len(kept) == writes
    assert_same_kernel(build(problem.model(), problem.data, out=path, resume=True), whole)
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    assert_same_kernel(lossk.open(path), whole)


def test_killed_at_any_sync(
    build: Build, problem: Any, assert_same_kernel: Same, tiles_in_store: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The store as it lies on the disk before each sync of the tile pass and of the end, some with a torn last line."""
    path, copies, sync = tmp_path / "k.lossk", [], os.fsync

    def copying(descriptor: int) -> None:
        if (path / "tiles.jsonl").exists():
            copies.append(tmp_path / f"{len(copies)}.lossk")
            shutil.copytree(path, copies[-1])
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", copying)
    whole = build(problem.model(), problem.data, out=path)
    monkeypatch.undo()
    monkeypatch.setattr(
        "lossk.run.cost.choose_layout", lambda size, _, taken, **__: in_store(size, taken, super_panel=12, stripes=2)
    )
    assert len(copies) >= 9
    for number, copy in enumerate([*copies[:10], *copies[10::9]]):
        if number % 2 and not (copy / "complete").exists():
            with (copy / "tiles.jsonl").open("ab") as log:
                log.write(b"[0, ")
        assert_same_kernel(build(problem.model(), problem.data, out=copy, resume=True), whole)
        assert_same_kernel(lossk.open(copy), whole)


def test_a_log_chunk_that_is_gone_is_named(build: Build, problem: Any, tiles_in_store: None, tmp_path: Path) -> None:
    """Zarr reads a missing chunk as zeros: losses of 0 would be a silent wrong answer."""
    path = tmp_path / "k.lossk"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(OSError, match="says the test"):
            build(problem.model(), problem.data, out=path)
    (path / "losses" / "c" / "1" / "0" / "0").unlink()
    with pytest.raises(lossk.errors.StoreError, match="losses of chain 1, draw 0 are missing"):
        build(problem.model(), problem.data, out=path, resume=True)


def test_a_resumed_run_keeps_where_its_tiles_are(
    build: Build, problem: Any, fail_at: Any, assert_same_kernel: Same, tmp_path: Path
) -> None:
    """The saved place, super-panel and panel are kept: another choice would change the last bits."""
    loss, path = fail_at(), tmp_path / "k.lossk"
    whole = build(problem.model(), problem.data, loss=loss)
    calls, loss.calls = loss.calls, 0
    loss.at = calls * 9 // 10
    with pytest.raises(RuntimeError, match="stopped by the test"):
        build(problem.model(), problem.data, loss=loss, out=path)
    loss.at = None
    saved = json.loads((path / "config.json").read_text())["chosen"]["layout"]
    assert saved == {"tiles": "memory", "super_panel": 0}
    resumed = build(problem.model(), problem.data, loss=loss, out=path, resume=True, panel=None, memory="500MB")
    assert_same_kernel(resumed, whole)


def test_chunks_are_compressed_checked_and_only_upper(
    build: Build, problem: Any, tiles_in_store: None, tmp_path: Path
) -> None:
    build(problem.model(), problem.data, out=tmp_path / "k.lossk")
    array = zarr.open_group(str(tmp_path / "k.lossk"), mode="r")["tiles"]
    assert [type(codec).__name__ for codec in array.compressors] == ["BloscCodec", "Crc32cCodec"]
    chunks = {
        str(f.relative_to(tmp_path / "k.lossk" / "tiles" / "c"))
        for f in (tmp_path / "k.lossk" / "tiles").rglob("c/*/*")
    }
    assert chunks == {"0/0", "0/1", "1/1"}
    chunk = tmp_path / "k.lossk" / "tiles" / "c" / "0" / "1"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(lossk.StoreError, match=r"tile 0, 1 .* is damaged: .*checksum"):
        lossk.open(tmp_path / "k.lossk")[:5, 16:]


def test_the_cache_of_read_tiles_is_bounded(tmp_path: Path) -> None:
    """Room for two of six tiles: the one used least lately goes; at least one is kept whatever the bound."""
    losses = near_two(np.random.default_rng(1), (2, 5, 48)).astype(np.float32)
    expected = dict(make(losses, tmp_path / "k", 16)[0].contents.blocks.tiles.items())
    tiles = StoredTiles(tmp_path / "k", 16, cache_bytes=2 * 16 * 16 * 4)
    for key in [(0, 0), (0, 1), (0, 0), (2, 2)]:
        assert torch.equal(tiles[key], expected[key])
    assert list(tiles._cache) == [(0, 0), (2, 2)]
    tiny_cache = StoredTiles(tmp_path / "k", 16, cache_bytes=1)
    assert all(torch.equal(tiny_cache[key], expected[key]) for key in expected)
    assert len(tiny_cache._cache) == 1


# --- a process of its own --------------------------------------------------------------------------------------------

SCRIPT = """
import json, resource, sys
import torch, lossk, lossk.run.cost
from lossk.plan.layout import in_store
path, samples, tile, memory, mode = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
resume = "resume" in mode
if "forced" in mode:
    lossk.run.cost.choose_layout = lambda size, _, taken, **__: in_store(size, taken, super_panel=size.draws, stripes=2)
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
data = torch.randn(samples, 4, generator=generator), torch.arange(samples) % 3
model = torch.nn.Linear(4, 3)
torch.nn.init.normal_(model.weight, generator=generator)
torch.nn.init.zeros_(model.bias)
sampler = lossk.SGLD(lr=1e-3, n_beta=30.0, localization=5.0, batch_size=64, num_burnin_steps=1, num_steps_bw_draws=1)
settings = dict(sampler=sampler, num_chains=2, num_draws=20, tile=tile, backend="torch", passes=lossk.Passes())

def build(data, out, **more):
    return lossk.build_kernel(model, data, out=out, **settings, **more)

def resident():
    with open("/proc/self/status") as status:
        found = dict(line.split(":", 1) for line in status)
    return 1024 * int(found["VmHWM"].split()[0]), 1024 * int(found["VmRSS"].split()[0])

build((data[0][:100], data[1][:100]), path + ".small", progress=False, resume=resume)  # what a first call loads
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")  # the high-water mark starts again
_, before = resident()
kernel = build(data, path, memory=memory, progress=True, resume=resume)
peak = resident()[0] - before
print(json.dumps({"peak": peak, "planned": kernel.meta["memory"]["planned_peak_bytes"]}))
"""


needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")


def run_script(path: Path, samples: int, tile: int, memory: str, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(path), str(samples), str(tile), memory, mode]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@needs_proc
def test_the_budget_is_kept(tmp_path: Path) -> None:
    """N = 6,000 within 60 MB, where its tiles would take 72 MB and more: the measured peak, and what was printed.

    The process holds pages that its allocator keeps of what was freed, 29 to 32 MB in ten runs of a plan of 33: the
    budget holds in every run, the plan in the better of two.
    """
    peaks = []
    for path in (tmp_path / "k.lossk", tmp_path / "again.lossk"):
        printed, said = run_script(path, 6000, 1024, "60MB", "new").communicate(timeout=120)
        assert "tiles in the store" in said, said
        found = json.loads(printed)
        assert max(found["peak"], found["planned"]) <= 60e6, (found, said)
        peaks.append(found["peak"])
    assert min(peaks) <= found["planned"], (peaks, said)
    kernel = lossk.open(tmp_path / "k.lossk")
    losses = np.asarray(zarr.open_array(str(tmp_path / "k.lossk" / "losses"), mode="r")[:, :, 500:520])
    exact = oracles.two_pass(losses)
    np.testing.assert_allclose(kernel[500:520, 500:520], exact, atol=1e-4 * np.diag(exact).max())


@needs_proc
def test_sigkill_in_the_tile_pass(tmp_path: Path) -> None:
    """Killed as soon as some tiles are durable; the resumed store has the same tiles, byte for byte."""
    whole = run_script(tmp_path / "whole.lossk", 1500, 64, "60MB", "forced")
    said = whole.communicate(timeout=120)[1]
    assert whole.returncode == 0, said
    path = tmp_path / "k.lossk"
    victim = run_script(path, 1500, 64, "60MB", "forced")
    done = path / "tiles.jsonl"
    while victim.poll() is None and not (done.exists() and done.read_bytes().count(b"\n") > 5):
        time.sleep(0.001)
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=60)
    assert victim.returncode == -signal.SIGKILL, "it was done before it could be killed"
    assert not (path / "complete").exists()
    again = run_script(path, 1500, 64, "60MB", "forced resume")
    said = again.communicate(timeout=120)[1]
    assert again.returncode == 0, said
    for name in ("tiles", "losses", "mean", "variance", "chain_mean", "scale", "lag1"):
        files = [
            f.relative_to(tmp_path / "whole.lossk") for f in (tmp_path / "whole.lossk" / name).rglob("*") if f.is_file()
        ]
        assert files
        for file in files:
            assert (path / file).read_bytes() == (tmp_path / "whole.lossk" / file).read_bytes(), file
