"""`lossk run` under torchrun: rank 0 makes the files and prints, the others work."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import lossk
from lossk.cli.config import RunConfig
from lossk.kernel.kernel import LossKernel
from lossk.ranks.world import World
from lossk.recipes import RecipeTask
from lossk.samplers.samplers import read_sampler
from lossk.task.passes import Passes


def share_threads(world: World, asked: int | None) -> None:
    """Set torch's threads: as asked, else this machine's cores dealt to its ranks (torchrun leaves each one)."""
    if asked is not None:
        torch.set_num_threads(asked)
    elif world.size > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // world.local_size))


def follow(world: World, config: RunConfig, *, resume: bool) -> LossKernel:
    """What every rank but the first does: its task, once the first has its own, and its share of the kernel."""
    world.first_makes(lambda: None)
    task = config.make_task()
    place = Path(world.decide(lambda: None))
    kernel = build_at(place, task, config, resume)
    world.decide(lambda: None)  # it is where it belongs
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
