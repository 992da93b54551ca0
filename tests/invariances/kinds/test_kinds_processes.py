"""Pickling and copying of what lossk takes and gives; two builds in two threads; builds in forked processes."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lossk
from kind_world import World
from kinds import Kind, short

N, CLASSES = 12, 3
KIND = Kind(
    lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, CLASSES)),
    lambda: (torch.randn(N, 6), torch.arange(N) % CLASSES),
)
DATA = KIND.batch()  # made once: threads share the global random stream
SETTINGS: dict[str, object] = {
    "sgld": lossk.SGLD(lr=1e-4, params=["0.*"]),
    "sgld-automatic": lossk.SGLD(),
    "baoab": lossk.BAOAB(),
    "hmc": lossk.HMC(step_size=0.01, localization=5.0),
    "laplace": lossk.Laplace(),
    "gaussian": lossk.Gaussian(sigma=0.1),
    "passes": lossk.Passes(probe_batch=7, frozen_prefix="3"),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "oldest-pickle": lambda value: pickle.loads(pickle.dumps(value, protocol=2)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def build(model: nn.Module, seed: int = 0, **settings: Any) -> lossk.LossKernel:
    chosen: dict[str, Any] = {"sampler": short(), "num_chains": 2, "num_draws": 3, "tile": 16, "progress": False}
    return lossk.build_kernel(model, DATA, seed=seed, **{**chosen, **settings})


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_copied(name: str, how: str) -> None:
    value = SETTINGS[name]
    again = COPIES[how](value)
    assert again == value
    assert type(again) is type(value)
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.params = None  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("form", ["tiles", "factor", "store"])
def test_kernels_are_copied(form: str, how: str, tmp_path: Path, assert_same_kernel: Any) -> None:
    if form == "store":
        build(KIND.model(), out=tmp_path / "k.lossk")
        kernel = lossk.open(tmp_path / "k.lossk")
    else:
        kernel = build(KIND.model(), form=form)
    again = COPIES[how](kernel)
    assert_same_kernel(again, kernel)
    assert torch.equal(again.correlation([0, 5], [1, 2, 3]), kernel.correlation([0, 5], [1, 2, 3]))
    assert repr(again.diagnostics.to_dict()) == repr(kernel.diagnostics.to_dict())  # NaN equals NaN
    assert again.meta == kernel.meta


@pytest.mark.parametrize("how", COPIES)
def test_traces_are_copied(how: str) -> None:
    traces = lossk.sample_losses(KIND.model(), DATA, sampler=short(), num_chains=2, num_draws=3, progress=False)
    again = COPIES[how](traces)
    assert torch.equal(again.losses, traces.losses)
    assert again.meta == traces.meta
    assert again.n_beta == traces.n_beta


@pytest.mark.parametrize("how", COPIES)
def test_cross_kernels_are_copied(how: str) -> None:
    x, y = DATA
    query = x[:5] + 0.1, y[:5]
    cross = lossk.cross_kernel(KIND.model(), (x, y), query, sampler=short(), num_chains=2, num_draws=3, progress=False)
    again = COPIES[how](cross)
    assert torch.equal(again[:, :], cross[:, :])


def test_a_model_is_copied_while_it_is_sampled() -> None:
    """By a loss that deep-copies or pickles the model that it is given, as callbacks which save checkpoints do."""
    model, batch = KIND.model(), DATA
    plain = build(model)
    world = World(model, data=batch)

    def saving(network: nn.Module, part: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            other = copy.deepcopy(network)(part[0])
        outputs = network(part[0])
        assert torch.allclose(outputs.detach(), other, rtol=0, atol=1e-5)
        return nn.functional.cross_entropy(outputs, part[1], reduction="none")

    kernel = build(model, loss=saving)
    world.assert_same()
    np.testing.assert_allclose(kernel.mean_loss.numpy(), plain.mean_loss.numpy(), rtol=0, atol=1e-5)


def test_two_threads(assert_same_kernel: Any) -> None:
    """Two models at once, each its own thread's: the numbers are those of one after the other."""
    models = [KIND.model() for _ in range(2)]
    worlds = [World(model) for model in models]
    alone = [build(model, seed, num_draws=12) for seed, model in enumerate(models)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda pair: build(pair[1], pair[0], num_draws=12), enumerate(models)))
    for a, b in zip(alone, together, strict=True):
        assert_same_kernel(a, b)
    for world in worlds:
        world.assert_same()


def test_a_thread_of_its_own(assert_same_kernel: Any) -> None:
    """Beside a main thread that trains another model meanwhile."""
    model, other, untouched = KIND.model(), KIND.model(), KIND.model()
    world, alone = World(model, process=False), build(model, num_draws=12)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(build, model, num_draws=12)
        KIND.train_step(other)
        assert_same_kernel(waiting.result(), alone)
    KIND.train_step(untouched)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), untouched.parameters(), strict=True))
    world.assert_same()


def build_and_check(seed: int) -> lossk.LossKernel:
    """In a child process: the kernel comes back pickled."""
    model = KIND.model()
    world = World(model)
    kernel = build(model, seed)
    world.assert_same()
    return kernel


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forks(assert_same_kernel: Any) -> None:
    """Children that are forked after their parent has built kernels, two of them at once."""
    alone = [build_and_check(seed) for seed in (0, 1)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        for a, b in zip(alone, pool.map(build_and_check, (0, 1)), strict=True):
            assert_same_kernel(a, b)
    assert_same_kernel(build_and_check(0), alone[0])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_inherits_the_model(assert_same_kernel: Any) -> None:
    """The parent's model, used by a child that gets it by the fork, not by pickling; the parent's is not touched."""
    model = KIND.model()
    world, alone = World(model), build(model)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=lambda: results.put(build(model).to_numpy()))
    child.start()
    found = results.get()
    child.join()
    assert child.exitcode == 0
    assert np.array_equal(found, alone.to_numpy())
    world.assert_same()
