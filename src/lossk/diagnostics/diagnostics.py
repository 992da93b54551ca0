"""Did the chains sample what they claim to?  R-hat, effective draws, learning coefficient, and a verdict in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lossk.checks import check_choice
from lossk.diagnostics.information import Criteria, Estimate, mean_over_draws
from lossk.diagnostics.reliability import mean_error, reliability, size_error
from lossk.diagnostics.table import as_html, as_text
from lossk.diagnostics.verdict import below_minimum, judge
from lossk.forms.centering import never_varies, row_means
from lossk.forms.watched import watched_samples
from lossk.optional import require

if TYPE_CHECKING:
    from lossk.kernel.traces import LossTraces
    from lossk.pilot.pilot import Pilot
    from lossk.samplers.sgld import SGLD

RANKED = 64  # of them, of which R-hat and ESS are taken: ArviZ goes through traces one by one, and medians need no more

OVER_CHAINS = ("functional_variance", "singular_fluctuation", "waic", "wbic")  # errors are the spread of the chains


@dataclass(frozen=True, kw_only=True, repr=False)
class Diagnostics:
    """Numbers about a run; None where they cannot be known (a single chain, traces from elsewhere).

    Errors of V, nu, WAIC and WBIC are the spread of the chains over sqrt(C), with the bias of few draws: `interval`
    reads them with Student's t of C - 1 degrees of freedom (4 chains: +- 3.18 of them cover 95 %).
    """

    rhat: float | None  # rank-normalised split R-hat of the mean probe loss (Vehtari et al. 2021), by ArviZ
    ess: float | None  # bulk effective sample size of the mean probe loss, over all chains
    sample_rhat: float | None  # median R-hat over (up to 64) samples' own losses
    sample_ess: float | None  # median ESS over the same samples
    sample_rhat_high: float | None = None  # 95th percentile over them
    sample_ess_low: float | None = None  # 5th percentile over them
    llc_rhat: float | None = None  # of the rise of the training loss, whose mean the LLC is
    llc_ess: float | None = None
    llc: float | None  # n_beta (E[L_n(w)] - L_n(w*)), the local learning coefficient
    llc_se: float | None  # Monte Carlo standard error of llc, Student's t included: +- 1.96 of it cover 95 %
    num_chains: int | None = None
    mean_loss: Estimate | None = None  # of the probe, over all draws and samples, nats; t is in its error, too
    functional_variance: Estimate | None  # V: sum over the training samples of Var(loss), nats^2; probe = train only
    singular_fluctuation: Estimate | None  # nu = beta V / 2 with beta = n_beta / n (Watanabe 2009)
    waic: Estimate | None  # T_n + beta V / n, T_n = -mean log E[exp(-loss)], nats (Watanabe 2010); for log losses
    wbic: Estimate | None  # n E[L_n(w)], nats; only at n_beta = n / ln n (Watanabe 2013)
    noise_floor: float | None  # median over samples: the largest correlation that chance alone would show
    foreseen_bias: float | None = None  # of the variance of the stiffest and noisiest mode, relative (`bias`)
    gradient_noise_ratio: float | None  # minibatch noise over injected noise, worst direction; well below 1 is right
    discretisation: float | None  # eps a_max / 4, excess variance of the stiffest direction; squared if averaged
    burnin_completeness: float | None  # share of its stationary variance that a flat direction has at the first draw
    drift: float | None  # of the mean probe loss, first third of the draws to last, in standard deviations over draws
    drift_z: float | None  # the same in standard errors
    stability: float | None = None  # eps a / 4 at the steepest draw of a thousand, averaged noise; 1 is unstable
    reliability: float | None = None  # of R: its correlation over pairs of samples with that of another such run
    reliability_kernel: float | None = None  # of K likewise
    size_error: float | None = None  # relative standard error of the total variance of the watched samples
    unevenness: float | None = None  # of the curvature: at the steepest draw of a thousand, over its mean over draws
    growth: float | None = None  # of |w - w*|^2 from the first third of the draws to the last, relative
    growth_z: float | None = None  # the same in standard errors
    rise: float | None = None  # E[L_n(w)] - L_n(w*), of the training loss
    uninformed: float | None = None  # what a predictor that has learnt nothing loses, where that is known
    acceptance: float | None = None  # of a Metropolis test, mean over draws; of HMC, or of SGLD that measures it
    distance: float | None = None  # mean over draws of |w - w*|
    effective_dimension: float | None = None  # directions at w* in which the data beat the pull; of an automatic law
    dead_share: float  # share of samples whose loss never varied
    verdict: str  # "good" or what is wrong
    advice: str  # the number behind the verdict and one change to make

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float] | None:
        """The ends of the interval that holds a number with probability `level`, over runs; None where it is unknown.

        Args:
            name: "llc", "mean_loss", "functional_variance", "singular_fluctuation", "waic" or "wbic".

        Raises:
            ValueError: another name, or a level outside 0 to 1.
        """
        name = check_choice("name", name, ("llc", "mean_loss", *OVER_CHAINS))
        if name == "llc" and self.llc is not None and self.llc_se is not None:
            return Estimate(self.llc, self.llc_se).interval(level)
        found = None if name == "llc" else getattr(self, name)
        if found is None:
            return None
        known = self.num_chains if name in OVER_CHAINS else None
        return found.interval(level, freedom=math.inf if known is None else max(known - 1, 1))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Diagnostics:
        pairs = (*OVER_CHAINS, "mean_loss")
        read: dict[str, Any] = {f.name: None for f in dataclasses.fields(cls)}  # an older store knows fewer numbers
        read |= {k: Estimate(*v) if k in pairs and v is not None else v for k, v in plain.items()}
        return cls(**read)

    @property
    def no_minimum(self) -> bool:
        """Draws lower the training loss: w* is no minimum of it, and there is no learning coefficient of it."""
        return below_minimum(self.llc, self.llc_se)

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def __str__(self) -> str:
        llc = "unknown" if self.llc is None else f"{self.llc:.2f} +- {_number(self.llc_se)}"
        if self.no_minimum:
            llc = f"none: w* is no minimum of the training loss at this scale (n_beta times its rise is {self.llc:.4g})"
        criteria = []
        if self.functional_variance is not None and self.singular_fluctuation is not None and self.waic is not None:
            v, nu, waic = self.functional_variance, self.singular_fluctuation, self.waic
            criteria.append(
                f"WAIC         {waic.value:.4f} +- {_number(waic.se, 4)} per term of the loss, if that is a log loss; "
                f"functional variance {v.value:.3g}, singular fluctuation {nu.value:.2f} +- {_number(nu.se)}"
            )
        moves = []
        if self.distance is not None:
            moves.append(f"distance     {self.distance:.3g} (mean |w - w*|)")
        if self.effective_dimension is not None:
            moves.append(f"dimension    {self.effective_dimension:.3g} (directions in which the data beat the pull)")
        if self.acceptance is not None:
            moves.append(f"acceptance   {self.acceptance:.3f} (Metropolis test)")
        return "\n".join(
            [
                f"LLC          {llc}",
                f"R-hat        {_number(self.rhat, 3)} (mean loss), {_number(self.llc_rhat, 3)} (LLC), "
                f"{_number(self.sample_rhat, 3)} (median sample), {_number(self.sample_rhat_high, 3)} (95 % quantile)",
                f"ESS          {_number(self.ess, 0)} (mean loss), {_number(self.llc_ess, 0)} (LLC), "
                f"{_number(self.sample_ess, 0)} (median sample), {_number(self.sample_ess_low, 0)} (5 % quantile)",
                *criteria,
                *moves,
                f"reliability  {_number(self.reliability)} (R), {_number(self.reliability_kernel)} (K): correlation "
                "with another run of this length",
                f"noise floor  {_number(self.noise_floor)} (correlation that chance alone would show)",
                f"verdict      {self.verdict}: {self.advice}",
            ]
        )


def _number(value: float | None, digits: int = 2) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"


def diagnose_traces(traces: LossTraces) -> Callable[[float | None], Diagnostics]:
    """Diagnostics of bare traces, which do not say whether their samples are the training samples, for a noise floor.

    The losses are read here, and are not needed afterwards.
    """
    losses = traces.losses
    read: dict[str, Any] = {
        "mean_loss": torch.stack([row_means(chain) for chain in losses]),
        "watched": losses[:, :, watched_samples(traces.num_samples, traces.num_chains * traces.num_draws)],
        "dead_share": float(torch.stack([never_varies(chain) for chain in losses]).all(dim=0).double().mean()),
        "excess": traces.excess,
        "n_beta": traces.n_beta,
    }
    return lambda floor: diagnose(**read, noise_floor=floor, criteria=None, pilot=None, sampler=None)


def diagnose(
    *,
    mean_loss: Tensor,
    watched: Tensor,
    dead_share: float,
    noise_floor: float | None,
    excess: Tensor | None,
    n_beta: float | None,
    criteria: Criteria | None,
    pilot: Pilot | None,
    sampler: SGLD | None,
    noise_ratio: float | None = None,
    acceptance: Tensor | None = None,
    distance: Tensor | None = None,
    uninformed: float | None = None,
    completeness: float | None = None,
    rejects: bool = False,
) -> Diagnostics:
    """Combine traces and pilot into diagnostics.

    Args:
        mean_loss: [C, T] mean probe loss of each draw, nats.
        watched: [C, T, w] losses of some samples.
        noise_floor: median over samples.
        excess: [C, T] rise of the training loss over its value at w*.
        criteria: what the information criteria need, where the probe is the training set.
        sampler: the resolved one.
        noise_ratio: minibatch noise over injected noise, of a sampler that is not SGLD.
        acceptance: [C, T], NaN where it was not asked for.
        distance: [C, T], |w - w*|.
        uninformed: what a predictor that has learnt nothing loses, where that is known.
        completeness: share of its stationary variance that the slowest mode has at the first draw, of a sampler that is
            not SGLD.
        rejects: whether the acceptance is that of the chain's own steps.
    """
    rhats, sizes = _rhat_ess(mean_loss.double().numpy()[..., None])
    few = watched[..., :: -(-watched.shape[-1] // RANKED)]
    sample_rhats, sample_sizes = _rhat_ess(few.double().numpy())
    llc_rhats, llc_sizes = _rhat_ess(np.empty((1, 0, 1)) if excess is None else excess.double().numpy()[..., None])
    drift, drift_z = _drift(mean_loss.double().numpy())
    llc = llc_se = None
    if excess is not None and n_beta is not None:
        rise = mean_over_draws(excess)
        llc, llc_se = n_beta * rise.value, n_beta * rise.se
    noise, discretisation, stability = noise_ratio, None, None
    bias = noise_ratio  # of a sampler without discretisation bias in a quadratic
    if sampler is not None:
        retained = 1.0 - float(sampler.lr) * sampler.gain * float(sampler.localization) / 2.0
        completeness = 1.0 - retained ** (2 * int(sampler.num_burnin_steps))
        if pilot is not None:
            noise = pilot.noise_ratio(sampler) if pilot.knows_noise(sampler.control_variate is True) else None
            bias = pilot.foreseen_bias(sampler)
            discretisation = pilot.discretisation(sampler)
            stability = pilot.stability_share(sampler) if sampler.averaged else None
    growth, growth_z = (None, None) if distance is None else _growth(distance.double().square())
    of_r, of_k = reliability(few)
    numbers: dict[str, Any] = {
        "functional_variance": None if criteria is None else criteria.functional_variance,
        "singular_fluctuation": None if criteria is None else criteria.singular_fluctuation,
        "waic": None if criteria is None else criteria.waic,
        "wbic": None if criteria is None else criteria.wbic,
        "noise_floor": noise_floor,
        "rhat": _quantile(rhats, 0.5),
        "ess": _quantile(sizes, 0.5),
        "sample_rhat": _quantile(sample_rhats, 0.5),
        "sample_ess": _quantile(sample_sizes, 0.5),
        "sample_rhat_high": _quantile(sample_rhats, 0.95),
        "sample_ess_low": _quantile(sample_sizes, 0.05),
        "llc_rhat": _quantile(llc_rhats, 0.5),
        "llc_ess": _quantile(llc_sizes, 0.5),
        "llc": llc,
        "llc_se": llc_se,
        "mean_loss": mean_over_draws(mean_loss),
        "num_chains": len(mean_loss),
        "foreseen_bias": bias,
        "gradient_noise_ratio": noise,
        "discretisation": discretisation,
        "stability": stability,
        "burnin_completeness": completeness,
        "drift": drift,
        "drift_z": drift_z,
        "reliability": of_r,
        "reliability_kernel": of_k,
        "size_error": size_error(watched),
        "unevenness": None if pilot is None else pilot.unevenness,
        "growth": growth,
        "growth_z": growth_z,
        "rise": _mean(excess),
        "uninformed": uninformed,
        "acceptance": _mean(acceptance),
        "distance": _mean(distance),
        "effective_dimension": None if pilot is None else pilot.effective_dimension,
        "dead_share": dead_share,
    }
    verdict, advice = judge(numbers, rejects=rejects)
    return Diagnostics(**numbers, verdict=verdict, advice=advice)


def _rhat_ess(traces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R-hat and bulk ESS of each of the last axis of [C, T, w], by ArviZ; traces that are constant or not finite, or
    too short for either, are left out."""
    array_stats = require("arviz_stats.base", None, "a diagnosis", package="arviz-stats").array_stats  # slow to import

    if traces.shape[1] < 4:
        return np.empty(0), np.empty(0)
    usable = np.isfinite(traces).all(axis=(0, 1)) & (np.ptp(traces, axis=(0, 1)) > 0)
    if not usable.any():
        return np.empty(0), np.empty(0)
    rhat = array_stats.rhat(traces[..., usable], chain_axis=0, draw_axis=1)
    ess = array_stats.ess(traces[..., usable], chain_axis=0, draw_axis=1)
    return np.atleast_1d(rhat), np.atleast_1d(ess)


