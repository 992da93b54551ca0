"""The dense matrix on disk: the same numbers as `to_numpy`, in bounded memory, and never over anything."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import lossk
from lossk.cli import main as cli
from streamed_kernels import kernel_from_panels

N = 53


def make(form: str, path: Path) -> lossk.LossKernel:
    losses = 1 + np.random.default_rng(0).standard_normal((2, 6, N)).astype(np.float32) ** 2
    losses[:, :, [3, 17]] = 0.5
    if form == "tiles":
        panels = [(c, torch.from_numpy(losses[c])) for c in range(2)]
        return kernel_from_panels(panels, N, num_chains=2, num_draws=6, tile=16)
    traces = lossk.LossTraces(losses, sets={"a": slice(0, 9), "b": slice(9, N)})
    if form == "factor":
        return lossk.LossKernel.from_traces(traces)
    traces.save(path)
    return lossk.open(path)


@pytest.mark.parametrize("correlation", [False, True])
@pytest.mark.parametrize("form", ["tiles", "factor", "stored factor"])
def test_same_numbers(form: str, correlation: bool, tmp_path: Path) -> None:
    kernel = make(form, tmp_path / "k.lossk")
    whole = kernel.to_numpy(correlation=correlation)
    kernel.to_zarr(tmp_path / "k.zarr", correlation=correlation)
    group = zarr.open_group(str(tmp_path / "k.zarr"), mode="r")
    matrix = group["correlation" if correlation else "covariance"]
    np.testing.assert_array_equal(matrix[...], whole)
    assert matrix.attrs["units"] == ("1" if correlation else "nats^2")
    np.testing.assert_array_equal(group["variance"][...], kernel.variance)
    mapped = kernel.to_memmap(tmp_path / "k.npy", correlation=correlation)
    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable
    np.testing.assert_array_equal(mapped, whole)
    np.testing.assert_array_equal(np.load(tmp_path / "k.npy"), whole)
    assert {path.name for path in tmp_path.iterdir()} <= {"k.lossk", "k.zarr", "k.npy"}


def test_xarray_opens_it(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    kernel = make("tiles", tmp_path)
    kernel.to_zarr(tmp_path / "k.zarr")
    with xarray.open_zarr(tmp_path / "k.zarr") as found:
        assert found["covariance"].dims == ("row", "column")
        assert found.attrs["num_chains"] == 2
        np.testing.assert_array_equal(found["covariance"], kernel.to_numpy())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    kernel = make("tiles", tmp_path)
    (tmp_path / "taken").write_text("precious")
    for write in (kernel.to_zarr, kernel.to_memmap):
        with pytest.raises(FileExistsError, match=r"taken.*exists"):
            write(tmp_path / "taken")
        with pytest.raises(OSError, match="nowhere"):
            write(tmp_path / "nowhere" / "k")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_a_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = make("tiles", tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    for write in (kernel.to_zarr, kernel.to_memmap):
        with pytest.raises(OSError, match=r"53 x 53 matrix needs 0\.0 GB and 0\.0 GB are free"):
            write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    kernel = make("stored factor", tmp_path / "k.lossk")
    (tmp_path / "k.lossk/factor/c/0/0").unlink()
    for write in (kernel.to_zarr, kernel.to_memmap):
        with pytest.raises(lossk.StoreError, match="chunk 0 of the factor"):
            write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["k.lossk"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = make("stored factor", tmp_path / "k.lossk")
    store, out = str(tmp_path / "k.lossk"), tmp_path / "out"
    assert cli.main(["export", store, str(out) + ".zarr"]) == 0
    assert "53 x 53 covariances, nats^2" in capsys.readouterr().out
    assert cli.main(["export", store, str(out) + ".npy", "--format", "npy", "--correlation"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), kernel.to_numpy(correlation=True))
    capsys.readouterr()
    assert cli.main(["export", store, str(out) + ".zarr"]) == 2
    assert "exists; nothing is overwritten" in capsys.readouterr().err


MEASURE = """
import sys, numpy as np, torch, lossk
sys.path.insert(0, {root!r})
from bench.memory_watch import MemoryWatch
torch.set_num_threads(1)
rng = np.random.default_rng(0)
for n, name in ((100, "small"), (4000, "k")):
    with lossk.TraceWriter({folder!r} + "/" + name, num_chains=1, num_draws=5, num_samples=n, chunk=256) as writer:
        writer.append(rng.random((1, 5, n), np.float32))
    kernel = lossk.open({folder!r} + "/" + name)
    for write, end in ((kernel.to_zarr, ".zarr"), (kernel.to_memmap, ".npy")):
        watch = MemoryWatch()
        write({folder!r} + "/" + name + end, correlation=True)
        if name == "k":
            print(watch.bytes()["above"])
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory")
def test_memory_is_bounded(tmp_path: Path) -> None:
    """64 MB of matrix in tiles of 0.26 MB: below 16 MB."""
    root = Path(__file__).resolve().parents[3]
    program = MEASURE.format(root=str(root), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert all(float(line) < 16e6 for line in done.stdout.split()), done.stdout
