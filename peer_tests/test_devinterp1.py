"""Under devinterp 1.3.2: its sampler with lossk's optimizer and callback in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from devinterp.optim.sgld import SGLD
from devinterp.optim.sgmcmc import SGMCMC
from devinterp.slt.llc import LLCEstimator
from devinterp.slt.mala import MalaAcceptanceRate
from devinterp.slt.norms import GradientNorm, NoiseNorm, WeightNorm
from devinterp.slt.sampler import estimate_learning_coeff_with_summary, sample
from devinterp.test_utils import Polynomial, ReducedRankRegressor
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lossk
from lossk.interop.devinterp import LangevinOptimizer, LossKernelCallback, rmsprop_sgld, sgld

torch.set_num_threads(1)


def mse(model: nn.Module, data: Any) -> Tensor:
    return F.mse_loss(model(data[0]), data[1])


def entropy(model: nn.Module, data: Any) -> Tensor:
    return F.cross_entropy(model(data[0]), data[1])


def classifier() -> tuple[nn.Module, DataLoader, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3))
    return model, DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True), (x, y)


class Replayed:
    """torch.normal that gives the noise of a list, in order."""

    def __init__(self, noise: list[Tensor]) -> None:
        self.noise = list(noise)

    def __call__(self, *, size: Any, **_: Any) -> Tensor:
        return self.noise.pop(0).view(size).clone()


@pytest.mark.parametrize("method", ["sgld", "rmsprop_sgld", "old"])
@pytest.mark.parametrize("box", [None, 0.05])
def test_a_trajectory_is_theirs(method: str, box: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As their SGMCMC-equals-SGLD test: the same noise gives the same weights, step for step."""
    settings: dict[str, Any] = {"lr": 1e-3, "nbeta": 20.0, "localization": 3.0, "weight_decay": 0.5}
    settings["bounding_box_size"] = box
    make = rmsprop_sgld if method == "rmsprop_sgld" else sgld
    theirs_make = {"sgld": SGMCMC.sgld, "rmsprop_sgld": SGMCMC.rmsprop_sgld, "old": SGLD}[method]
    if method == "old" and box is None:
        settings["bounding_box_size"] = 0
    ours, data = classifier()[0].eval(), classifier()[2]
    theirs = classifier()[0].eval()
    a, b = make(ours.parameters(), **settings, metrics=["noise"]), theirs_make(theirs.parameters(), **settings)
    for _ in range(20):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            entropy(model, data).backward()
            if optimizer is b:
                monkeypatch.setattr(torch, "normal", Replayed(a.noise[0]))
            optimizer.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [sgld, rmsprop_sgld])
def test_their_sampler_and_callbacks(method: Any) -> None:
    model, loader, data = classifier()
    before = [p.detach().clone() for p in model.parameters()]
    kernel = LossKernelCallback(2, 20, data, nbeta=10.0)
    mala = MalaAcceptanceRate(2, 20, learning_rate=1e-4, nbeta=10.0)
    callbacks = [kernel, mala, NoiseNorm(2, 20), GradientNorm(2, 20), WeightNorm(2, 20)]
    results = sample(
        model,
        loader,
        callbacks=callbacks,
        evaluate=entropy,
        sampling_method=method,
        optimizer_kwargs={"lr": 1e-4, "nbeta": 10.0, "localization": 1.0},
        num_draws=20,
        num_chains=2,
        seed=3,
        verbose=False,
    )
    assert isinstance(results["loss_kernel"], lossk.LossKernel)
    assert results["loss_kernel"].num_draws == 20
    expected = (1e-4 * sum(p.numel() for p in before)) ** 0.5
    assert np.abs(results["noise_norm/trace"] / expected - 1).max() < 0.5
    if method is sgld:  # their MALA knows no preconditioner
        theirs = MalaAcceptanceRate(2, 20, learning_rate=1e-4, nbeta=10.0)
        settings = {"lr": 1e-4, "nbeta": 10.0, "localization": 1.0}
        arguments = {"evaluate": entropy, "optimizer_kwargs": settings, "num_draws": 20, "num_chains": 2, "seed": 3}
        sample(model, loader, callbacks=[theirs], sampling_method=SGMCMC.sgld, verbose=False, **arguments)
        expected_rate = theirs.get_results()["mala_accept/mean"]
        assert abs(results["mala_accept/mean"] - expected_rate) < 0.1
    assert np.isfinite(results["gradient_norm/trace"]).all()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_the_callback_from_several_processes() -> None:
    model, loader, data = classifier()
    traces = []
    for cores in (1, 2):
        callback = LossKernelCallback(2, 5, data)
        sample(
            model,
            loader,
            callbacks=[callback],
            evaluate=entropy,
            sampling_method=sgld,
            optimizer_kwargs={"lr": 1e-4, "nbeta": 10.0, "localization": 1.0},
            num_draws=5,
            num_chains=2,
            seed=[3, 4],
            cores=cores,
            verbose=False,
        )
        traces.append(callback.traces().losses)
    torch.testing.assert_close(traces[0], traces[1], rtol=1e-5, atol=1e-6)


