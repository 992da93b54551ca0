"""Memory that the system refuses while a call runs: the error names memory, what was planned, and what is free."""

from __future__ import annotations

import errno
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

import lossk
from lossk.cli import main as cli
from lossk.memory import Budget
from lossk.run.allocation import shortage_named

HUGE = 2**50


def no_memory() -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


WAYS: dict[str, tuple[Callable[[], Any], str]] = {
    "torch": (lambda: torch.empty(HUGE, dtype=torch.uint8), "DefaultCPUAllocator"),
    "numpy": (lambda: np.empty(HUGE, dtype=np.uint8), "Unable to allocate"),
    "python": (lambda: bytearray(2**60), "MemoryError"),
    "system": (no_memory, "Cannot allocate memory"),
    "shared": (lambda: torch.UntypedStorage._new_shared(HUGE), "unable to allocate shared memory"),
}


class Hungry:
    """Cross entropy that wants too much at its call number `at`."""

    def __init__(self, want: Callable[[], Any], at: int) -> None:
        self.want, self.at, self.calls = want, at, 0
        self.__name__ = self.__qualname__ = "Hungry"

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        if self.calls > self.at:
            self.want()
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize(("call", "way"), [*(("build", way) for way in WAYS), ("sample", "torch")])
def test_in_a_run(build: Any, problem: Any, call: str, way: str) -> None:
    """Once the run is planned; half way through its draws."""
    want, said = WAYS[way]
    loss = Hungry(want, 10**9)
    settings: dict[str, Any] = {"passes": lossk.Passes()}
    if call == "sample":
        settings |= {
            "num_chains": 2,
            "num_draws": 6,
            "sampler": lossk.SGLD(lr=1e-3, localization=1.0, num_burnin_steps=2, num_steps_bw_draws=2),
        }
        settings |= {"num_draws": 6, "progress": False}
    make = build if call == "build" else lossk.sample_losses
    make(problem.model(), problem.data, loss=loss, **settings)
    loss.at, loss.calls = loss.calls - 3, 0
    memory = "shared memory" if way == "shared" else "memory"
    with pytest.raises(
        MemoryError, match=rf"^{memory} ran out: .*{said}.* at most .* was planned, and .* free"
    ) as caught:
        make(problem.model(), problem.data, loss=loss, **settings)
    assert caught.value.__cause__ is not None
    assert ("num_workers=0" in str(caught.value)) == (way == "shared")


def test_before_the_plan(build: Any, problem: Any) -> None:
    loss = Hungry(WAYS["torch"][0], 0)
    with pytest.raises(
        MemoryError, match=r"memory ran out: .* nothing of memory='900000MB' was planned yet, and .* free"
    ):
        build(problem.model(), problem.data, loss=loss, memory="900GB")


class Samples(torch.utils.data.Dataset):
    """Sample 7 wants too much."""

    def __init__(self, want: Callable[[], Any] | None) -> None:
        self.want = want

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.want is not None and index == 7:
            self.want()
        return torch.full((4,), float(index)), index % 3


@pytest.mark.parametrize(("workers", "way"), [*((0, way) for way in WAYS), (1, "torch"), (1, "python")])
def test_in_reading(build: Any, problem: Any, workers: int, way: str) -> None:
    """A dataset's samples, also where a worker reads them."""
    loader = torch.utils.data.DataLoader(Samples(WAYS[way][0]), batch_size=5, num_workers=workers)
    with pytest.raises(MemoryError, match=r"memory ran out: loader: reading .* nothing was planned yet, and .* free"):
        build(problem.model(), loader)


@pytest.mark.parametrize(
    "said",
    [
        "DataLoader worker (pid 7) is killed by signal: Killed. ",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "unable to mmap 1048576 bytes from file </torch_7_1_0>: Cannot allocate memory (12)",
        "unable to write to file </torch_7_1_0>: No space left on device (28)",
        "std::bad_alloc",
    ],
)
def test_what_others_say(said: str) -> None:
    budget = Budget.now("3GB")
    budget.plan(2 * 10**9)
    with (
        pytest.raises(MemoryError, match=r"ran out: .* at most 2\.00 GB of memory='3000MB' was planned"),
        shortage_named(budget),
    ):
        raise RuntimeError(said)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("the kernel of 7 samples needs 2 GB"),
        RuntimeError("the model does not like these inputs"),
        OSError(errno.ENOSPC, "No space left on device", "k.lossk"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        lossk.StoreError("cannot allocate memory"),
        OSError("cannot allocate memory in static TLS block"),
    ],
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, shortage_named():
        raise error
    assert caught.value is error


def test_a_command_says_it_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lossk.cli.doctor.run_doctor", lambda options: WAYS["torch"][0]())
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lossk: memory ran out: ")
    assert " free" in said.removesuffix("\n").split("\n")[0]
    assert said.count("\n") == 1


def test_it_is_said_once() -> None:
    """A command has a run in it."""
    with pytest.raises(MemoryError, match=r"^memory ran out: \[enforce") as caught, shortage_named(), shortage_named():
        WAYS["torch"][0]()
    assert str(caught.value).count("ran out") == 1


def test_under_a_ulimit(tmp_path: Path) -> None:
    """A real limit, which others' memory reaches once the run is planned."""
    program = (
        "import resource, psutil, torch, lossk\n"
        "from torch import nn\n"
        "from lossk.memory import Budget\n"
        "torch.set_num_threads(1)\n"
        "held, planned, plan = [], [], Budget.plan\n"
        "Budget.plan = lambda budget, peak: (plan(budget, peak), planned.append(peak))\n"
        "def loss(model, batch):\n"
        "    if planned: held.append(torch.empty(2**25, dtype=torch.uint8))\n"
        "    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction='none')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 10**9, -1))\n"
        "sampler = lossk.SGLD(lr=1e-3, localization=1.0, n_beta=10.0, num_burnin_steps=2, num_steps_bw_draws=1)\n"
        "try:\n"
        "    data = torch.randn(20, 4), torch.arange(20) % 3\n"
        "    lossk.build_kernel(nn.Linear(4, 3), data, loss=loss, sampler=sampler, num_draws=100,\n"
        "                       passes=lossk.Passes(), progress=False)\n"
        "except MemoryError as error:\n"
        "    held.clear()\n"
        "    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("memory ran out: ")
    assert "DefaultCPUAllocator" in found.stdout
    assert " was planned, and " in found.stdout
    assert "are free by ulimit -v" in found.stdout
