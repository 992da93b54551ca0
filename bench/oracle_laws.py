"""What the non-linear oracles share: laws by quadrature, a covariance without centering bias, one call of the sampler.

The stationary density of the chain is known to first order in the step: with h = eps / 2 and U the exponent of p,
rho_h = rho (1 + h (f - E f)), f = |grad U|^2 / 4 - lap U / 2 (it solves div(rho grad f) = 1/2 div(rho grad(|grad U|^2
/ 2 - lap U)); for a quadratic U it is the first order of T2). Steps are so short that the second order is far below
the standard errors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lossk
from bench.oracle_problems import Array, Row, Size, of_copies, rows


def quadrature(
    u: Array, square: Array, laplacian: Array, phi: Array, eps: float, base: Any = 1.0
) -> tuple[Array, Array]:
    """Mean [q] and covariance [q, q] of phi [q, P] on a grid, for U = u, |grad U|^2 and lap U on its P points.

    base [P]: the grid's own weights. eps = 0 is the exact law.
    """
    p = np.exp(-(u - u.min())) * base
    p /= p.sum()
    f = square / 4 - laplacian / 2
    p = p * (1 + eps / 2 * (f - p @ f))
    mean = phi @ p
    return mean, (phi * p) @ phi.T - np.outer(mean, mean)


def plane(half: tuple[float, float], points: int) -> Array:
    """[P, 2]: a grid over a rectangle about 0."""
    axes = [np.linspace(-h, h, points) for h in half]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)


def total_covariance(traces: lossk.LossTraces, copies: int) -> tuple[Array, Array]:
    """(K [q, q], jackknife pseudo-values [C, q, q]) without centering bias.

    The pooled kernel has expectation [C T sigma^2 - T Var(chain mean)] / (C T - 1); the covariance of the chain means
    puts back what is missing.
    """
    chains, draws, _ = traces.losses.shape
    pooled = of_copies(lossk.LossKernel.from_traces(traces, centering="pooled").to_numpy(), copies)
    x = traces.losses.double().numpy().reshape(chains, draws, copies, -1)
    means = x.mean(axis=1)
    centered = x - means[:, None]
    within = np.einsum("ctri,ctrj->cij", centered, centered) / (copies * draws)

    def between(part: Array) -> Array:
        deviation = part - part.mean(axis=0)
        return np.einsum("cri,crj->ij", deviation, deviation) / (copies * (len(part) - 1))

    whole = between(means)
    k = pooled * (chains * draws - 1) / (chains * draws) + whole / chains
    left_out = np.stack([between(np.delete(means, c, axis=0)) for c in range(chains)])
    return k, within + chains * whole - (chains - 1) * left_out


def sampler(eps: float, n_beta: float, gamma: float, burnin: int, thin: int) -> lossk.SGLD:
    return lossk.SGLD(
        lr=eps,
        n_beta=n_beta,
        localization=gamma,
        batch_size=None,
        num_burnin_steps=burnin,
        num_steps_bw_draws=thin,
    )


def draw(
    model: nn.Module, probe: Any, train: Any, loss: Any, settings: lossk.SGLD | lossk.HMC, size: Size
) -> lossk.LossTraces:
    return lossk.sample_losses(
        model,
        probe,
        train=train,
        loss=loss,
        sampler=settings,
        num_chains=size.chains,
        num_draws=size.draws,
        seed=size.seed,
        progress=False,
    )


def llc_row(oracle: str, name: str, truth: float, traces: lossk.LossTraces, copies: int) -> list[Row]:
    """kernel.diagnostics.llc of one copy; its error from the chains' own means."""
    kernel = lossk.LossKernel.from_traces(traces)
    assert kernel.diagnostics is not None
    assert kernel.diagnostics.llc is not None
    assert traces.excess is not None
    assert traces.n_beta is not None
    chains = traces.n_beta * traces.excess.double().numpy().mean(axis=1)[:, None] / copies
    return rows(oracle, [name], [truth], [kernel.diagnostics.llc / copies], chains)


def over_copies(copies: int, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Probe rows [R q, ...] for every copy, with the copy's number."""
    return columns.repeat(copies, *[1] * (columns.ndim - 1)), torch.arange(copies).repeat_interleave(len(columns))
