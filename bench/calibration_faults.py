"""Planted faults: what a user might ask for by mistake, or a network that is none to ask about."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import lossk
from bench.calibration_problems import Problem, curvature, gradient_variance, problem
from lossk.samplers.samplers import read_sampler

CLEAN, JUDGED, NEVER = "good", "if right", "never"  # when a run may be called good
Made = Callable[[Problem, int], Any]  # (problem, seed) -> sampler


@dataclass(frozen=True)
class Fault:
    name: str
    problem: str
    sampler: Made = lambda of, seed: None
    good: str = JUDGED
    settings: dict[str, Any] = field(default_factory=dict)  # of build_kernel


def pull(of: Problem) -> float:
    """A localization that is a function of the problem alone: a twentieth of its largest curvature."""
    return of.n_beta * float(curvature(of)[-1]) / 20


def stiffest(of: Problem) -> float:
    """The largest curvature of the law at w*."""
    return 21 * pull(of)


@cache
def _chosen(name: str, kind: str) -> Any:
    """What the engine chooses at that localization, with seed 0."""
    of, kinds = problem(name), {"sgld": lossk.SGLD, "baoab": lossk.BAOAB}
    kernel = lossk.build_kernel(
        of.model, of.data, loss=of.loss, sampler=kinds[kind](localization=pull(of)), num_draws=4, progress=False
    )
    return read_sampler({"kind": kind, **kernel.meta["sampler"]})


def changed(kind: str = "sgld", times: dict[str, float] | None = None, **changes: Any) -> Made:
    """The engine's own choice with some settings multiplied or replaced."""

    def make(of: Problem, seed: int) -> Any:
        base = _chosen(of.name, kind)
        products = {name: getattr(base, name) * factor for name, factor in (times or {}).items()}
        return replace(base, **products, **changes)

    return make


def stepping(share: float, noise: float | None = None, **changes: Any) -> Made:
    """SGLD at a share of the stability limit (s), with minibatches of noise r in the worst direction, else none."""

    def make(of: Problem, seed: int) -> Any:
        lr = 4 * share / stiffest(of)
        batch = None
        if noise is not None:
            factor = 4 * noise / (lr * of.n_beta**2 * gradient_variance(of))
            batch = max(1, round(of.n / (1 + factor * (of.n - 1))))
        settings = {
            "lr": lr,
            "localization": pull(of),
            "batch_size": batch,
            "num_burnin_steps": math.ceil(10 / (lr * pull(of))),
            "num_steps_bw_draws": math.ceil(0.5 / (lr * pull(of))),
            "integrator": "leimkuhler-matthews",
            "control_variate": False,
        }
        return lossk.SGLD(**(settings | changes))

    return make


def pulled(factor: float, **changes: Any) -> Made:
    """Automatic, at so many times the problem's own localization."""
    return lambda of, seed: lossk.SGLD(localization=factor * pull(of), **changes)


def hmc(times: float) -> Made:
    """Trajectories of a quarter period with steps of 0.7 over the stiffest frequency, or `times` that."""

    def make(of: Problem, seed: int) -> Any:
        step = 0.7 / math.sqrt(stiffest(of))
        return lossk.HMC(
            step_size=times * step,
            localization=pull(of),
            num_leapfrog_steps=math.ceil(math.pi / 2 / math.sqrt(pull(of)) / step),
            num_burnin_steps=5,
        )

    return make


def faults() -> Iterator[Fault]:
    """All of them, after the clean runs."""
    for name in ("small linear", "small softmax", "ReLU MLP", "linear"):
        yield Fault("none: automatic", name, pulled(1.0), CLEAN)
    yield Fault("none: full gradient at 20 % of the limit", "small linear", stepping(0.2), CLEAN)
    yield Fault("none: BAOAB", "small linear", changed("baoab"), CLEAN)
    yield Fault("none: HMC", "small linear", hmc(1.0), CLEAN)
    for factor in (2.0, 4.0, 10.0):
        yield Fault(f"lr x {factor:g}", "small softmax", changed(times={"lr": factor}))
    yield Fault("lr x 4", "ReLU MLP", changed(times={"lr": 4.0}))
    for share in (0.6, 0.9):
        yield Fault(f"step at {share:g} of the limit", "ReLU MLP", stepping(share))
    yield Fault("Euler at .24", "small linear", stepping(0.24, integrator="euler"))
    yield Fault("Euler at .12", "small linear", stepping(0.12, integrator="euler"))
    yield Fault("noise .25 and step .45", "small linear", stepping(0.45, 0.25))
    yield Fault("noise .25 and step .45", "small softmax", stepping(0.45, 0.25))
    yield Fault("noise .8 and step .6", "small linear", stepping(0.6, 0.8))
    yield Fault("noise .8 and step .15", "small softmax", stepping(0.15, 0.8))
    yield Fault("batches of 1", "small softmax", changed(batch_size=1, control_variate=False))
    yield Fault("batches of 2, control variate", "small linear", changed(batch_size=2, control_variate=True))
    yield Fault("no burn-in", "small linear", changed(num_burnin_steps=0))
    yield Fault("no burn-in, a draw a step, lr / 20", "small linear",
                changed(times={"lr": 0.05}, num_burnin_steps=0, num_steps_bw_draws=1))  # fmt: skip
    yield Fault("started unmixed: lr / 1000", "small softmax", changed(times={"lr": 0.001}))
    yield Fault("lr / 100", "small softmax", changed(times={"lr": 0.01}))
    yield Fault("10 draws", "small linear", pulled(1.0), settings={"num_draws": 10})
    yield Fault("40 draws", "small softmax", pulled(1.0), settings={"num_draws": 40})
    yield Fault("one chain", "small softmax", pulled(1.0), settings={"num_chains": 1})
    yield Fault("two chains of 30 draws", "small softmax", pulled(1.0), settings={"num_chains": 2, "num_draws": 30})
    yield Fault("localization 0", "small linear", pulled(0.0))
    yield Fault("localization .01", "small linear", lambda of, seed: lossk.SGLD(localization=0.01))
    yield Fault("localization / 1000", "small softmax", pulled(0.001))
    yield Fault("localization x 1000", "small softmax", pulled(1000.0))
    yield Fault("n_beta x 20 at the old step", "small softmax",
                lambda of, seed: changed(n_beta=20 * of.n_beta)(of, seed))  # fmt: skip
    yield Fault("n_beta 1", "small softmax", pulled(1.0, n_beta=1.0))
    yield Fault("HMC, steps x 4: accepts nothing", "small linear", hmc(4.0), NEVER)
    yield Fault("RMSprop", "small softmax",
                lambda of, seed: lossk.SGLD(localization=pull(of), preconditioner="rmsprop"))  # fmt: skip
    yield Fault("BAOAB, step x 1.8", "ReLU MLP", changed("baoab", times={"step_size": 1.8}))
    yield Fault("BAOAB, step x 3", "small softmax", changed("baoab", times={"step_size": 3.0}))
    yield Fault("BAOAB, batches of 2, no control variate", "small softmax",
                changed("baoab", batch_size=2, control_variate=False))  # fmt: skip
    yield Fault("BAOAB, no burn-in, a draw a step, step / 20", "small linear",
                changed("baoab", times={"step_size": 0.05}, num_burnin_steps=0, num_steps_bw_draws=1))  # fmt: skip
    yield Fault("untrained", "untrained", good=NEVER)
    yield Fault("saddle", "saddle", good=NEVER)
    yield Fault("singular", "singular")
    yield Fault("memorised", "memorised")
    yield Fault("heavy-tailed", "heavy-tailed")
