"""The whole job in plain torch: an eager SGLD loop as one would write it, and torch.cov at the end."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bench.floor import Passes
from bench.jobs import Job, losses, mean_loss
from bench.turns import CLOCKS, Turn


def traces(job: Job, forward: Passes, backward: Passes) -> Tensor:
    """The losses of every draw: [draws of all chains, N] float32."""
    (x, y), (train_x, train_y) = job.probe, job.train
    x, train_x, out = forward.lay_out(x), backward.lay_out(train_x), torch.empty(job.draws, job.num_rows)
    for chain in range(job.num_chains):
        torch.manual_seed(chain)
        model = backward.model(job.model)
        anchor = [parameter.detach().clone() for parameter in model.parameters()]
        for draw in range(job.num_draws):
            torch.set_num_threads(backward.threads)
            for _ in range(job.num_steps_bw_draws):
                index = torch.randint(0, len(train_y), (job.batch_size,))
                model.zero_grad()
                mean_loss(model, train_x[index], train_y[index]).backward()
                step(list(model.parameters()), anchor, job)
            torch.set_num_threads(forward.threads)
            with torch.no_grad():
                parts = zip(x.split(forward.batch), y.split(forward.batch), strict=True)
                out[chain * job.num_draws + draw] = torch.cat([losses(model, *part) for part in parts])
    return out


@torch.no_grad()
def step(parameters: list[torch.nn.Parameter], anchor: list[Tensor], job: Job) -> None:
    """w <- w - (lr/2) [ n_beta g + localization (w - w*) ] + sqrt(lr) xi, in place."""
    for w, start in zip(parameters, anchor, strict=True):
        assert w.grad is not None
        drift = w.grad.mul_(job.n_beta).add_(w - start, alpha=job.localization)
        w.add_(drift, alpha=-job.lr / 2).add_(torch.randn_like(w), alpha=math.sqrt(job.lr))


def contender(job: Job, forward: Passes, backward: Passes) -> Callable[[], Turn]:
    """Draws and kernel, as one turn."""

    def turn() -> Turn:
        start = CLOCKS[job.clock]()
        found = traces(job, forward, backward)
        kernel = torch.cov(found.T)
        seconds = CLOCKS[job.clock]() - start
        return {
            "seconds": seconds,
            "mean_loss": float(found.mean()),
            "mean_variance": float(kernel.diagonal().mean()),
        }

    return turn


def as_written(job: Job, threads: int) -> Passes:
    """What nobody has thought about: torch's own memory format, a thousand samples at a time."""
    return Passes(channels_last=False, batch=job.eval_batch, threads=threads)
