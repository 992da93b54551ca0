"""The chain's weights are float32 whatever the model's dtype and the forward precision: its variance is right in all.

With the drift added in bfloat16, small drifts round away and the prior's variance comes out 4 to 16 times too large.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lossk

LR, GAMMA, WEIGHTS = 1e-3, 100.0, 64


class Bare(nn.Module):
    """Weights of order one, where bfloat16 has steps of 2^-8 and the prior's deviation is 0.1."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(1.0, 2.0, WEIGHTS).to(dtype))

    def forward(self, index: Tensor) -> Tensor:
        return self.w[index]


def weight_itself(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Loss i is weight i, so that the kernel is the chain's own covariance."""
    return model(batch[0])


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, None),
        (torch.float32, "bf16"),
        (torch.bfloat16, None),
        (torch.bfloat16, "bf16"),
        (torch.float16, "fp16"),
        (torch.float64, None),
    ],
    ids=str,
)
def test_the_prior_alone_has_its_variance(dtype: torch.dtype, precision: Any) -> None:
    """n_beta = 1e-6 leaves the prior: per weight 1 / (gamma (1 - eps gamma / 4)), a Bartlett error bar, |z| < 4.5.

    64 independent weights, 4 chains x 150 draws 20 steps apart (lag-1 autocorrelation 0.95^20 = 0.36); centering each
    chain on its own mean takes (1 - v) T / (T - 1) of it (math: T4).
    """
    chains, draws, thin = 4, 150, 20
    index = torch.arange(WEIGHTS)
    model = Bare(dtype)
    kernel = lossk.build_kernel(
        model,
        (index, torch.zeros(WEIGHTS)),
        loss=weight_itself,
        sampler=lossk.SGLD(
            lr=LR, n_beta=1e-6, localization=GAMMA, batch_size=None, num_burnin_steps=100, num_steps_bw_draws=thin
        ),
        num_chains=chains,
        num_draws=draws,
        precision=precision,
        progress=False,
    )
    rho = (1 - LR * GAMMA / 2) ** thin
    v = (1 + 2 * sum((1 - k / draws) * rho**k for k in range(1, draws))) / draws
    truth = draws / (draws - 1) * (1 - v) / (GAMMA * (1 - LR * GAMMA / 4))
    mean = float(kernel.variance.mean())
    error = truth * (2 * (1 + rho**2) / (1 - rho**2) / (chains * draws * WEIGHTS)) ** 0.5
    assert abs(mean - truth) < 4.5 * error, f"z = {(mean - truth) / error:.2f}"
    assert model.w.dtype == dtype
