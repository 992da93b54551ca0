"""T7 and T8 where a short step is not enough, by Hamiltonian Monte Carlo: the truth is the law itself, without a step.

A trajectory moves all copies, and one Metropolis test keeps or refuses them together, so that an accepted share above
one half bounds the number of copies and the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lossk
from bench.oracle_laws import draw, llc_row, over_copies, total_covariance
from bench.oracle_problems import Array, Copies, Row, Size, rows
from bench.oracles_nonlinear import bessel, product_loss


def trajectories(length: float, curvature: float, **settings: Any) -> lossk.HMC:
    """Trajectories of one length, with leapfrog steps of 0.7 / sqrt(curvature); stable below 2."""
    step = 0.7 / np.sqrt(curvature)
    return lossk.HMC(step_size=float(step), num_leapfrog_steps=round(length / step), **settings)


def exact(
    model: Copies, probe: Any, train: Any, loss: Any, sampler: lossk.HMC, size: Size
) -> tuple[lossk.LossTraces, float]:
    """(traces, accepted share); a sampler that refuses half of its trajectories is no reference.

    With one trajectory to a draw, all losses of two draws are equal only if the trajectory was refused.
    """
    assert sampler.num_steps_bw_draws == 1
    traces = draw(model, probe, train, loss, sampler, size)
    moved = (traces.losses[:, 1:] != traces.losses[:, :-1]).any(dim=2)
    accepted = float(moved.double().mean())
    assert accepted > 0.5, accepted
    return traces, accepted


def t7_sharp(size: Size) -> list[Row]:
    """f = a b at (kap, gamma) = (1e4, 1): each arm about 1 long and 0.01 wide; quick: at (100, 1)."""
    return _t7_sharp(*((1e4, 128, size.part(0, draws=20)) if size.long else (100.0, 64, size.part(0, draws=12))))


def t7_sharper(size: Size) -> list[Row]:
    """At (1e6, 1), arms 0.001 wide, in about 2,000 leapfrog steps a trajectory; quick: at (1000, 1)."""
    kap, copies = (1e6, 128) if size.long else (1000.0, 64)
    return _t7_sharp(kap, copies, size.part(0, chains=size.chains // 2, draws=20 if size.long else 12))


def _t7_sharp(kap: float, copies: int, size: Size) -> list[Row]:
    gamma, answer = 1.0, kap**-0.5  # answers +-e as small as a b, so that neither part of a loss cancels the other
    stiffest = kap * 3 / gamma  # kap a^2 that 2 % of the law exceeds
    sampler = trajectories(1.2, stiffest, n_beta=kap, localization=gamma, num_burnin_steps=12)
    probe = over_copies(copies, torch.tensor([answer, -answer]))
    traces, _ = exact(Copies(np.zeros(2), copies), probe, (torch.zeros(1),), product_loss, sampler, size)
    k, chains = total_covariance(traces, copies)

    def pick(m: Array) -> Array:
        same, other = (m[..., 0, 0] + m[..., 1, 1]) / 2, m[..., 0, 1]
        return np.stack([(same - other) * kap**2 / 4, (same + other) / 2 * kap**2], axis=-1)

    return rows(f"T7 a b x, ({kap:.0f}, {gamma:.0f}), HMC", ["Lam", "M"], bessel(gamma, kap), pick(k), pick(chains))


def rank_loss(shape: tuple[int, int, int]) -> Callable[[Any, Any], Tensor]:
    """|B A|^2 of a regression of `shape` (M, H, N); training rows (x,) summed over copies, probe rows (x, copy)."""
    inputs, hidden, outputs = shape

    def loss(model: Any, batch: Any) -> Tensor:
        a, b = model.weight.split([hidden * inputs, outputs * hidden], dim=1)
        norms = (b.view(-1, outputs, hidden) @ a.view(-1, hidden, inputs)).square().sum((1, 2))
        return norms.sum().expand(len(batch[0])) if len(batch) == 1 else norms[batch[1]]

    return loss


def rank_zero_llc(shape: tuple[int, int, int], n_beta: float, gamma: float) -> float:
    """E[n_beta |B A|^2], w* = 0, for M -> H -> N: -d ln Z / d ln n_beta.

    B is normal given A. What is left depends on A's k = min(M, H) singular values s alone, which have the density
    prod_{i<j} |s_i^2 - s_j^2| prod_i v(s_i), v = s^|M - H| (2 n_beta s^2 + gamma)^(-N/2) exp(-gamma s^2 / 2). Its
    integral is a Pfaffian of double integrals (de Bruijn 1955), so Z^2 is the determinant of a (k or k + 1)-square
    matrix up to a constant.
    """
    inputs, hidden, outputs = shape
    k = min(inputs, hidden)
    log_s = np.linspace(np.log(1e-4 * min(1.0, (gamma / n_beta) ** 0.5)), np.log(12.0), 20001) - np.log(gamma) / 2
    s = np.exp(log_s)

    def log_z(n_beta: float) -> float:
        log_v = (1 + abs(inputs - hidden)) * log_s - outputs / 2 * np.log(2 * n_beta * s**2 + gamma)
        v = np.exp(log_v - gamma / 2 * s**2)  # times ds = s d ln s
        powers = (gamma * s**2) ** np.arange(k)[:, None] * v  # [k, points]
        before = np.cumsum(powers, axis=1) - powers / 2
        skew = before @ powers.T
        skew = skew - skew.T
        if k % 2:
            border = powers.sum(axis=1, keepdims=True)
            skew = np.block([[skew, border], [-border.T, np.zeros((1, 1))]])
        scale = np.abs(skew).max(axis=1)  # alike for rows and columns: no digits are lost between powers of s
        return float(np.linalg.slogdet(skew / np.sqrt(np.outer(scale, scale)))[1] + np.log(scale).sum()) / 2

    step = 1e-3
    return (log_z(n_beta * np.exp(-step)) - log_z(n_beta * np.exp(step))) / (2 * step)


def t8_rank_zero(size: Size) -> list[Row]:
    """Reduced-rank regressions (5, 3, 5) and (5, 4, 5), true rank 0: 6.5 and 8 are the limits."""
    n_beta, gamma, copies, out = 100.0, 1.0, 4, []
    stiffest = 2 * n_beta * 3**2  # 2 n_beta s^2 at a large singular value
    sampler = trajectories(1.2, stiffest, n_beta=n_beta, localization=gamma, num_burnin_steps=15)
    size = size if size.long else size.part(0, chains=size.chains // 2, draws=10)
    for number, (shape, limit) in enumerate({(5, 3, 5): "6.5", (5, 4, 5): "8"}.items()):
        probe, train = over_copies(copies, torch.zeros(1)), (torch.zeros(2),)
        w_star = np.zeros(shape[1] * (shape[0] + shape[2]))
        traces, _ = exact(Copies(w_star, copies), probe, train, rank_loss(shape), sampler, size.part(number))
        name = "T8 reduced rank ({},{},{},0), HMC".format(*shape)
        out += llc_row(name, f"LLC (limit {limit})", rank_zero_llc(shape, n_beta, gamma), traces, copies)
    return out


def rank_one_loss(model: Any, batch: Any) -> Tensor:
    """|B A - diag(1, 0)|^2, both 2 x 2; training rows (x,) summed over copies, probe rows (x, copy)."""
    w = model.weight.view(-1, 2, 2, 2)
    target = torch.diag(w.new_tensor([1.0, 0.0]))
    norms = (w[:, 1] @ w[:, 0] - target).square().sum((1, 2))
    return norms.sum().expand(len(batch[0])) if len(batch) == 1 else norms[batch[1]]


def rank_one_llc(n_beta: float, gamma: float, points: int = 50, half: float = 5.0) -> float:
    """E[n_beta |B A - T|^2], T = A* = B* = diag(1, 0): over A by a grid, over B (normal given A) exactly.

    The rows b_i of B are independent given A, with precision P = 2 n_beta A A' + gamma and mean
    m_i = P^-1 (2 n_beta A t_i + gamma b*_i), so that E|b_i A - t_i|^2 = |m_i A - t_i|^2 + tr(A' P^-1 A). Only b_1 has
    a mean. The integrand is smooth and vanishes at the ends, where the sum over equal steps converges exponentially.
    """
    axis = np.linspace(-half, half, points) / np.sqrt(gamma)
    a12, a21, a22 = np.meshgrid(axis, axis, axis, indexing="ij")
    parts = []
    for a11 in axis + 1.0:  # A = [[a11, a12], [a21, a22]]
        p11, p22 = 2 * n_beta * (a11**2 + a12**2) + gamma, 2 * n_beta * (a21**2 + a22**2) + gamma
        p12 = 2 * n_beta * (a11 * a21 + a12 * a22)
        det = p11 * p22 - p12**2
        h1, h2 = 2 * n_beta * a11 + gamma, 2 * n_beta * a21
        m1, m2 = (p22 * h1 - p12 * h2) / det, (p11 * h2 - p12 * h1) / det
        # Z of both rows: 1 / det P times exp(h' P^-1 h / 2 - n_beta |t|^2 - gamma/2 |b*|^2)
        exponent = (h1 * m1 + h2 * m2) / 2 - n_beta - gamma / 2
        exponent = exponent - gamma / 2 * ((a11 - 1) ** 2 + a12**2 + a21**2 + a22**2)
        weight = np.exp(exponent) / det
        trace = (2 - gamma * (p11 + p22) / det) / (2 * n_beta)  # tr(P^-1 A A'), A A' = (P - gamma) / (2 n_beta)
        square = (m1 * a11 + m2 * a21 - 1) ** 2 + (m1 * a12 + m2 * a22) ** 2 + 2 * trace
        parts.append((weight.sum(), n_beta * (weight * square).sum()))
    total, value = np.sum(parts, axis=0)
    return float(value / total)


def t8_rank_hmc(size: Size) -> list[Row]:
    """Reduced-rank regression (2, 2, 2), true rank 1, at finite localization: 2 is the limit."""
    n_beta, gamma, copies = 100.0, 10.0, 32
    sampler = trajectories(0.45, 8 * n_beta + gamma, n_beta=n_beta, localization=gamma, num_burnin_steps=30)
    probe, train = over_copies(copies, torch.zeros(1)), (torch.zeros(2),)
    w_star = np.array([1.0, 0, 0, 0] * 2)
    traces, _ = exact(Copies(w_star, copies), probe, train, rank_one_loss, sampler, size)
    truth = rank_one_llc(n_beta, gamma)
    return llc_row("T8 reduced rank (2,2,2,1), HMC", "LLC (limit 2)", truth, traces, copies)