def test_masks_of_single_weights() -> None:
    model, loader, _ = classifier()
    masks = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    masks["3.weight"][1] = 1
    seen: list[Tensor] = []

    class Watch:
        def __call__(self, model: nn.Module, **_: Any) -> None:
            seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))

    sample(
        model,
        loader,
        callbacks=[Watch()],
        evaluate=entropy,
        sampling_method=sgld,
        optimizer_kwargs={"lr": 1e-4, "nbeta": 10.0},
        num_draws=3,
        num_chains=1,
        optimize_over_per_model_param=masks,
        verbose=False,
    )
    moved = seen[-1] != torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(moved, torch.cat([m.flatten() for m in masks.values()]) == 1)


def learning_coefficients(
    model: nn.Module, data: tuple[Tensor, Tensor], method: Any, settings: dict[str, Any], chains: int, draws: int
) -> np.ndarray:
    """[chains] their estimate, with the initial loss of all data."""
    n = len(data[0])
    nbeta = n / float(np.log(n))
    found = estimate_learning_coeff_with_summary(
        model,
        DataLoader(TensorDataset(*data), batch_size=n),
        evaluate=mse,
        sampling_method=method,
        optimizer_kwargs={"nbeta": nbeta, **settings},
        num_chains=chains,
        num_draws=draws,
        init_loss=float(mse(model, data)),
        seed=42,
        verbose=False,
    )
    return np.asarray([value for key, value in found.items() if key.startswith("llc-chain/")])


POWERS = [
    ([0, 1], 0.5),
    ([1, 1], 0.5),
    ([0, 2], 0.25),
    ([1, 2], 0.25),
    ([2, 2], 0.25),
    ([0, 3], 0.166),
]


@pytest.mark.parametrize(("powers", "truth"), POWERS, ids=str)
def test_normal_crossings(powers: list[int], truth: float) -> None:
    """Their accuracy test on y = x prod w_i^k_i, whose learning coefficient is 1 / (2 max k)."""
    torch.manual_seed(42)
    x = torch.normal(0, 2, size=(1000,))
    data = (x, 0.25 * torch.normal(0, 1, size=(1000,)))
    settings = {"lr": 4e-4, "bounding_box_size": 0.5}
    found = learning_coefficients(Polynomial(powers), data, sgld, settings, chains=10, draws=5000)
    assert abs(found.mean() - truth) < 3.5 * found.std()


RANKS = [((5, 3, 5), 6.5), ((5, 4, 5), 8.0), ((4, 3, 8), 6.0), ((8, 3, 4), 6.0), ((3, 8, 4), 6.0)]


@pytest.mark.parametrize(("sizes", "truth"), RANKS, ids=str)
def test_reduced_rank_regression(sizes: tuple[int, int, int], truth: float) -> None:
    """Their accuracy test on two linear layers m -> h -> n, at a rank-deficient optimum; within 40 %."""
    m, h, n = sizes
    torch.manual_seed(42)
    model = ReducedRankRegressor(m, h, n)
    x = torch.randn(1000, m)
    with torch.no_grad():
        data = (x, model(x) + 0.1 * torch.randn(1000, n))
    settings = {"lr": 1e-4, "localization": 1.0}
    found = learning_coefficients(model, data, sgld, settings, chains=5, draws=2000)
    assert abs(found.mean() / truth - 1) < 0.4


def test_it_is_an_optimizer_of_the_kind_they_ask_for() -> None:
    model, *_ = classifier()
    optimizer = sgld(model.parameters(), lr=1e-3, nbeta=2.0, metrics=[])
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, LangevinOptimizer)
    assert isinstance(LLCEstimator(1, 2, torch.zeros(()), nbeta=2.0), object)
