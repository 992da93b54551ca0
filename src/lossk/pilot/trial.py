"""Trial chains: short chains at the chosen settings, whose losses show what no measurement at w* can.

They check that the training loss rises no further than its bound, that the losses have reached their plateau after the
burn-in, what noise a control variate leaves away from w*, and how long the samples' losses remember; the draws are
spaced by that. Whatever fails is chosen again and tried again, within a stated number of steps.
"""

from __future__ import annotations

import dataclasses
import math
import time
from functools import partial

import torch
from torch import Tensor

from lossk.curvature.curvature import PILOT_CHAIN, STREAM
from lossk.data.data import Samples
from lossk.errors import DivergedError
from lossk.forms.watched import watched_samples
from lossk.ops.philox import normals
from lossk.pilot.automatic import STEPS_CAP, Limits, choose_settings, to_half_octave
from lossk.pilot.effort import Effort
from lossk.pilot.pilot import Pilot, batch_factor
from lossk.pilot.step_choice import GRADIENT_PASSES, step_budget, way_of
from lossk.pilot.trial_chain import LONGEST, WINDOW, Autocorrelation, Trial, run_trial, steps_after_burnin
from lossk.samplers.chain import Surroundings
from lossk.samplers.force import FULL_GRADIENT, full_gradient
from lossk.samplers.sgld import SGLD
from lossk.settings import minibatch_of
from lossk.task.losses import IGNORED, split_batch
from lossk.task.task import fitting_batch
from lossk.timings import Progress, duration

RISE_SHARE = 0.05  # of an uninformed predictor's loss
RISE_NATS = 0.1  # where no such predictor is known: a loss of the caller's own
TRIES = 12
ANOTHER, MOST_QUARTERS = 220.0, 40  # n_beta L_n may rise by half of it a weight; steps of a factor 4 until it does
FEWEST_STEPS = 2 * WINDOW  # of a trial
MOST_STEPS = 4000  # of all tries; whatever the number of draws, which must not change the law
NEAR = 2.0  # times the localization of a trial: so far its noise and autocorrelation can be foreseen
UNSTABLE = 1.5  # times the budget of the step: so long a step may itself have raised the loss
CLOSEST = 0.5  # autocorrelation of a loss from one draw to the next
ALIKE = 1.05  # times the least cost
SLOW = 5.0  # seconds that are announced
SPACINGS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 65, 80, 100, 130, 160, 200, 250, 300, 400, STEPS_CAP)


def uninformed_loss(name: str, train: Samples) -> tuple[float, str] | None:
    """What a constant predictor that has learnt nothing loses, in the loss's own unit, and what that is.

    The entropy of the training labels for cross entropy, the variance of the targets for squared error; None for a loss
    of the caller's own, or for targets that do not vary.
    """
    if name in ("cross_entropy", "token_cross_entropy"):
        counts = _label_counts(train)
        share = counts / counts.sum()
        return max(float(-(share * share.log()).sum()), 0.1), "the training labels' entropy"
    if name == "mse" and train.tree is not None:
        _, targets = split_batch(train.tree)
        spread = float(targets.double().var(dim=0, correction=0).mean())
        return (spread, "the targets' variance") if spread > 0 else None
    return None


def _label_counts(train: Samples) -> Tensor:
    """[C] float64: how often each label comes, in their order."""
    total: dict[int, int] = {}
    for _, tree in train.pieces():
        _, targets = split_batch(tree)
        labels, counts = torch.unique(targets[targets != IGNORED], return_counts=True)
        for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
            total[label] = total.get(label, 0) + count
    return torch.tensor([total[label] for label in sorted(total)], dtype=torch.float64, device="cpu")


def rise_bound(name: str, train: Samples) -> tuple[float, str]:
    """How far draws may raise the mean training loss, in its own unit, and why that far.

    5 % of what an uninformed predictor loses; 0.1 nats where that is not known.
    """
    known = uninformed_loss(name, train)
    if known is None:
        return RISE_NATS, "fixed, for a loss of your own"
    return RISE_SHARE * known[0], f"5 % of {known[1]}"


