"""What a run's diagnostics are made of: its traces, its moments, its pilot."""

from __future__ import annotations

import torch

from lossk.accumulate.panel import ChainTotals
from lossk.diagnostics.diagnostics import Diagnostics, diagnose
from lossk.diagnostics.information import Criteria, lost_variance, reach_of_variance
from lossk.forms.blocks import Blocks, Moments, TileBlocks
from lossk.forms.names import Names
from lossk.kernel.kernel import LossKernel
from lossk.kernel.neighbors import median_noise_floor
from lossk.pilot.trial import uninformed_loss
from lossk.run.choose import burnin_spread, momentum_noise_ratio
from lossk.run.run import Run
from lossk.samplers.hmc import HMC
from lossk.samplers.sgld import SGLD


def diagnosed_kernel(run: Run, blocks: Blocks, moments: Moments, totals: ChainTotals, names: Names) -> LossKernel:
    """The kernel of a run whose every draw has been noted; its meta is yet to be written."""
    with run.timings.measure("diagnostics"):
        diagnostics = diagnose_run(run, moments, totals)
    watched = run.watch.watched if isinstance(blocks, TileBlocks) else None
    return LossKernel(
        blocks,
        moments,
        diagnostics=diagnostics,
        tokens=run.probe.tokens,
        sets=run.probe.sets,
        watched=watched,
        names=names,
    )


def diagnose_run(run: Run, moments: Moments, totals: ChainTotals) -> Diagnostics:
    """Of a run whose every draw has been noted."""
    criteria, sgld = None, run.sampler if isinstance(run.sampler, SGLD) else None
    # A chain that evaluates no training loss does not sample p(w): no learning coefficient follows from it.
    n_beta = getattr(run.sampler, "n_beta", None) if torch.isfinite(run.watch.excess).all() else None
    if len(run.probe.parts) == 1 and run.probe.holds(run.train) and n_beta is not None:
        criteria = Criteria(
            totals.variance,
            totals.log_likelihood,
            run.watch.mean_loss.mean(dim=1),
            run.num_train,
            float(n_beta),
            moments.num_draws,
            lost_variance(moments.chain_mean, moments.variance, moments.num_draws),
            reach_of_variance(run.watch.losses),
        )
    learnt_nothing, pilot = uninformed_loss(run.task.loss.name, run.train), run.informed_pilot
    return diagnose(
        mean_loss=run.watch.mean_loss,
        watched=run.watch.losses,
        dead_share=float((moments.variance == 0).double().mean()),
        noise_floor=median_noise_floor(moments, run.watch.watched),
        excess=run.watch.excess,
        n_beta=n_beta,
        criteria=criteria,
        pilot=pilot,
        sampler=sgld,
        noise_ratio=momentum_noise_ratio(run.sampler, pilot),
        acceptance=run.watch.acceptance,
        distance=run.watch.distance,
        completeness=burnin_spread(run.sampler, pilot),
        rejects=isinstance(run.sampler, HMC),
        uninformed=None if learnt_nothing is None else learnt_nothing[0],
    )
