"""Shared fixtures: uninitialised memory is poisoned, a small call of build_kernel, and small known problems."""

from __future__ import annotations

import os

# Triton reads it when a kernel is defined, so before anything here imports triton. TRITON_INTERPRET=0 tests on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import budget
import lossk


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(budget)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The problems here are tiny: threads only add time, and the order of summation is then the same everywhere.

    Before each test: benchmarks leave the number that they found best, and two processes with two threads each on two
    cores wait for one another at every operation.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty returns NaN: code that reads what it never wrote fails instead of passing by luck."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            with torch.no_grad():
                return out.fill_(float("nan")) if out.is_floating_point() else out

        return empty

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What the tests themselves draw from the global generators is the same on every run."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture
def triton_device() -> torch.device:
    """Where the Triton kernels are tested: the CPU, in Triton's interpreter, or with TRITON_INTERPRET=0 the GPU."""
    return torch.device("cuda" if os.environ["TRITON_INTERPRET"] == "0" else "cpu")


def sgld(**changes: Any) -> lossk.SGLD:
    """A short chain in which nothing is automatic."""
    settings: dict[str, Any] = {
        "lr": 1e-3,
        "n_beta": 30.0,
        "localization": 5.0,
        "batch_size": 4,
        "num_burnin_steps": 3,
        "num_steps_bw_draws": 2,
    }
    return lossk.SGLD(**{**settings, **changes})


@pytest.fixture(name="sgld")
def sgld_fixture() -> Callable[..., lossk.SGLD]:
    return sgld


@pytest.fixture
def build() -> Callable[..., lossk.LossKernel]:
    """build_kernel with small defaults: 2 chains of 6 draws, tile 16, panels of 3, the torch backend."""

    def call(model: Any, loader: Any, **changes: Any) -> lossk.LossKernel:
        settings: dict[str, Any] = {
            "sampler": sgld(),
            "num_chains": 2,
            "num_draws": 6,
            "tile": 16,
            "panel": 3,
            "backend": "torch",
            "progress": False,
        }
        return lossk.build_kernel(model, loader, **{**settings, **changes})

    return call


@dataclass
class Classification:
    """Three Gaussian classes in four dimensions and a small network near nothing in particular."""

    num_samples: int = 21
    seed: int = 3
    inputs: Tensor = field(init=False)  # [N, 4] float32
    targets: Tensor = field(init=False)  # [N] int64

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.targets = torch.arange(self.num_samples) % 3
        centers = torch.randn(3, 4, generator=generator)
        self.inputs = centers[self.targets] + torch.randn(self.num_samples, 4, generator=generator)

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.targets

    def model(self) -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture
def problem() -> Classification:
    return Classification()


class FailAt:
    """Cross entropy that raises at its call number `at`; counts its calls."""

    def __init__(self, at: int | None = None, error: type[BaseException] = RuntimeError) -> None:
        self.at, self.error, self.calls = at, error, 0
        self.__name__ = self.__qualname__ = "FailAt"

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        if self.at is not None and self.calls == self.at:
            raise self.error("stopped by the test")
        inputs, targets = batch
        return nn.functional.cross_entropy(model(inputs), targets, reduction="none")


@pytest.fixture
def fail_at() -> type[FailAt]:
    return FailAt


def to_numpy(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


@pytest.fixture(name="to_numpy")
def to_numpy_fixture() -> Callable[[Any], np.ndarray]:
    return to_numpy


def assert_same_kernel(a: lossk.LossKernel, b: lossk.LossKernel) -> None:
    """Bitwise equality of everything that can be read."""
    for name in ("variance", "mean_loss", "dead"):
        np.testing.assert_array_equal(to_numpy(getattr(a, name)), to_numpy(getattr(b, name)), err_msg=name)
    np.testing.assert_array_equal(a.to_numpy(), b.to_numpy())


@pytest.fixture(name="assert_same_kernel")
def assert_same_kernel_fixture() -> Callable[[lossk.LossKernel, lossk.LossKernel], None]:
    return assert_same_kernel


@pytest.fixture
def resumed_is_whole(
    build: Callable[..., lossk.LossKernel], problem: Classification, tmp_path: Path
) -> Callable[..., lossk.LossKernel]:
    """A run that an error ends, `before_end` losses before the last, and that is resumed, against one left alone.

    Returns the latter's kernel. The model's weights are bitwise as they were after each.
    """

    def check(sampler: lossk.samplers.samplers.Sampler, before_end: int, **changes: Any) -> lossk.LossKernel:
        model, counting, path = problem.model(), FailAt(), tmp_path / "k.lossk"
        before = [p.detach().clone() for p in model.parameters()]
        asked: dict[str, Any] = {"sampler": sampler, **changes}
        whole = build(model, problem.data, loss=counting, **asked)
        with pytest.raises(RuntimeError, match="stopped"):
            build(model, problem.data, loss=FailAt(counting.calls - before_end), out=path, **asked)
        resumed = build(model, problem.data, loss=FailAt(), out=path, resume=True, **asked)
        assert_same_kernel(resumed, whole)
        assert resumed.diagnostics == whole.diagnostics
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        return whole

    return check
