"""T7, T8 and T10: singular models, whose laws are known in closed form or by quadrature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

import lossk
from bench.oracle_laws import draw, llc_row, over_copies, plane, quadrature, sampler, total_covariance
from bench.oracle_problems import Array, Copies, Row, Size, rows


def product_loss(model: Any, batch: Any) -> Tensor:
    """T7: 1/2 (a b x - y)^2, x = 1; training rows (y,) summed over copies, probe rows (y, copy)."""
    product = model.weight[:, 0] * model.weight[:, 1]
    if len(batch) == 1:
        return 0.5 * (product - batch[0].unsqueeze(1)).square().sum(1)
    return 0.5 * (product[batch[1]] - batch[0]).square()


def t7(size: Size) -> list[Row]:
    """f = a b x at (kap, gamma) = (100, 10) and, in the full table, (100, 1), which mixes slowly."""
    out = _t7(size, 10.0, 1.5e-3, copies=128, burnin=500, thin=30)
    if size.long:
        out += _t7(size.part(1, chains=size.chains // 2, draws=60), 1.0, 8e-4, copies=512, burnin=8000, thin=60)
    return out


def singular_model(gamma: float, eps: float, kap: float = 100.0) -> tuple[float, float]:
    """(Lam, M) of T7 under the chain's law at this step."""
    w = plane((9 / np.sqrt(gamma),) * 2, 1601)  # a prior of variance 1 / gamma bounds each weight
    a, b = w.T
    u = kap / 2 * (a * b) ** 2 + gamma / 2 * (a**2 + b**2)
    square = (kap * a * b**2 + gamma * a) ** 2 + (kap * a**2 * b + gamma * b) ** 2
    _, cov = quadrature(u, square, kap * (a**2 + b**2) + 2 * gamma, np.stack([a * b, (a * b) ** 2]), eps)
    return kap * cov[0, 0] / 2, kap**2 * cov[1, 1] / 4


def bessel(gamma: float, kap: float = 100.0) -> tuple[float, float]:
    """(Lam, M) of T7 in closed form, for eps = 0."""
    chi = gamma**2 / (4 * kap)
    r = special.k1(chi) / special.k0(chi)
    return 0.5 + chi * (1 - r), 0.5 + 2 * chi * (1 - r) - chi**2 * (r**2 - r / chi - 1)


def _t7(size: Size, gamma: float, eps: float, *, copies: int, burnin: int, thin: int) -> list[Row]:
    kap = 100.0
    assert np.allclose(singular_model(gamma, 0.0), bessel(gamma), rtol=1e-3)
    y = torch.tensor([1.0, -1.0])  # x = 1 and e = y: sum x e = 0
    settings = sampler(eps, kap, gamma, burnin, thin)
    traces = draw(Copies(np.zeros(2), copies), over_copies(copies, y), (y,), product_loss, settings, size)
    k, chains = total_covariance(traces, copies)

    def pick(m: Array) -> Array:
        same, other = (m[..., 0, 0] + m[..., 1, 1]) / 2, m[..., 0, 1]
        return np.stack([(same - other) * kap / 4, (same + other) / 2 * kap**2], axis=-1)

    return rows(f"T7 a b x, ({kap:.0f}, {gamma:.0f})", ["Lam", "M"], singular_model(gamma, eps), pick(k), pick(chains))


def power_loss(k: int, scale: float = 1.0) -> Callable[[Any, Any], Tensor]:
    """scale w^(2k); training rows (x,) summed over copies, probe rows (x, copy)."""

    def loss(model: Any, batch: Any) -> Tensor:
        powers = scale * model.weight[:, 0] ** (2 * k)
        return powers.sum().expand(len(batch[0])) if len(batch) == 1 else powers[batch[1]]

    return loss


def power_law(k: int, n_beta: float, eps: float) -> tuple[float, float]:
    """Mean and variance of n_beta w^(2k) under the chain's law; 1 / (2k) each at eps = 0."""
    w = np.linspace(-1, 1, 20001) * (60 / n_beta) ** (1 / (2 * k))
    u = n_beta * w ** (2 * k)
    first, second = 2 * k * n_beta * w ** (2 * k - 1), 2 * k * (2 * k - 1) * n_beta * w ** (2 * k - 2)
    mean, cov = quadrature(u, first**2, second, u[None], eps)
    return float(mean[0]), float(cov[0, 0])


POWERS = {1: 1e-3, 2: 1e-3, 3: 1e-3}  # k: eps at n_beta = 100


def _powers(k: int, size: Size, scale: float = 1.0, copies: int = 64) -> lossk.LossTraces:
    settings = sampler(POWERS[k], 100.0 / scale, 0.0, 200, 15)
    probe, train = over_copies(copies, torch.zeros(1)), (torch.zeros(2),)
    return draw(Copies(np.zeros(1), copies), probe, train, power_loss(k, scale), settings, size)


