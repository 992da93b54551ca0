"""The trial chain: a short chain at the chosen settings, whose losses show what no measurement at w* can.

It checks that the training loss rises no further than its bound, that the losses have reached their plateau after the
burn-in, what noise a control variate leaves away from w*, and how long the samples' losses remember; the draws are
spaced by that. Whatever fails is chosen again and tried again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossk.chain import Surroundings
from lossk.data import Samples
from lossk.diagnostics import watched_samples
from lossk.errors import DivergedError
from lossk.force import FULL_GRADIENT, full_gradient
from lossk.losses import IGNORED, split_batch
from lossk.pilot import PILOT_CHAIN, Pilot, control_variance
from lossk.sgld import SGLD, SGLDChain
from lossk.task import fitting_batch
from lossk.tune import LAG1_TARGET, NOISE_BUDGET, STEPS_CAP, Limits, choose_settings

RISE_SHARE = 0.05  # of an uninformed predictor's loss
RISE_NATS = 0.1  # where no such predictor is known: a loss of the caller's own
TRIES = 12
MEMORIES = 10  # length of a trial after its burn-in, in decorrelation times of flat directions
LONGEST = 2000  # steps of a trial
RECORDS = 200
PLATEAU_Z = 4.0
SPACINGS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 65, 80, 100, 130, 160, 200, 250, 300, 400, STEPS_CAP)


@dataclass(frozen=True)
class Trial:
    """What a trial chain showed."""

    rise: float  # of the training loss over its value at w*, after burn-in, nats
    memory: float  # integrated autocorrelation time of the median sample's loss, in steps
    drift: float  # z of the mean loss between the two halves after burn-in
    drifting: float  # share of samples whose own loss drifts by |z| > 3 between them
    steps: int
    whole: bool  # long enough to see flat directions forget

    @property
    def settled(self) -> bool:
        return abs(self.drift) <= PLATEAU_Z and self.drifting <= 0.1


def uninformed_loss(name: str, train: Samples) -> tuple[float, str] | None:
    """What a constant predictor that has learnt nothing loses, in the loss's own unit, and what that is.

    The entropy of the training labels for cross entropy, the variance of the targets for squared error; None for a loss
    of the caller's own, or for targets that do not vary.
    """
    if name in ("cross_entropy", "token_cross_entropy"):
        _, targets = split_batch(train.tree)
        counts = torch.unique(targets[targets != IGNORED], return_counts=True)[1].double()
        share = counts / counts.sum()
        return max(float(-(share * share.log()).sum()), 0.1), "the training labels' entropy"
    if name == "mse":
        _, targets = split_batch(train.tree)
        spread = float(targets.double().var(dim=0, correction=0).mean())
        return (spread, "the targets' variance") if spread > 0 else None
    return None


def rise_bound(name: str, train: Samples) -> tuple[float, str]:
    """How far draws may raise the mean training loss, in its own unit, and why that far.

    5 % of what an uninformed predictor loses; 0.1 nats where that is not known.
    """
    known = uninformed_loss(name, train)
    if known is None:
        return RISE_NATS, "fixed, for a loss of your own"
    return RISE_SHARE * known[0], f"5 % of {known[1]}"


def settle(sampler: SGLD, pilot: Pilot, around: Surroundings, *, num_probe: int) -> tuple[SGLD, Pilot, list[str]]:
    """Choose every "auto" by the pilot, then by trial chains until one passes. Returns what is resolved, and why."""
    train, task = around.train, around.task
    bound, why_bound = rise_bound(task.loss.name, train)
    limits, trial = Limits(), None
    for _ in range(TRIES):
        chosen, reasons = choose_settings(sampler, pilot, task, num_train=len(train), limits=limits)
        if "auto" not in (sampler.lr, sampler.localization, sampler.num_burnin_steps, sampler.num_steps_bw_draws):
            return chosen, pilot, reasons
        if chosen.control_variate and FULL_GRADIENT not in around.fitted:
            around = dataclasses.replace(around, fitted={FULL_GRADIENT: full_gradient(task, train)})
        try:
            trial, noise = run_trial(chosen, around)
        except DivergedError:
            trial = None
            if sampler.lr == "auto":
                limits = dataclasses.replace(limits, lr=float(chosen.lr) / 4)
            elif sampler.localization == "auto":
                limits = dataclasses.replace(limits, localization=4 * float(chosen.localization))
            else:
                return chosen, pilot, reasons  # nothing left to choose: the run itself will say it diverged
            continue
        finally:
            task.reset()
        if noise is not None:
            pilot = dataclasses.replace(pilot, control_variance=noise, control_localization=float(chosen.localization))
        if sampler.localization == "auto" and trial.rise > bound:
            factor = min(max(1.2 * trial.rise / bound, 1.5), 16.0)
            limits = dataclasses.replace(limits, localization=factor * float(chosen.localization))
        elif sampler.lr == "auto" and chosen.control_variate and pilot.noise_ratio(chosen) > 1.05 * NOISE_BUDGET:
            continue
        elif sampler.num_burnin_steps == "auto" and trial.whole and not trial.settled and limits.burnin < 8:
            limits = dataclasses.replace(limits, burnin=2 * limits.burnin)
        else:
            break
    if trial is None:
        return chosen, pilot, reasons
    chosen, reasons = _space(sampler, chosen, reasons, trial, around, num_probe, f"bound {bound:.3g}, {why_bound}")
    return chosen, pilot, reasons


def _space(
    sampler: SGLD, chosen: SGLD, reasons: list[str], trial: Trial, around: Surroundings, num_probe: int, bound: str
) -> tuple[SGLD, list[str]]:
    """The spacing of the draws, and what else the trial has to say."""
    # A trial cut short has not seen the slowest memories: the spacing that flat directions need then stays.
    if sampler.num_steps_bw_draws == "auto" and trial.whole:
        n = len(around.train)
        m = n if chosen.batch_size is None else min(chosen.batch_size, n)
        step_cost = 3 * m * (2 if chosen.control_variate else 1)
        spacing = worth_spacing(trial.memory, step_cost, num_probe)
        chosen = dataclasses.replace(chosen, num_steps_bw_draws=spacing)
        reasons = [reason for reason in reasons if not reason.startswith("num_steps_bw_draws")]
        reasons.append(
            f"num_steps_bw_draws = {spacing}: the median loss remembers {trial.memory:.3g} steps; a probe pass costs "
            f"{num_probe / step_cost:.2g} steps"
        )
    plateau = "has reached its plateau" if trial.settled else "has NOT reached a plateau"
    if not trial.whole:
        plateau += " (too short a trial to see flat directions forget)"
    reasons.append(f"trial = {trial.steps} steps: training loss rises by {trial.rise:.2g} ({bound}) and {plateau}")
    return chosen, reasons


def worth_spacing(memory: float, step_cost: float, probe_cost: float) -> int:
    """Steps between draws: the least cost per effective draw, (s steps + probe) (1 + rho^s) / (1 - rho^s).

    rho per step is that of an AR(1) trace with the integrated autocorrelation time `memory`; draws closer than
    rho^s = 1/e are never taken, for draws are also asked to count.
    """
    rho = max((memory - 1.0) / (memory + 1.0), 1e-9)

    def cost(steps: int) -> float:
        return (steps * step_cost + probe_cost) * (1 + rho**steps) / (1 - rho**steps)

    allowed = [steps for steps in SPACINGS if rho**steps <= LAG1_TARGET] or [STEPS_CAP]
    return min(allowed, key=cost)


def run_trial(sampler: SGLD, around: Surroundings) -> tuple[Trial, float | None]:
    """One chain from w* at resolved settings; the noise a control variate leaves at its end, if it has one.

    What the settings need of `fit` must be in `around.fitted`.

    Raises:
        DivergedError: it exploded.
    """
    task, train = around.task, around.train
    chain = SGLDChain(around, sampler, PILOT_CHAIN)
    pull = float(sampler.lr) * sampler.gain * float(sampler.localization)
    burnin = min(int(sampler.num_burnin_steps), LONGEST // 2)
    wanted = MEMORIES * math.ceil(2 / pull) if pull > 0 else math.inf
    after = int(min(wanted, LONGEST - burnin))
    every = max(1, -(-after // RECORDS))
    few = [train[part] for part in watched_samples(len(train)).split(fitting_batch(256, task.loss.positions))]
    task.reset()
    chain.begin()
    for _ in range(burnin):
        chain.advance()
    excess, rows = [], []
    for step in range(after):
        excess.append(chain.advance())
        if (step + 1) % every == 0:
            rows.append(torch.cat([task.losses(part) for part in few]).double())
    traces = torch.stack(rows)
    if not torch.isfinite(traces).all():
        raise chain.diverged("a training sample has a loss that is not finite")
    noise = None
    if chain.force.control is not None:
        noise = control_variance(task, train, seed=around.seed)
    task.reset()
    memory = every * autocorrelation_time(traces)
    drift, drifting = _drift(traces)
    return Trial(sum(excess) / len(excess), memory, drift, drifting, burnin + after, after == wanted), noise


def autocorrelation_time(traces: Tensor) -> float:
    """1 + 2 sum rho_k of the median sample: [T, w] -> in records, by Geyer's initial positive pairs (1992).

    rho_k is the median over samples of the autocorrelation at lag k; samples that do not vary are left out.
    """
    centred = traces - traces.mean(dim=0)
    variance = centred.square().mean(dim=0)
    centred = centred[:, variance > 0] / variance[variance > 0].sqrt()
    t = len(centred)
    if centred.shape[1] == 0 or t < 4:
        return 1.0
    rho = [float((centred[: t - k] * centred[k:]).sum(dim=0).div(t - k).median()) for k in range(t // 2)]
    total = _positive_pairs(rho)
    # Centring on the trace's own mean lowers every rho_k by about total / T (Marriott and Pope 1954): put back once.
    return max(_positive_pairs([r + (1 - r) * min(total / t, 0.25) for r in rho]), 1.0)


def _positive_pairs(rho: Sequence[float]) -> float:
    total = -1.0
    for even, odd in zip(rho[::2], rho[1::2], strict=False):
        if even + odd <= 0.05:  # what the correction above adds to no correlation at all
            break
        total += 2 * (even + odd)
    return total


def _drift(traces: Tensor) -> tuple[float, float]:
    """z of the mean loss between the halves, and the share of samples that drift by |z| > 3; [T, w]."""
    half = len(traces) // 2
    if half < 4:
        return 0.0, 0.0

    def z(x: Tensor) -> Tensor:
        first, second = x[:half], x[half : 2 * half]
        # A trend is what is looked for: it must not pass for noise with a long memory.
        noise = torch.cat([_without_trend(first), _without_trend(second)])
        time = min(autocorrelation_time(noise), half)
        error = (2 * noise.square().mean(dim=0) * time / half).sqrt().clamp(min=1e-300)
        return (second.mean(dim=0) - first.mean(dim=0)) / error

    mean = traces.mean(dim=1, keepdim=True)
    samples = traces[:, traces.var(dim=0) > 0]
    share = float((z(samples).abs() > 3).double().mean()) if samples.shape[1] else 0.0
    return float(z(mean)[0]) if float(mean.var()) > 0 else 0.0, share


def _without_trend(x: Tensor) -> Tensor:
    """[T, w] less each column's least-squares line."""
    time = torch.linspace(-1, 1, len(x), dtype=x.dtype)
    centred = x - x.mean(dim=0)
    return centred - time.outer(time @ centred / time.square().sum())
