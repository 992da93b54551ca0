"""What valid calls are made of: one small kernel, and all that comes from it, each made once."""

from __future__ import annotations

import itertools
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lossk

N, CHAINS, DRAWS, CLASSES, WIDTH = 8, 2, 6, 4, 3
NAMES = ("ant", "bee", "cow", "dog")
TREE = {"insects": ["ant", "bee"], "mammals": ["cow", "dog"]}
SETS = {"train": slice(0, 5), "query": slice(5, 8)}


class World:
    """Objects that every table shares, in a folder of its own; nothing here draws from a global stream."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, the same on every call of one shape."""
        rng = np.random.default_rng(np.random.SeedSequence([*shape]))
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    def fresh(self, suffix: str) -> Path:
        """A path in the working folder that nothing is at."""
        return Path(f"fresh{next(self._numbers)}{suffix}")

    @cached_property
    def traces(self) -> lossk.LossTraces:
        return lossk.LossTraces(
            self.random(CHAINS, DRAWS, N).exp(), excess=self.random(CHAINS, DRAWS), n_beta=10.0, sets=SETS
        )

    @cached_property
    def token_traces(self) -> lossk.LossTraces:
        tokens = torch.stack([torch.arange(N) // 2, torch.arange(N) % 2], dim=1)
        return lossk.LossTraces(self.random(CHAINS, DRAWS, N).exp(), tokens=tokens)

    @cached_property
    def kernel(self) -> lossk.LossKernel:
        return lossk.LossKernel.from_traces(self.traces)

    @cached_property
    def cross(self) -> lossk.CrossKernel:
        return lossk.CrossKernel(self.kernel)

    @cached_property
    def neighbors(self) -> lossk.Neighbors:
        return self.kernel.neighbors(3)

    @cached_property
    def store(self) -> Path:
        path = self.folder / "world.lossk"
        self.kernel.save(path)
        return path

    @cached_property
    def x(self) -> Tensor:
        return self.random(N, WIDTH)

    @property
    def labels(self) -> Tensor:
        return torch.arange(N) % CLASSES

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.x, self.labels

    @cached_property
    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(WIDTH, CLASSES))
        with torch.no_grad():
            model[0].weight.copy_(self.random(CLASSES, WIDTH))
            model[0].bias.zero_()
        return model.eval()

    @cached_property
    def sampler(self) -> lossk.SGLD:
        return lossk.SGLD(lr=1e-3, n_beta=5.0, localization=1.0, batch_size=4, num_burnin_steps=1, num_steps_bw_draws=1)

    @cached_property
    def short_run(self) -> dict[str, Any]:
        """Settings of `build_kernel` with which it takes little time."""
        return {"sampler": self.sampler, "num_chains": 2, "num_draws": 2, "backend": "torch", "progress": False}

    @cached_property
    def similarity(self) -> np.ndarray:
        """[C, C] float64, symmetric, of diagonal 1."""
        x = self.random(CLASSES, CLASSES, dtype=torch.float64).numpy()
        return np.corrcoef(x)

    @cached_property
    def baseline(self) -> Any:
        from lossk.analysis.baselines import Baseline

        return Baseline("features", self.random(N, WIDTH))

    @cached_property
    def class_matrix(self) -> Any:
        from lossk.analysis import ClassMatrix

        return ClassMatrix(self.similarity)

    @cached_property
    def taxonomy(self) -> Any:
        from lossk.analysis import Taxonomy

        return Taxonomy.from_nested(TREE)

    @cached_property
    def masks(self) -> Tensor:
        return torch.eye(N, dtype=torch.bool)[:5]
