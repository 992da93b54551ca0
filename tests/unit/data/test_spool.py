"""Data in mapped files: the same numbers as in memory, little of it resident, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lossk
from loader_items import Flow, Items, batches_of
from lossk.data import spool as spools
from lossk.data.data import Samples
from lossk.data.reading import read_samples
from lossk.data.room import Room
from lossk.data.spool import Spool
from lossk.memory import Budget

SAMPLER = lossk.SGLD(lr=1e-3, n_beta=5.0, localization=1.0, batch_size=8, num_burnin_steps=1, num_steps_bw_draws=2)
PLAIN = lossk.Passes()


def images(dtype: torch.dtype = torch.float32, count: int = 37) -> Items:
    """Small pictures of 3 channels, in classes."""
    numbers = torch.Generator().manual_seed(1)
    x = (torch.rand(count, 3, 6, 5, generator=numbers, device="cpu") * 8).to(dtype)
    return Items(lambda i: (x[i], i % 3), count)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).to(dtype)


def build(loader: Any, *, dtype: torch.dtype = torch.float32, **settings: Any) -> lossk.LossKernel:
    settings = {"num_chains": 1, "num_draws": 4, "tile": 16, "progress": False, "passes": PLAIN} | settings
    return lossk.build_kernel(network(dtype), loader, sampler=SAMPLER, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_a_kernel_of_spooled_data_is_that_of_resident_data(dtype: torch.dtype, memory_format: Any) -> None:
    """Bit for bit, whatever the dtype: converted and laid out channels-last in a second file."""
    passes = lossk.Passes(memory_format=memory_format, probe_batch=10)
    transform: Callable[[Any], Any] | None = (lambda x: x.float() / 8) if dtype == torch.uint8 else None
    found = [
        build(DataLoader(images(dtype), 5), data=data, passes=passes, transform=transform)
        for data in ("memory", "spool")
    ]
    assert np.array_equal(found[0].to_numpy(), found[1].to_numpy())
    assert np.array_equal(found[0].mean_loss.numpy(), found[1].mean_loss.numpy())
    assert all(a.meta["config"] == found[0].meta["config"] for a in found)
    assert not any("data =" in line for line in found[0].meta["passes_reasons"])
    assert any("data = in mapped files" in line for line in found[1].meta["passes_reasons"])


def test_the_traces_of_spooled_data_are_those_of_resident_data() -> None:
    found = [
        lossk.sample_losses(
            network(), DataLoader(images(), 5), sampler=SAMPLER, num_chains=1, num_draws=2, progress=False, data=data
        )
        for data in ("memory", "spool")
    ]
    assert torch.equal(found[0].losses, found[1].losses)


def spooled(source: Any, **settings: Any) -> Samples:
    return read_samples(source, "data", room=Room(None, "spool"), **settings)


@pytest.mark.parametrize("length", [1, 2, 40])
def test_a_stream_of_no_known_length_grows_in_files(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spools, "MOST_MAPPED", 1000)
    monkeypatch.setattr(spools, "PIECE", 700)
    samples = spooled(DataLoader(Flow(length), batch_size=None))
    resident = read_samples(DataLoader(Flow(length), batch_size=None))
    assert samples.spool is not None
    assert resident.spool is None
    assert all(torch.equal(a, b) for a, b in zip(samples.tree, resident.tree, strict=True))
    assert samples.fingerprint() == resident.fingerprint()


def test_ragged_batches_are_padded_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spools, "MOST_MAPPED", 64)
    batches = [torch.full((2, size), size) for size in (3, 1, 5, 2)]
    samples, resident = (read(batches_of(*batches), pads=True) for read in (spooled, read_samples))
    assert torch.equal(samples.tree, resident.tree)
    assert samples.alone(3).tolist() == [[1]]


def test_tensors_of_no_size_and_of_every_shape() -> None:
    parts = (torch.zeros(4, 0), torch.arange(4), torch.rand(4, 1, 1, 1), torch.rand(4, 2, 3) > 0.5)
    samples = spooled(batches_of(parts))
    assert all(torch.equal(a, b) for a, b in zip(samples.tree, parts, strict=True))


def test_pages_are_let_go_and_come_back(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    tensor = spool.empty((3000, 1000), torch.float32)
    for span in spools.pieces(tensor):
        tensor[span] = torch.arange(span.start, span.stop, dtype=torch.float32, device="cpu")[:, None]
        spool.touched(spools.PIECE)
    spool.touched(spools.MOST_MAPPED + 1)
    before = resident_file_pages()
    assert float(tensor.double().mean()) == 1499.5
    assert resident_file_pages() - before > 10_000_000
    spool.touched(spools.MOST_MAPPED + 1)
    assert abs(resident_file_pages() - before) < 1_000_000
    assert float(tensor[-1, -1]) == 2999.0


def resident_file_pages() -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1000 * int(next(line.split()[1] for line in lines if line.startswith("RssFile")))


def test_what_goes_to_files_and_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than half of memory= by itself, if its length is known and the disk has room."""

    def read(count: int, **settings: Any) -> Samples:
        source = DataLoader(Items(lambda i: torch.zeros(250), count), 100)
        return read_samples(source, "data", room=Room(Budget(asked=1_000_000, held=0), **settings))

    assert read(490, data="auto").spool is None
    assert read(510, data="auto").spool is not None
    assert read(10, data="spool", beside=tmp_path / "new" / "k.lossk").spool.folder == tmp_path  # type: ignore[union-attr]
    with pytest.raises(MemoryError, match="memory=1MB"):
        read(1010, data="memory")
    with pytest.raises(MemoryError, match="memory=1MB"):
        read_samples(DataLoader(Flow(), batch_size=None), "data", room=Room(Budget(1_000_000, 0), "auto"))
    monkeypatch.setattr(spools, "DISK_SHARE", 0.0)
    with pytest.raises(MemoryError, match="memory=1MB"):
        read(1010, data="auto")
    with pytest.raises(MemoryError, match=r"data='spool': .* has less free"):
        read(510, data="spool")