def _drift(mean_loss: np.ndarray) -> tuple[float | None, float | None]:
    """How far the mean of [C, T] moves from the first third to the last: in deviations, and in standard errors."""
    third = mean_loss.shape[1] // 3
    deviation = float(mean_loss.std())
    if third < 4 or not deviation > 0:
        return None, None
    first, last = mean_loss[:, :third], mean_loss[:, -third:]
    move = float(last.mean() - first.mean())
    error = math.hypot(mean_error(first), mean_error(last))
    return move / deviation, move / error if error > 0 else None


def _growth(squares: Tensor) -> tuple[float | None, float | None]:
    """How much [C, T] grows from the first third of the draws to the last: relative, and in standard errors.

    The error is the larger of the draws' own and, where there are several chains, of their spread, which sees slow
    components that no chain's own autocorrelation shows.
    """
    third = squares.shape[1] // 3
    if third < 4 or not torch.isfinite(squares).all() or not float(squares.mean()) > 0:
        return None, None
    first, last = squares[:, :third], squares[:, -third:]
    moves = last.mean(dim=1) - first.mean(dim=1)  # [C]
    own = math.hypot(mean_error(first.numpy()), mean_error(last.numpy()))
    between = float(moves.std()) / len(moves) ** 0.5 if len(moves) > 1 else 0.0
    error = max(own, between)
    move = float(moves.mean())
    return move / float(first.mean()), move / error if error > 0 else None


def _quantile(values: np.ndarray, q: float) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite, q)) if finite.size else None


def _mean(values: Tensor | None) -> float | None:
    """The mean, or None where it is unknown at any draw."""
    if values is None or not torch.isfinite(values).all():
        return None
    return float(values.double().mean())
