"""The samplers there are: by name for configs, and from settings to a chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lossk.checks import shown
from lossk.data.data import Samples
from lossk.ranks.world import ALONE, World
from lossk.samplers.baoab import BAOAB, BAOABChain
from lossk.samplers.chain import Chain, Surroundings
from lossk.samplers.force import FULL_GRADIENT, full_gradient
from lossk.samplers.gaussian import Gaussian, GaussianChain
from lossk.samplers.hmc import HMC, HMCChain
from lossk.samplers.laplace import Laplace, LaplaceChain, fit_laplace
from lossk.samplers.sgld import SGLD, SGLDChain
from lossk.task.task import Task

Sampler = SGLD | BAOAB | HMC | Laplace | Gaussian
MOST_STEPS_IN_ALL = 2**32  # a step is one word of the Philox counter
KINDS: dict[str, type[Sampler]] = {"sgld": SGLD, "baoab": BAOAB, "hmc": HMC, "laplace": Laplace, "gaussian": Gaussian}


def check_sampler(sampler: Any, num_draws: int, params: Any = None) -> Sampler:
    """A sampler's settings, or those of `SGLD()` for None; `params`, given beside it, are the weights that it samples.

    Raises:
        TypeError: something else.
        ValueError: a chain of more steps than the noise's counter can count; a sampler that has other `params` already.
    """
    if sampler is None:
        return SGLD(params=params)
    if not isinstance(sampler, Sampler):
        names = ", ".join(kind.__name__ for kind in KINDS.values())
        found = shown(sampler) if isinstance(sampler, type) else type(sampler).__name__
        raise TypeError(f"sampler must be a sampler of lossk ({names}) or None, got {found}")
    known = "auto" not in (getattr(sampler, "num_burnin_steps", 0), getattr(sampler, "num_steps_bw_draws", 1))
    if known and sampler.steps(num_draws) >= MOST_STEPS_IN_ALL:
        raise ValueError(
            f"sampler: num_burnin_steps and num_draws times num_steps_bw_draws must be less than 2^32 together, "
            f"got {sampler.steps(num_draws)}"
        )
    if params is None:
        return sampler
    chosen = dataclasses.replace(sampler, params=params)
    if sampler.params not in (None, chosen.params):
        raise ValueError(f"params must be given once, got params={params!r} beside a sampler with {sampler.params!r}")
    return chosen


def kind_of(sampler: Sampler) -> str:
    """Its name in a config."""
    return type(sampler).__name__.lower()


def read_sampler(plain: Mapping[str, Any]) -> Sampler:
    """{"kind": "gaussian", "sigma": 0.01} -> Gaussian(sigma=0.01); without a kind it is SGLD.

    Raises:
        ValueError, TypeError: an unknown kind, or what the sampler refuses.
    """
    settings = dict(plain)
    kind = settings.pop("kind", "sgld")
    if kind not in KINDS:
        raise ValueError(f"sampler.kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind](**settings)


def fit_early(sampler: Sampler, task: Task, train: Samples, world: World) -> dict[str, Tensor]:
    """Of what `fit` returns, what no "auto" has a part in: trial chains need it too."""
    if isinstance(sampler, SGLD | BAOAB) and sampler.control_variate is True:
        return {FULL_GRADIENT: full_gradient(task, train, world)}
    return {}


def fit(
    sampler: Sampler, task: Task, train: Samples, *, seed: int, early: dict[str, Tensor] | None = None,
    world: World = ALONE,
) -> dict[str, Tensor]:  # fmt: skip
    """What every chain of a resolved sampler needs and is worked out once, at w*.

    Args:
        early: what `fit_early` returned, or trial chains left; the same on all ranks.
        world: its ranks all call this and share the gradient of the training loss; the rest each works out.
    """
    if isinstance(sampler, SGLD | BAOAB) and sampler.control_variate:
        if early and FULL_GRADIENT in early:
            return {FULL_GRADIENT: early[FULL_GRADIENT]}
        return {FULL_GRADIENT: full_gradient(task, train, world)}
    if isinstance(sampler, Laplace):
        return fit_laplace(sampler, task, train, seed)
    return {}


def make_chain(sampler: Sampler, around: Surroundings, chain: int) -> Chain:
    """Chain number `chain` of a resolved sampler."""
    if isinstance(sampler, Gaussian):
        return GaussianChain(around, sampler, chain)
    if isinstance(sampler, BAOAB):
        return BAOABChain(around, sampler, chain)
    if isinstance(sampler, HMC):
        return HMCChain(around, sampler, chain)
    if isinstance(sampler, Laplace):
        return LaplaceChain(around, sampler, chain)
    return SGLDChain(around, sampler, chain)
