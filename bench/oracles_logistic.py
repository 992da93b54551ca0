"""T9: logistic regression, whose kernel tends to the classical influence function."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn

from bench.oracle_laws import draw, over_copies, plane, quadrature, sampler, total_covariance
from bench.oracle_problems import Array, Copies, Row, Size, float32, rows


def logistic_loss(model: Any, batch: Any) -> Tensor:
    """T9: log(1 + exp(-y x'w)), rows y x; training rows (yx,) summed over copies, probe rows (yx, copy)."""
    if len(batch) == 1:
        return nn.functional.softplus(-batch[0] @ model.weight.T).sum(1)
    return nn.functional.softplus(-(batch[0] * model.weight[batch[1]]).sum(1))


def logistic_problem() -> tuple[Array, Array, Array, Array]:
    """(y x [n, 2], w* [2] the maximum-likelihood fit, the losses' gradients there [n, 2], Hessian of their mean)."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((12, 2))
    yx = float32(x * np.sign(x @ [1.0, -0.5] + 1.5 * rng.standard_normal(12))[:, None])
    w = np.zeros(2)
    for _ in range(50):
        p = special.expit(-yx @ w)
        gradients = -p[:, None] * yx
        hessian = (p * (1 - p) * yx.T) @ yx / len(yx)
        w = w - np.linalg.solve(hessian, gradients.mean(0))
    assert np.linalg.norm(w) < 10, "the data are separable"
    return yx, w, gradients, hessian


def t9(size: Size) -> list[Row]:
    """n_beta K against the influence function at fixed gamma / n_beta: the distance falls as 1 / n_beta."""
    yx, w_star, gradients, hessian = logistic_problem()
    ratio, copies, probes = 0.1, 64, 6
    shape = hessian + ratio * np.eye(2)
    influence = (gradients @ np.linalg.solve(shape, gradients.T))[:probes, :probes]
    norm = np.linalg.norm(influence)
    out = []
    for number, n_beta in enumerate((30.0, 120.0, 480.0) if size.long else (30.0, 120.0)):
        eps = 0.1 / (n_beta * np.linalg.eigvalsh(shape)[-1])
        offset = plane((10 / np.sqrt(n_beta * np.linalg.eigvalsh(shape)[0]),) * 2, 301)
        margin = (w_star + offset) @ yx.T
        p = special.expit(-margin)
        losses = np.logaddexp(0, -margin).T
        u = n_beta * (losses.mean(0) + ratio / 2 * (offset**2).sum(1))
        gradient = n_beta * (-p @ yx / len(yx) + ratio * offset)
        laplacian = n_beta * ((p * (1 - p)) @ (yx**2).sum(1) / len(yx) + 2 * ratio)
        exact, discrete = (quadrature(u, (gradient**2).sum(1), laplacian, losses[:probes], s)[1] for s in (0.0, eps))
        distance = n_beta * exact - influence
        direction = distance / np.linalg.norm(distance)
        y = torch.tensor(yx).float()
        settings = sampler(eps, n_beta, n_beta * ratio, 150, 20)
        traces = draw(
            Copies(w_star, copies), over_copies(copies, y[:probes]), (y,), logistic_loss, settings, size.part(number)
        )
        k, chains = total_covariance(traces, copies)
        along = lambda m: np.einsum("...ij,ij->...", m, direction)[..., None] / norm  # noqa: E731, B023
        shift = n_beta * (discrete - exact)
        name = f"|n_beta K - IF| / |IF|, n_beta = {n_beta:.0f}"
        truth = [np.linalg.norm(distance) / norm]
        out += rows("T9 influence limit", [name], truth, along(n_beta * k - shift - influence), along(n_beta * chains))
    return out