def settle(
    sampler: SGLD,
    pilot: Pilot,
    around: Surroundings,
    *,
    num_probe: int,
    effort: Effort | None = None,
    bar: Progress | None = None,
) -> tuple[SGLD, Pilot, list[str]]:
    """Choose every "auto" by the pilot, then by trial chains until one passes. Returns what is resolved, and why.

    The full gradient at w*, where trial chains need it, is kept in `around.fitted`. Where `effort` pays for no further
    trial, the choice is that of what is known by then.
    """
    train, task, bar, effort = around.train, around.task, bar or Progress(False), effort or Effort()
    law = SGLD(n_beta=sampler.n_beta, params=sampler.params, metric=sampler.metric)
    if sampler.localization == "auto" and sampler != law:  # nothing else that was asked for moves the law
        found, pilot, whys = settle(law, pilot, around, num_probe=num_probe, effort=effort, bar=bar)
        sampler = dataclasses.replace(sampler, localization=found.localization)
        chosen, pilot, reasons = settle(sampler, pilot, around, num_probe=num_probe, effort=effort, bar=bar)
        return chosen, pilot, [*(why for why in whys if why.startswith("localization")), *reasons]
    bound, why_bound = rise_bound(task.loss.name, train)
    limits, trial, left = _begin(sampler, pilot, around), None, MOST_STEPS
    for attempt in range(TRIES):
        chosen, reasons = choose_settings(sampler, pilot, task, num_train=len(train), limits=limits)
        if "auto" not in (sampler.lr, sampler.localization, sampler.num_burnin_steps, sampler.num_steps_bw_draws):
            return chosen, pilot, reasons
        size, step = effort.trial(), step_passes(chosen, len(train))
        most = effort.steps(step, left)
        if size is None or most < FEWEST_STEPS:
            effort.rough, trial = True, None
            break
        if chosen.control_variate and FULL_GRADIENT not in around.fitted:
            around.fitted[FULL_GRADIENT] = full_gradient(task, train)
        if attempt == 0:
            _announce(chosen, around, bar, most)
        try:
            trial = run_trial(
                chosen,
                around,
                bound=bound if sampler.localization == "auto" else math.inf,
                most=most,
                size=size,
                of_use=partial(_near, sampler, chosen, pilot, limits, around) if sampler.lr == "auto" else None,
                bar=bar,
            )
        except DivergedError:
            trial = None
            if sampler.lr != "auto":
                break  # nothing left to choose: the run itself will say it diverged
            limits = _tighter(chosen, limits)
            continue
        finally:
            task.reset()
        left -= trial.steps
        effort.spend(trial.steps * step)
        effort.rough |= not trial.whole and not trial.cut and most < left + trial.steps
        pilot = _informed(pilot, trial, chosen)
        if sampler.localization == "auto" and trial.rise > bound:
            limits = _closer(sampler, chosen, pilot, limits, trial.rise / bound)
            continue
        limits = _no_wider(limits, chosen)
        if trial.cut:
            continue
        if sampler.lr == "auto":
            refined = _refine(sampler, chosen, pilot, limits, around)
            if refined is None:
                continue
            if trial.autocorrelation is not None:
                slowed = trial.autocorrelation.slowed(_pull(chosen) / _pull(refined[0]))
                trial = dataclasses.replace(trial, autocorrelation=slowed)
            chosen, reasons = refined
        if sampler.num_burnin_steps == "auto" and trial.whole and not trial.settled and limits.burnin < 8:
            limits = dataclasses.replace(limits, burnin=2 * limits.burnin)
            continue
        break
    bar.stop()
    minibatch = minibatch_of(chosen.batch_size, len(train))
    pilot = dataclasses.replace(pilot, batch_factor=batch_factor(len(train), minibatch))
    if trial is None:
        return chosen, pilot, reasons
    chosen, reasons = _space(sampler, chosen, reasons, trial, around, num_probe, f"bound {bound:.3g}, {why_bound}")
    return chosen, pilot, reasons