def test_an_interrupted_reading_leaves_no_file(tmp_path: Path) -> None:
    def item(i: int) -> Any:
        if i == 30:
            raise KeyboardInterrupt
        return torch.zeros(250)

    room = Room(None, "spool", tmp_path / "k.lossk")
    with pytest.raises(KeyboardInterrupt):
        read_samples(DataLoader(Items(item, 50), 10), room=room)
    assert list(tmp_path.iterdir()) == []


def test_files_have_no_names_while_they_are_used(tmp_path: Path) -> None:
    samples = read_samples(DataLoader(images(), 5), room=Room(None, "spool", tmp_path / "k.lossk"))
    assert list(tmp_path.iterdir()) == []
    assert samples.tree[0].shape == (37, 3, 6, 5)


class Decoded(Dataset[Any]):
    """A folder of pictures, one file each, a class by each subfolder."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*/*.npy"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.load(self.paths[i])).float() / 255, int(self.paths[i].parent.name)


def test_a_folder_of_two_thousand_files_with_workers(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / str(label)).mkdir()
    for i in range(2000):
        np.save(tmp_path / str(i % 3) / f"{i:04}.npy", numbers.integers(0, 256, (3, 6, 5), dtype=np.uint8))
    data = Decoded(tmp_path)
    found = [
        build(DataLoader(data, 64, num_workers=workers), data=place, num_draws=2)
        for workers, place in ((2, "spool"), (0, "memory"))
    ]
    assert np.array_equal(found[0].to_numpy(), found[1].to_numpy())


CHILD = """
import sys, torch, lossk
from torch import nn
from torch.utils.data import DataLoader, Dataset

class Made(Dataset):
    def __len__(self):
        return 8_000
    def __getitem__(self, i):
        return torch.full((6_250,), float(i % 89)), i % 3

def peak():
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6_250, 8), nn.ReLU(), nn.Linear(8, 3))
sampler = lossk.SGLD(lr=1e-5, n_beta=5.0, localization=1.0, batch_size=64, num_burnin_steps=0, num_steps_bw_draws=1)
settings = {"num_chains": 1, "num_draws": 4, "tile": 512, "form": "factor", "progress": False, "sampler": sampler,
            "passes": lossk.Passes(probe_batch=64, gradient_batch=64)}
few = torch.rand(256, 6_250), torch.arange(256) % 3
lossk.build_kernel(model, few, **settings)  # what is loaded at first use is no data
before = peak()
lossk.build_kernel(model, DataLoader(Made(), 100), memory="40MB", **settings)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_two_hundred_megabytes_of_data_within_forty(tmp_path: Path) -> None:
    """The peak of all resident memory, mapped pages included, of a process of its own."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40_000_000, done.stdout
    assert list(tmp_path.glob("lossk*")) == []