def t8(size: Size) -> list[Row]:
    """w^(2k) with a flat prior: n_beta L ~ Gamma(1 / 2k)."""
    out = []
    for k, eps in POWERS.items():
        assert np.allclose(power_law(k, 100.0, 0.0), 1 / (2 * k), rtol=1e-4)
        traces = _powers(k, size.part(k))
        mean, variance = power_law(k, 100.0, eps)
        if k == 1:  # T2, to all orders
            mean = 0.5 / (1 - eps * 200 / 4)
            variance = 2 * mean**2
        out += llc_row(f"T8 w^{2 * k}", f"LLC (exact law: 1/{2 * k})", mean, traces, 64)
        cov, chains = total_covariance(traces, 64)
        out += rows(f"T8 w^{2 * k}", ["variance of n_beta L"], [variance], 1e4 * cov[0], 1e4 * chains[:, 0])
    return out


def rank_loss(model: Any, batch: Any) -> Tensor:
    """|B A|^2, both 2 x 2; training rows (x,) summed over copies, probe rows (x, copy)."""
    w = model.weight.view(-1, 2, 2, 2)
    norms = (w[:, 1] @ w[:, 0]).square().sum((1, 2))
    return norms.sum().expand(len(batch[0])) if len(batch) == 1 else norms[batch[1]]


def rank_llc(n_beta: float, gamma: float, eps: float) -> float:
    """E[n_beta |B A|^2] under the chain's law: over A's singular values by a grid, over B (normal given A) exactly."""
    s = (np.arange(160) + 0.5) / 160 * 7 / np.sqrt(gamma)
    s1, s2 = np.stack(np.meshgrid(s, s), -1).reshape(-1, 2)[:, :, None].transpose(1, 0, 2)  # [P, 1] each
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)  # exact up to degree 7; the integrand has 6
    z = np.stack(np.meshgrid(*[nodes] * 4, indexing="ij")).reshape(2, 2, -1)  # [row, column, Q]
    base = np.prod(np.stack(np.meshgrid(*[weights] * 4)).reshape(4, -1), axis=0)
    stiff = [2 * n_beta * v**2 + gamma for v in (s1, s2)]
    b = [[z[i, j] / np.sqrt(stiff[j]) for j in range(2)] for i in range(2)]  # [P, Q] each
    e = [[b[i][j] * (s1, s2)[j] for j in range(2)] for i in range(2)]  # B A for A = diag(s1, s2)
    square_a = sum(
        (2 * n_beta * (b[0][i] * e[0][j] + b[1][i] * e[1][j]) + (gamma * (s1, s2)[i] if i == j else 0)) ** 2
        for i in range(2)
        for j in range(2)
    )
    square_b = sum((b[i][j] * stiff[j]) ** 2 for i in range(2) for j in range(2))
    norm_b = sum(b[i][j] ** 2 for i in range(2) for j in range(2))
    laplacian = 4 * n_beta * (norm_b + s1**2 + s2**2) + 8 * gamma
    value = n_beta * sum(e[i][j] ** 2 for i in range(2) for j in range(2))
    weight = np.abs(s1**2 - s2**2) * np.exp(-gamma / 2 * (s1**2 + s2**2)) / (stiff[0] * stiff[1]) * base
    flat = lambda m: np.broadcast_to(m, weight.shape).reshape(-1)  # noqa: E731
    zero = np.zeros(weight.size)
    return float(
        quadrature(zero, flat(square_a + square_b), flat(laplacian), flat(value)[None], eps, flat(weight))[0][0]
    )


def t8_rank(size: Size) -> list[Row]:
    """Reduced-rank regression (2, 2, 2), true rank 0, at finite localization: 1.5 is the limit of gamma -> 0."""
    n_beta, gamma, eps, copies = 100.0, 10.0, 1e-3, 32
    probe, train = over_copies(copies, torch.zeros(1)), (torch.zeros(2),)
    settings = sampler(eps, n_beta, gamma, 600, 15)
    traces = draw(Copies(np.zeros(8), copies), probe, train, rank_loss, settings, size)
    return llc_row("T8 reduced rank (2,2,2,0)", "LLC (limit 1.5)", rank_llc(n_beta, gamma, eps), traces, copies)


def t10(size: Size) -> list[Row]:
    """Twice the loss at half the n_beta, with other noise: the same LLC."""
    first = _powers(2, size)
    second = _powers(2, size.part(1), 2.0)
    one, two = llc_row("", "", 0.0, first, 64)[0], llc_row("", "", 0.0, second, 64)[0]
    return [
        Row(
            "T10 scaling",
            "LLC(2 L, n_beta/2) - LLC(L, n_beta)",
            0.0,
            two.estimate - one.estimate,
            np.hypot(one.se, two.se),
        )
    ]


def same_noise_gap(size: Size) -> float:
    """T10 with the same noise: the relative difference of the two LLCs, from rounding alone."""
    llcs = [llc_row("", "", 0.0, _powers(2, size, scale), 64)[0].estimate for scale in (1.0, 2.0)]
    return abs(llcs[1] / llcs[0] - 1)