def _begin(sampler: SGLD, pilot: Pilot, around: Surroundings) -> Limits:
    """Where the curvature at w* says nothing of the loss a little away, at least a localization that bounds its rise.

    Weights drawn from the pull alone, w* + xi / sqrt(gamma), raise n_beta L_n of a quadratic of that curvature by at
    most 22 P / 2; ten times as much is another function.
    """
    if sampler.localization != "auto":
        return Limits()
    task, train = around.task, around.train
    few = watched_samples(len(train)).split(fitting_batch(256, task.loss.positions))
    before = around.anchor_losses[torch.cat(few)].mean()
    xi = normals(around.seed, PILOT_CHAIN, 0, task.num_weights, stream=STREAM).to(task.device)
    localization = choose_settings(sampler, pilot, task, num_train=len(train))[0].localization
    floor = float(localization)
    try:
        for _ in range(MOST_QUARTERS):
            task.reset()
            task.flat.add_(xi, alpha=floor**-0.5)
            rise = torch.cat([task.losses(train[part]) for part in few]).double().mean() - before
            if pilot.n_beta * float(rise) <= ANOTHER * task.num_weights / 2:
                break
            floor *= 4
    finally:
        task.reset()
    if floor == localization:
        return Limits()
    return Limits(localization=to_half_octave(floor), why_localization="nearer than that the loss is another function")


def _informed(pilot: Pilot, trial: Trial, chosen: SGLD) -> Pilot:
    """What the trial found at its draws, where the next choice is made."""
    localization = float(chosen.localization)
    pilot = dataclasses.replace(
        pilot,
        drawn_curvature=trial.curvature,
        drawn_steepest=trial.steepest,
        drawn_localization=localization,
        drawn_times=trial.measured,
    )
    pilot = dataclasses.replace(pilot, drawn_stably=not _unstable(chosen, pilot))
    if trial.variance is not None:
        pilot = dataclasses.replace(pilot, drawn_variance=trial.variance)
    if trial.noise is not None:
        pilot = dataclasses.replace(pilot, control_variance=trial.noise, control_localization=localization)
    return pilot


def _refine(
    sampler: SGLD, chosen: SGLD, pilot: Pilot, limits: Limits, around: Surroundings
) -> tuple[SGLD, list[str]] | None:
    """The settings by what the trial of `chosen` has shown; None where they are too far from those it tried."""
    limits = _no_wider(limits, chosen)
    refined, reasons = choose_settings(sampler, pilot, around.task, num_train=len(around.train), limits=limits)
    near = not _unstable(chosen, pilot) and _foreseeable(refined, chosen)
    return (refined, reasons) if near else None


def _near(sampler: SGLD, chosen: SGLD, pilot: Pilot, limits: Limits, around: Surroundings, trial: Trial) -> bool:
    """Whether a trial's end is of use: the settings by what it shows are near, and would not be tried anew sooner."""
    refined = _refine(sampler, chosen, _informed(pilot, trial, chosen), limits, around)
    if refined is None:
        return False
    anew = int(refined[0].num_burnin_steps) + steps_after_burnin(refined[0])
    return steps_after_burnin(chosen) <= anew


def _closer(sampler: SGLD, chosen: SGLD, pilot: Pilot, limits: Limits, excess: float) -> Limits:
    """After too far a rise, `excess` times its bound: a stronger localization, unless the step may be to blame."""
    here = float(chosen.localization)
    if sampler.lr == "auto" and _unstable(chosen, pilot):
        return dataclasses.replace(limits, most=NEAR * here)  # a shorter step first, for what was found here
    there = to_half_octave(min(max(1.2 * excess, 1.5), 16.0) * here, up=True)
    return dataclasses.replace(limits, localization=there, most=there)


def _unstable(chosen: SGLD, pilot: Pilot) -> bool:
    """Whether a trial's draws are so steep that its own step may have driven them there."""
    return pilot.typical_share(chosen) > UNSTABLE * step_budget(chosen)


