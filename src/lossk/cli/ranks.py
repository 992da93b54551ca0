"""`lossk run` under torchrun: rank 0 makes the files and prints, the others work."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import lossk
from lossk.cli.config import RunConfig
from lossk.kernel.kernel import LossKernel
from lossk.ranks.distributed import Ranks
from lossk.recipes import RecipeTask
from lossk.samplers.samplers import read_sampler
from lossk.task.passes import Passes


def share_threads(ranks: Ranks | None, asked: int | None) -> None:
    """Set torch's threads: as asked, else this machine's cores dealt to its ranks (torchrun leaves each one)."""
    if asked is not None:
        torch.set_num_threads(asked)
    elif ranks is not None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // ranks.local_size))


def follow(ranks: Ranks, config: RunConfig, *, resume: bool) -> LossKernel:
    """What every rank but the first does: its task, once the first has its own, and its share of the kernel."""
    ranks.decide(lambda: None)
    task = config.make_task()
    place = Path(ranks.decide(lambda: None))
    kernel = build_at(place, task, config, resume)
    ranks.decide(lambda: None)  # it is where it belongs
    return kernel if place == Path(config.out) else lossk.open(config.out)


def build_at(path: str | Path, task: RecipeTask, config: RunConfig, resume: bool) -> LossKernel:
    """The kernel of a config's task, made in a store at `path`."""
    return lossk.build_kernel(
        task.model,
        task.samples,
        train=task.train,
        loss=task.loss,
        transform=task.transform,
        sampler=read_sampler(config.sampler),
        passes=None if config.passes is None else Passes(**config.passes),
        out=path,
        resume=resume,
        **config.build,
    )
