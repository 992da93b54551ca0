"""A Gaussian with the curvature of the loss: independent draws w = w* + A^(-1/2) xi, A = n_beta C + localization I.

C is the Fisher matrix at w* (`lossk.curvature.fisher`), by Kronecker factors layer by layer or its diagonal. This is
the Laplace approximation of the probe's law p(w) (MacKay 1992; Kronecker-factored: Ritter, Botev and Barber 2018),
centered on w*. No chain, no burn-in: every draw costs one pass over the probe. It is exact where the loss is quadratic
with C as its Hessian and w* its minimum; elsewhere it is a law of its own, to be compared with a sampler's before it is
believed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from lossk.checks import check_automatic, check_choice, check_integer
from lossk.curvature.fisher import FisherSamples, fisher_diagonal, kronecker_factors, kronecker_layers
from lossk.data.data import Samples
from lossk.errors import DivergedError
from lossk.ops.philox import normals
from lossk.samplers.chain import Chain, Surroundings
from lossk.settings import SamplerSettings, check_n_beta, put
from lossk.task.task import Task

STRUCTURES = ("kronecker", "diagonal")


@dataclass(frozen=True, kw_only=True)
class Laplace(SamplerSettings):
    """Sampler settings.

    Args:
        n_beta: n times the inverse temperature; None is n / ln n with n the number of *training* samples.
        localization: gamma, greater than 0, or "auto": the value SGLD(localization="auto") takes.
        structure: "kronecker": K-FAC for every Linear and Conv2d layer (one group, unshared weight, called once per
            pass, sides up to 4,096) and the diagonal for all other parameters; or "diagonal" for all.
        params: shell-style patterns of the parameter names to move; None is every parameter that requires grad.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.
    """

    n_beta: float | None = None
    localization: float | Literal["auto"] = "auto"
    structure: Literal["kronecker", "diagonal"] = "kronecker"

    def __post_init__(self) -> None:
        super().__post_init__()
        put(
            self,
            n_beta=check_n_beta(self.n_beta),
            localization=check_automatic("localization", self.localization, above=0.0),
            structure=check_choice("structure", self.structure, STRUCTURES),
        )

    def steps(self, num_draws: int) -> int:
        """Moves of one chain of `num_draws` draws."""
        return check_integer("num_draws", num_draws, 1)


def fit_laplace(sampler: Laplace, task: Task, train: Samples, seed: int) -> dict[str, Tensor]:
    """What the draws need, float32.

    "deviation" [P]: standard deviations of the diagonal parameters in the order of `task.flat` (0 for the others). For
    a layer with factors, whose weight is parameter i of `task.sampled`, its bias j or nothing: "layer.i.j.left" [o, o]
    and "layer.i.j.right" [d, d], the eigenvectors of E[g g'] and E[a a'], and "layer.i.j.deviation" [o, d] between.
    """
    assert sampler.n_beta is not None
    n_beta, gamma = sampler.n_beta, float(sampler.localization)
    samples = FisherSamples(task, train, seed)
    layers = kronecker_layers(task, samples) if sampler.structure == "kronecker" else []
    fitted: dict[str, Tensor] = {}
    factors = kronecker_factors(layers, samples)
    for layer, (of_inputs, of_outputs) in zip(layers, factors, strict=True):
        sizes_in, right = torch.linalg.eigh(of_inputs)
        sizes_out, left = torch.linalg.eigh(of_outputs)
        curvature = n_beta * sizes_out.clamp(min=0)[:, None] * sizes_in.clamp(min=0) + gamma
        key = f"layer.{layer.weight}.{'' if layer.bias is None else layer.bias}"
        fitted |= {
            f"{key}.left": left.float(), f"{key}.right": right.float(), f"{key}.deviation": curvature.rsqrt().float(),
        }  # fmt: skip
    covered = {i for layer in layers for i in layer.members}
    places = [i for i in range(len(task.sampled)) if i not in covered]
    parts = [torch.zeros(p.shape, dtype=torch.float64, device=p.device) for p in task.sampled]
    for i, fisher in zip(places, fisher_diagonal(places, samples), strict=True):
        parts[i] = (n_beta * fisher + gamma).rsqrt()
    fitted["deviation"] = task.flatten(parts).float()
    return fitted


class LaplaceChain(Chain):
    """One run of independent draws; the draw's number is the step of its counter-based noise."""

    def __init__(self, around: Surroundings, sampler: Laplace, chain: int) -> None:
        super().__init__(around, chain)
        self.sampler = sampler
        ends = list(accumulate(p.numel() for p in self.task.sampled))
        self._spans = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        names = {name.rsplit(".", 1)[0] for name in around.fitted if name.startswith("layer.")}
        self._layers = sorted(names)

    def advance(self) -> float:
        """One draw; no loss is evaluated."""
        fitted = self.around.fitted
        noise = normals(self.around.seed, self.chain, self.step, self.task.num_weights).to(self.task.device)
        move = noise * fitted["deviation"]
        for key in self._layers:
            weight, bias = (int(part) if part else None for part in key.split(".")[1:])
            assert weight is not None
            self._move_layer(noise, move, key, weight, bias)
        torch.add(self.task.anchor, move, out=self.task.flat)
        self.step += 1
        return math.nan

    def _move_layer(self, noise: Tensor, move: Tensor, key: str, weight: int, bias: int | None) -> None:
        """left (deviation * xi) right', xi the layer's own elements of the noise in any fixed order."""
        fitted, shape = self.around.fitted, self.task.sampled[weight].shape
        xi = noise[self._spans[weight]].view(shape[0], -1)
        if bias is not None:
            xi = torch.cat([xi, noise[self._spans[bias]].view(-1, 1)], dim=1)
        matrix = fitted[f"{key}.left"] @ (fitted[f"{key}.deviation"] * xi) @ fitted[f"{key}.right"].T
        if bias is not None:
            move[self._spans[bias]] = matrix[:, -1]
            matrix = matrix[:, :-1]
        move[self._spans[weight]] = self.task.flatten([matrix.reshape(shape)])

    def diverged(self, what: str) -> DivergedError:
        gamma = float(self.sampler.localization)
        return DivergedError(
            f"chain {self.chain}, draw {self.step - 1}: {what}; try localization={16 * gamma:.2g} instead of "
            f"{gamma:.2g}"
        )
