"""A job: one network, its data and one fixed setting of SGLD, as every contender is given it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossk
from bench.options import JOB_COUNTS, Options
from bench.peers_devinterp import describe
from lossk.recipes import fashion, train_classifier

EVAL_BATCH = 1000  # samples per probe pass of whoever has no opinion


@dataclass(frozen=True)
class Job:
    """The same draws for all: `num_chains` chains from w*, a draw every `num_steps_bw_draws` steps, no burn-in."""

    name: str
    what: str
    model: nn.Module  # trained, in eval mode
    probe: tuple[Tensor, Tensor]  # inputs, class indices [N] or [N, T]
    train: tuple[Tensor, Tensor]
    lr: float
    localization: float
    batch_size: int = 256
    num_chains: int = 4
    num_draws: int = 50
    num_steps_bw_draws: int = 1
    eval_batch: int = EVAL_BATCH
    rounds: int = 3
    clock: str = "wall"

    @property
    def n_beta(self) -> float:
        """n / ln n, n the terms of the training loss."""
        n = self.train[1].numel()
        return n / math.log(n)

    @property
    def per_token(self) -> bool:
        return self.probe[1].ndim == 2

    @property
    def num_rows(self) -> int:
        """Rows of the kernel."""
        return self.probe[1].numel()

    def sampler(self, **changes: Any) -> lossk.SGLD:
        """These settings for lossk: nothing left to the tuner."""
        return lossk.SGLD(
            lr=self.lr,
            n_beta=self.n_beta,
            localization=self.localization,
            batch_size=self.batch_size,
            num_burnin_steps=0,
            num_steps_bw_draws=self.num_steps_bw_draws,
            **changes,
        )

    @property
    def draws(self) -> int:
        """Of all chains together."""
        return self.num_chains * self.num_draws

    def spec(self) -> dict[str, Any]:
        """The settings of the draws, for another process and for the record."""
        names = ("lr", "n_beta", "localization", "batch_size", "num_chains", "num_draws", "num_steps_bw_draws", "clock")
        return {name: getattr(self, name) for name in (*names, "eval_batch", "num_rows", "rounds")}

    def save(self, path: Path) -> None:
        """Network and data for another process: plain data and tensors, read with weights_only=True."""
        layers = json.dumps(describe(self.model)) if isinstance(self.model, nn.Sequential) else ""
        probe, train = ({"x": x, "y": y} for x, y in (self.probe, self.train))
        torch.save({"layers": layers, "state": self.model.state_dict(), "probe": probe, "train": train}, path)


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Plain cross entropy of every sample, or of every token: [B] or [B T] float32."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="none")


def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Plain cross entropy of a minibatch."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def make_mlp(options: Options) -> Job:
    """MLP 64-256-256-10 on synthetic data: ten overlapping Gaussian classes; the probe is the training set."""
    num_samples = options.changes.get("num_samples") or options.pick(full=2000, quick=2000, tiny=64)
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(num_samples) % 10
    x = torch.randn(10, 64, generator=generator)[y] + 2 * torch.randn(num_samples, 64, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    train_classifier(model, x, y, epochs=3, batch_size=64, lr=2e-3, weight_decay=0.1, seed=0)
    job = Job("mlp", "MLP 64-256-256-10", model, (x, y), (x, y), lr=1e-5, localization=100.0)
    counts = options.pick(
        full={"num_draws": 200, "rounds": 9}, quick={"num_draws": 50}, tiny={"num_draws": 4, "rounds": 1}
    )
    return changed(job, options, counts)


def make_cnn(options: Options) -> Job:
    """The CNN of the Fashion-MNIST recipe on the test images, with the recipe's 60,000 training images."""
    num_samples = options.changes.get("num_samples") or options.pick(full=10_000, quick=2000, tiny=64)
    model, probe, train = _untrained(num_samples) if options.size == "tiny" else _trained(num_samples, options)
    job = Job("cnn", "Fashion-MNIST CNN, 49,138 weights", model, probe, train, lr=1e-6, localization=100.0)
    counts = options.pick(
        full={}, quick={"num_chains": 2, "num_draws": 5, "rounds": 2}, tiny={"num_draws": 2, "rounds": 1}
    )
    return changed(job, options, counts)


def _trained(num_samples: int, options: Options) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    task = fashion.make_task(num_probe=num_samples, checkpoint=options.checkpoint)
    return task.model, task.samples, task.train


def _untrained(num_samples: int) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(num_samples, 1, 28, 28, generator=generator), torch.arange(num_samples) % 10
    return fashion.fashion_cnn().eval(), data, data


def changed(job: Job, options: Options, counts: dict[str, int]) -> Job:
    """The job with a size's counts, and over them those of the command line."""
    own = {name: count for name, count in options.changes.items() if name in JOB_COUNTS}
    return replace(job, **{**counts, **own}, clock=options.clock)


MAKERS = {"mlp": make_mlp, "cnn": make_cnn}