def _no_wider(limits: Limits, chosen: SGLD) -> Limits:
    """What has passed a trial is not widened afterwards."""
    passed = float(chosen.localization)
    if passed > limits.localization:
        limits = dataclasses.replace(limits, localization=passed, why_localization="a trial passed at it")
    return dataclasses.replace(limits, most=math.inf)


def _foreseeable(foreseen: SGLD, chosen: SGLD) -> bool:
    """Whether the settings chosen by what a trial's draws showed are near enough to those it tried."""
    if foreseen.control_variate and not chosen.control_variate:
        return False  # what noise it leaves is not known
    return float(foreseen.localization) <= NEAR * float(chosen.localization)


def _tighter(chosen: SGLD, limits: Limits) -> Limits:
    """After an explosion: a shorter step."""
    return dataclasses.replace(limits, lr=float(chosen.lr) / 4)


def _pull(sampler: SGLD) -> float:
    """Per step, on directions that only the localization pulls back."""
    return float(sampler.lr) * sampler.gain * float(sampler.localization)


def step_passes(sampler: SGLD, num_train: int) -> float:
    """Forward passes of one sample that a step costs."""
    return way_of(sampler, num_train).passes(num_train)


def _announce(chosen: SGLD, around: Surroundings, bar: Progress, most: int) -> None:
    """Say how long a trial will take, by the time of one gradient, and show its progress."""
    if not bar.enabled:
        return
    way = way_of(chosen, len(around.train))
    few = torch.arange(way.batch, device="cpu")
    start = time.perf_counter()
    around.task.gradient(around.train, few)
    gradient = time.perf_counter() - start
    expected = int(min(int(chosen.num_burnin_steps) + steps_after_burnin(chosen), LONGEST, most))
    seconds = expected * gradient * way.passes(len(around.train)) / (GRADIENT_PASSES * way.batch)
    if seconds > SLOW:
        bar.say(f"pilot: a trial chain of about {expected:,} steps, about {duration(seconds)}")
        bar.start(expected, what="trial chain")


def _space(
    sampler: SGLD, chosen: SGLD, reasons: list[str], trial: Trial, around: Surroundings, num_probe: int, bound: str
) -> tuple[SGLD, list[str]]:
    """The spacing of the draws, and what else the trial has to say."""
    # A trial cut short has not seen the slowest memories: the spacing that flat directions need then stays.
    if sampler.num_steps_bw_draws == "auto" and trial.whole and trial.autocorrelation is not None:
        step_cost, rho = step_passes(chosen, len(around.train)), trial.autocorrelation
        spacing = worth_spacing(rho, step_cost, num_probe)
        chosen = dataclasses.replace(chosen, num_steps_bw_draws=spacing)
        reasons = [reason for reason in reasons if not reason.startswith("num_steps_bw_draws")]
        reasons.append(
            f"num_steps_bw_draws = {spacing}: the median loss remembers {rho.steps:.3g} steps, "
            f"{rho.at(spacing):.2f} of it after {spacing}; a probe pass costs {num_probe / step_cost:.2g} steps"
        )
    plateau = "has reached its plateau" if trial.settled else "has NOT reached a plateau"
    if not trial.whole:
        plateau += " (too short a trial to see flat directions forget)"
    reasons.append(f"trial = {trial.steps} steps: training loss rises by {trial.rise:.2g} ({bound}) and {plateau}")
    return chosen, reasons


def worth_spacing(rho: Autocorrelation, step_cost: float, probe_cost: float) -> int:
    """Steps between draws: the least cost per effective draw of a kernel entry.

    That is (s steps + probe) (1 + 2 sum_k rho(k s)^2): an entry is a mean of products of two losses, which forget as
    the square of rho does. Draws closer than rho(s) = 1/2 are never taken, for draws are also asked to count. Of
    spacings whose costs are within 5 %, which no trial can tell apart, the widest: fewer draws to hold and to add.
    """
    allowed = [steps for steps in SPACINGS if rho.at(steps) <= CLOSEST] or [STEPS_CAP]
    costs = {steps: (steps * step_cost + probe_cost) * rho.squares(steps) for steps in allowed}
    return max(steps for steps, cost in costs.items() if cost <= ALIKE * min(costs.values()))
