"""One trial chain: how far the training loss rises, whether the losses have reached a plateau, what they remember."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import ndtri, stdtr
from torch import Tensor

from lossk.curvature.curvature import (
    PILOT_CHAIN,
    Sample,
    control_variance,
    gradient_variance,
    largest_curvature,
    steepness,
)
from lossk.diagnostics.bias import UNEVEN
from lossk.forms.watched import watched_samples
from lossk.pilot.effort import FULL, TrialSize
from lossk.samplers.chain import Surroundings
from lossk.samplers.sgld import SGLD, SGLDChain
from lossk.task.task import fitting_batch
from lossk.timings import Progress

MEMORIES = 10  # length of a trial after its burn-in, in decorrelation times of flat directions
LONGER = 4  # times that, where the curvature is uneven: so few draws do not show how steep the steepest are
LONGEST = 2000  # steps of a trial
LONG = 100  # steps after burn-in: so many are worth asking first whether they are of use
WINDOW, FAR = 20, 2.0  # a rise this many times too high over so many steps is no news to wait for
PLATEAU_Z = 4.0
DRIFT_Z, DRIFTING = 3.0, 0.1  # of a sample, and the share of samples that may have it


@dataclass(frozen=True)
class Autocorrelation:
    """How a loss forgets: its autocorrelations at multiples of so many steps, 1 first; 0 after the last."""

    rho: tuple[float, ...]
    every: float = 1.0  # steps

    @property
    def steps(self) -> float:
        """Integrated autocorrelation time."""
        return self.every * max(2 * sum(self.rho) - 1, 1.0)

    def at(self, steps: float) -> float:
        """The autocorrelation after so many steps."""
        lag = steps / self.every
        whole = int(lag)
        here, there = (self.rho[k] if k < len(self.rho) else 0.0 for k in (whole, whole + 1))
        return here + (there - here) * (lag - whole)

    def squares(self, steps: float) -> float:
        """1 + 2 sum of the squared autocorrelations at all multiples of so many steps."""
        lags = range(1, int(self.every * len(self.rho) / steps) + 1)
        return 1 + 2 * sum(self.at(k * steps) ** 2 for k in lags)

    def slowed(self, factor: float) -> Autocorrelation:
        """The same, with that many times the steps."""
        return dataclasses.replace(self, every=self.every * factor)


@dataclass(frozen=True)
class Trial:
    """What a trial chain showed."""

    rise: float  # of the training loss over its value at w*, after burn-in, nats
    steps: int
    whole: bool  # long enough to see flat directions forget
    cut: bool = False  # of no use beyond its burn-in: curvature, variance and noise are what it says
    autocorrelation: Autocorrelation | None = None  # of the median sample's loss
    drift: float = 0.0  # of the mean loss between the two halves after burn-in, as a normal z
    drifting: float = 0.0  # share of samples whose own loss drifts by |z| > 3 between them
    curvature: float | None = None  # h_max at its draws, their mean
    steepest: float | None = None  # at the steepest draw of a thousand
    measured: int = 1  # of so many
    variance: float | None = None  # lambda_max(Cov g) at its last draw
    noise: float | None = None  # lambda_max(Cov(g_i(w) - g_i(w*))) there, with a control variate

    @property
    def settled(self) -> bool:
        return abs(self.drift) <= PLATEAU_Z and self.drifting <= DRIFTING


def run_trial(
    sampler: SGLD,
    around: Surroundings,
    *,
    bound: float = math.inf,
    most: int = LONGEST,
    size: TrialSize = FULL,
    of_use: Callable[[Trial], bool] | None = None,
    bar: Progress | None = None,
) -> Trial:
    """One chain from w* at resolved settings.

    What the settings need of `fit` must be in `around.fitted`.

    Args:
        bound: of the rise; where the chain is far beyond it, it ends early, and only `rise` says something.
        most: steps.
        size: what it measures, and on how many samples.
        of_use: asked right after the burn-in of a long trial with what it has shown by then; False ends it.

    Raises:
        DivergedError: it exploded.
    """
    task, train, bar = around.task, around.train, bar or Progress(False)
    chain = SGLDChain(around, sampler, PILOT_CHAIN)
    most = max(min(most, LONGEST), 2 * WINDOW)
    burnin = min(int(sampler.num_burnin_steps), most // 2)
    wanted = steps_after_burnin(sampler)
    after = int(min(wanted, most - burnin))
    every = max(1, -(-after // size.records))
    marks = {after * part // (size.measured - 1) for part in range(size.measured)}
    last, longest = after, int(min(LONGER * wanted, most - burnin))
    glances = {after * part // (size.glances - 1) for part in range(LONGER * size.glances)} | marks
    few = watched_samples(len(train))[: size.watched].split(
        fitting_batch(min(256, task.passes.probe_batch), task.loss.positions)
    )

    def measure(what: Callable[..., float], **sample: Any) -> float:
        try:
            return what(task, train, seed=around.seed, **sample)
        except ValueError as error:
            raise chain.diverged(str(error)) from error

    controlled: Sample = {} if size == FULL else size.sample  # 512 samples where nobody counts
    task.reset()
    chain.begin()
    excess: list[float] = []
    rows: list[Tensor] = []
    curvatures: dict[int, float] = {}  # at steps after burn-in
    glanced: dict[int, float] = {}

    def shown(rise: float, *, whole: bool, cut: bool = False) -> Trial:
        noise = measure(control_variance, held_out=True, **controlled) if chain.force.control is not None else None
        curvature, steepest = _over_draws(curvatures, glanced)
        variance = measure(gradient_variance, held_out=True, **size.sample)
        return Trial(
            rise, len(excess), whole, cut,
            curvature=curvature, steepest=steepest, measured=len(curvatures), variance=variance, noise=noise,
        )  # fmt: skip

    while len(excess) < burnin + last:
        step = len(excess) + 1
        excess.append(chain.advance())
        bar.update()
        recent = sum(excess[-WINDOW:]) / min(len(excess), WINDOW)
        if len(excess) >= WINDOW and recent > FAR * bound:
            return Trial(recent, step, whole=False, curvature=measure(largest_curvature, **size.sample))
        if step > burnin and (step - burnin) % every == 0:
            rows.append(torch.cat([task.losses(train[part]) for part in few]).double())
        if step - burnin in glances:
            glanced[step] = measure(largest_curvature, across=chain.reach / 2, **size.glance)
        if step - burnin in marks:
            curvatures[step] = measure(largest_curvature, **size.sample)
        if step == burnin and after >= LONG and of_use is not None:
            so_far = shown(recent, whole=False, cut=True)
            if not of_use(so_far):
                return so_far
        if step == burnin + after and _uneven(glanced):
            last = longest
    traces = torch.stack(rows).cpu()  # [T, w] float64, read by NumPy below
    if not torch.isfinite(traces).all():
        raise chain.diverged("a training sample has a loss that is not finite")
    drift, drifting = _drift(traces)
    whole = after == wanted and burnin == int(sampler.num_burnin_steps)
    autocorrelation = Autocorrelation(tuple(autocorrelations(traces)), every)
    return dataclasses.replace(
        shown(sum(excess[burnin:]) / last, whole=whole), autocorrelation=autocorrelation, drift=drift, drifting=drifting
    )


def _uneven(glanced: dict[int, float]) -> bool:
    """Whether rare draws are so steep that many must be looked at."""
    return steepness(_values(glanced)) > UNEVEN


def _values(glanced: dict[int, float]) -> Tensor:
    return torch.tensor(list(glanced.values()), dtype=torch.float64, device="cpu")


def _over_draws(measured: dict[int, float], glanced: dict[int, float]) -> tuple[float, float]:
    """(mean, 99.9 % quantile) of the curvature over draws: few measured well, more glanced at, in step with them.

    A glance is off by much the same factor everywhere, so what it says is how much the curvature varies.
    """
    mean = sum(measured.values()) / len(measured)
    glances = _values(glanced)
    here = sum(glanced[step] for step in measured) / len(measured)
    if here > 0:
        mean *= float(glances.mean()) / here
    return mean, mean * steepness(glances)


def steps_after_burnin(sampler: SGLD) -> float:
    """That a trial of resolved settings wants: so many decorrelation times of flat directions."""
    pull = float(sampler.lr) * sampler.gain * float(sampler.localization)
    return MEMORIES * math.ceil(2 / pull) if pull > 0 else math.inf


def autocorrelation_time(traces: Tensor) -> float:
    """1 + 2 sum rho_k of the median sample: [T, w] -> in records."""
    return Autocorrelation(tuple(autocorrelations(traces))).steps


def autocorrelations(traces: Tensor) -> list[float]:
    """rho_0 = 1, rho_1, ... of the median sample, as far as Geyer's initial positive pairs (1992): [T, w] -> records.

    rho_k is the median over samples of the autocorrelation at lag k; samples that do not vary are left out.
    """
    centered = traces - traces.mean(dim=0)
    variance = centered.square().mean(dim=0)
    centered = centered[:, variance > 0] / variance[variance > 0].sqrt()
    t = len(centered)
    if centered.shape[1] == 0 or t < 4:
        return [1.0]
    rho = [float((centered[: t - k] * centered[k:]).sum(dim=0).div(t - k).median()) for k in range(t // 2)]
    time = 2 * sum(_positive_pairs(rho)) - 1
    # Centering on the trace's own mean lowers every rho_k by about time / T (Marriott and Pope 1954): put back once.
    return _positive_pairs([r + (1 - r) * min(time / t, 0.25) for r in rho])


def _positive_pairs(rho: Sequence[float]) -> list[float]:
    kept: list[float] = []
    for even, odd in zip(rho[::2], rho[1::2], strict=False):
        if even + odd <= 0.05:  # what the correction above adds to no correlation at all
            break
        kept += [even, odd]
    return kept


def _drift(traces: Tensor) -> tuple[float, float]:
    """z of the mean loss between the halves, and the share of samples that drift by |z| > 3; [T, w].

    A half is worth half / time draws: with few, the difference over its error has Student's tails, and z is the normal
    deviate that is as rare.
    """
    half = len(traces) // 2
    if half < 4:
        return 0.0, 0.0

    def z(x: Tensor) -> Tensor:
        first, second = x[:half], x[half : 2 * half]
        # A trend is what is looked for: it must not pass for noise with a long memory.
        noise = torch.cat([_without_trend(first), _without_trend(second)])
        time = min(autocorrelation_time(noise), half)
        error = (2 * noise.square().mean(dim=0) * time / half).sqrt().clamp(min=1e-300)
        ratio = ((second.mean(dim=0) - first.mean(dim=0)) / error).abs().numpy()
        freedom = max(2 * half / time - 4, 1.0)  # less two means and two trends
        return torch.from_numpy(-ndtri(stdtr(freedom, -ratio)))

    mean = traces.mean(dim=1, keepdim=True)
    samples = traces[:, traces.var(dim=0) > 0]
    share = float((z(samples) > DRIFT_Z).double().mean()) if samples.shape[1] else 0.0
    return float(z(mean)[0]) if float(mean.var()) > 0 else 0.0, share


def _without_trend(x: Tensor) -> Tensor:
    """[T, w] less each column's least-squares line."""
    time = torch.linspace(-1, 1, len(x), dtype=x.dtype, device="cpu")
    centered = x - x.mean(dim=0)
    return centered - time.outer(time @ centered / time.square().sum())
