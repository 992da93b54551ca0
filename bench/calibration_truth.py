"""What a problem's kernel is under its stated law, p(w) ~ exp(-n_beta L_n(w) - localization/2 |w - w*|^2), by none of
the engine's code: closed forms (T1, T7), quadrature, or Hamiltonian Monte Carlo in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special
from torch import Tensor

from bench.calibration_problems import Problem

WATCHED = 32  # samples whose block of the kernel is compared: the first ones
ACCEPTED = 0.8  # what the steps of HMC are set to
MOST_STEPS = 60  # of a trajectory
LENGTH = (0.4, 1.2)  # of trajectories, in units of pi / 2 standard deviations of the law's Gaussian at w*


@dataclass(frozen=True)
class Truth:
    """The trace of K over the training samples (nats^2), the LLC, a block of K, and their own Monte Carlo errors."""

    how: str
    trace: float
    trace_se: float
    llc: float
    llc_se: float
    block: np.ndarray  # [q, q] float64
    block_se: np.ndarray | float = 0.0  # [q, q]
    correlation_se: np.ndarray | float = 0.0  # [q, q], of the block's correlations
    rhat: float = 1.0  # of HMC: over its chains, for the mean loss


def watched(n: int) -> Tensor:
    """[q] int64."""
    return torch.arange(min(n, WATCHED))


def truth_of(problem: Problem, n_beta: float, gamma: float, *, draws: int = 80, seed: int = 0) -> Truth:
    """By the best way there is for this problem."""
    if problem.design is not None and gamma + n_beta > 0:
        return linear_truth(problem, n_beta, gamma)
    if problem.product:
        return product_truth(problem, n_beta, gamma)
    return hmc_truth(problem, n_beta, gamma, draws=draws, seed=seed)


def linear_truth(problem: Problem, n_beta: float, gamma: float) -> Truth:
    """T1: losses (x'w - y)^2 under a Gaussian law are quadratic: K_ij = 4 r_i r_j s_ij + 2 s_ij^2."""
    assert problem.design is not None
    x, w_star = problem.design.numpy(), problem.w_star.numpy()
    y = problem.data[1].double().numpy().ravel()
    n, d = x.shape
    a = 2 * n_beta / n * x.T @ x + gamma * np.eye(d)
    mean = np.linalg.solve(a, 2 * n_beta / n * x.T @ y + gamma * w_star)
    s = x @ np.linalg.solve(a, x.T)
    residual = x @ mean - y
    k = 4 * np.outer(residual, residual) * s + 2 * s**2
    rise = float(np.mean(residual**2 + np.diag(s)) - np.mean((x @ w_star - y) ** 2))
    q = watched(n).numpy()
    return Truth("T1", float(np.trace(k)), 0.0, n_beta * rise, 0.0, k[np.ix_(q, q)])


def product_truth(problem: Problem, n_beta: float, gamma: float, points: int = 3001) -> Truth:
    """f = a b x from the moments of u = a b, by quadrature: losses are x^2 u^2 - 2 x y u + y^2."""
    x, y = (part.double().numpy().ravel() for part in problem.data)
    xx, xy = float(np.mean(x**2)), float(np.mean(x * y))
    # The law of (a, b) in u = a b and v = ln|a / b| / 2: a^2 + b^2 = 2 |u| cosh 2v, so that v's integral is Bessel's
    # K0(gamma |u|), and u has the density K0(gamma |u|) exp(-n_beta (xx u^2 - 2 xy u)).
    top = xy / xx if xx else 0.0
    width = (2 * n_beta * xx) ** -0.5
    nodes = np.linspace(-1.0, 1.0, points) ** 3  # dense about 0, where K0 has a pole that u^3's spacing makes harmless
    reach = abs(top) + 12 * width
    grid = (nodes[1:] + nodes[:-1]) / 2
    u, du = reach * grid, reach * np.diff(nodes)
    log_p = np.log(special.k0e(gamma * np.abs(u))) - gamma * np.abs(u) - n_beta * (xx * u**2 - 2 * xy * u)
    p = np.exp(log_p - log_p.max()) * du
    p /= p.sum()
    m1, m2, m3, m4 = (float(p @ u**power) for power in (1, 2, 3, 4))
    phi = np.stack([x**2, -2 * x * y], axis=1)  # [n, 2]
    cov = np.array([[m4 - m2**2, m3 - m1 * m2], [m3 - m1 * m2, m2 - m1**2]])
    k = phi @ cov @ phi.T
    q = watched(len(x)).numpy()
    return Truth("quadrature", float(np.trace(k)), 0.0, n_beta * (xx * m2 - 2 * xy * m1), 0.0, k[np.ix_(q, q)])


def singular_truth(problem: Problem, n_beta: float, gamma: float) -> tuple[float, float]:
    """(trace K, LLC) by T7, whose losses have a factor 1/2 before the square: twice n_beta, and four times K."""
    x, e = (part.double().numpy().ravel() for part in problem.data)
    kap = 2 * n_beta * float(np.mean(x**2))
    chi = gamma**2 / (4 * kap)
    r = special.k1e(chi) / special.k0e(chi)
    lam = 0.5 + chi * (1 - r)
    m = 0.5 + 2 * chi * (1 - r) - chi**2 * (r**2 - r / chi - 1)
    return float(4 * np.sum(x**2 * e**2 * 2 * lam / kap + x**4 * m / kap**2)), lam


def hmc_truth(
    problem: Problem, n_beta: float, gamma: float, *, chains: int = 48, draws: int = 80, seed: int = 0
) -> Truth:
    """Many short chains at once, from draws of the law's own Gaussian at w*, in coordinates that make it round."""
    generator = torch.Generator().manual_seed(seed)
    w_star = problem.w_star

    def energy(w: Tensor) -> Tensor:
        return n_beta * problem.losses(w).mean(dim=1) + gamma / 2 * (w - w_star).square().sum(dim=1)

    hessian = torch.autograd.functional.hessian(lambda w: energy(w.unsqueeze(0))[0], w_star)
    values, vectors = torch.linalg.eigh(hessian)
    shape = vectors * values.abs().clamp(min=max(gamma, 1e-6 * float(values.abs().max()))).rsqrt()  # [p, p]

    def slope(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        u = energy(w_star + z @ shape.T)
        return u.detach(), torch.autograd.grad(u.sum(), z)[0]

    z = 0.3 * torch.randn(chains, len(w_star), dtype=torch.float64, generator=generator)
    u, force = slope(z)
    start, step, kept, early = problem.losses(w_star.unsqueeze(0))[0], 0.3, [], []
    for number in range(2 * draws):  # the first half tunes: the shape once, after a quarter, the step throughout
        if number == draws // 2:
            weights = torch.cat(early[len(early) // 3 :])
            z = w_star + z @ shape.T
            spread = torch.cov(weights.T) + 1e-3 * torch.diag(weights.var(dim=0)) + 1e-12 * torch.eye(len(w_star))
            shape = torch.linalg.cholesky(spread)
            z = torch.linalg.solve_triangular(shape, (z - w_star).T, upper=False).T
            (u, force), step = slope(z), 0.3
        fast = torch.randn(z.shape, dtype=torch.float64, generator=generator)
        length = math.pi / 2 * (LENGTH[0] + (LENGTH[1] - LENGTH[0]) * float(torch.rand((), generator=generator)))
        new, new_force, moved = z, force, fast
        for _ in range(min(MOST_STEPS, math.ceil(length / step))):
            half = moved - step / 2 * new_force
            new = new + step * half
            new_u, new_force = slope(new)
            moved = half - step / 2 * new_force
        change = new_u - u + (moved.square() - fast.square()).sum(dim=1) / 2
        share = torch.exp(-change.clamp(min=0)).nan_to_num(0.0)
        taken = torch.rand(chains, dtype=torch.float64, generator=generator) < share
        z, force = (torch.where(taken.unsqueeze(1), a, b) for a, b in ((new, z), (new_force, force)))
        u = torch.where(taken, new_u, u)
        if number < draws:
            heat = 2.0 / (1 + number % (draws // 2)) ** 0.6
            step = min(1.0, step * math.exp(heat * (float(share.mean()) - ACCEPTED)))
            early.append(w_star + z @ shape.T)
        else:
            with torch.no_grad():
                kept.append((problem.losses(w_star + z @ shape.T) - start).float())
    return _moments(torch.stack(kept), n_beta)


def _moments(losses: Tensor, n_beta: float) -> Truth:
    """Of losses above their values at w*, [T, C, n]: second moments about the mean of all draws."""
    mean = losses.double().mean(dim=(0, 1))
    rise = losses.double().mean(dim=2)  # [T, C]
    per_chain = torch.stack([(losses[:, c].double() - mean).square().mean(dim=0).sum() for c in range(losses.shape[1])])
    block, block_se, correlation_se = _block((losses - mean.float())[..., watched(losses.shape[2])].double())
    num, chains = len(rise), losses.shape[1]
    within = float(rise.var(dim=0).mean())
    rhat = math.sqrt((within * (num - 1) / num + float(rise.mean(dim=0).var())) / within)
    scale = chains**-0.5
    return Truth(
        "HMC",
        float(per_chain.mean()),
        float(per_chain.std()) * scale,
        n_beta * float(rise.mean()),
        n_beta * float(rise.mean(dim=0).std()) * scale,
        block,
        block_se,
        correlation_se,
        rhat,
    )


def _block(losses: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K of losses [T, C, q] about their mean, its errors and those of R to first order, from the chains' spread."""
    num, chains, _ = losses.shape
    own = torch.einsum("tci,tcj->cij", losses, losses) / num
    k = own.mean(dim=0)
    std = k.diagonal().sqrt().clamp(min=1e-300)
    share = own / (std.unsqueeze(1) * std)
    r, own_variance = share.mean(dim=0), share.diagonal(dim1=1, dim2=2)
    first_order = share - r / 2 * (own_variance.unsqueeze(2) + own_variance.unsqueeze(1))
    return k.numpy(), (own.std(dim=0) * chains**-0.5).numpy(), (first_order.std(dim=0) * chains**-0.5).numpy()
