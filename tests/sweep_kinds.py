"""Small runs of each kind that writes files, each in some 30 ms, for the sweeps of kills and of losses of power."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lossk
import lossk.disk.swap
import lossk.run.cost
from lossk.disk.replacement import Replacement
from lossk.disk.swap import folder_beside
from lossk.plan.layout import in_store

N = 37  # 3 x 3 tiles of 16, a ragged one at the end
NAME = "k.lossk"


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 4, generator=generator), torch.arange(N) % 3


def model() -> nn.Module:
    linear = nn.Linear(4, 3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_(generator=generator)
    return linear


def losses() -> np.ndarray:
    return 1 + 0.01 * np.random.default_rng(0).standard_normal((2, 3, N)).astype(np.float32)


def build(out: Path | None, loader: Any = None, **changes: Any) -> lossk.LossKernel:
    """2 chains of 3 draws, too few for R-hat, which takes longest; panels of 2; momenta are state."""
    sampler = lossk.BAOAB(
        n_beta=30.0, localization=5.0, step_size=0.01, friction=20.0, num_burnin_steps=1, num_steps_bw_draws=1,
        batch_size=8,
    )  # fmt: skip
    settings: dict[str, Any] = {"num_chains": 2, "num_draws": 3, "tile": 16, "panel": 2, "backend": "torch"}
    return lossk.build_kernel(
        model(), data() if loader is None else loader, sampler=sampler, passes=lossk.Passes(), out=out,
        resume=out is not None, progress=False, **{**settings, **changes},
    )  # fmt: skip


def in_memory(path: Path) -> None:
    build(path / NAME)


def out_of_core(path: Path) -> None:
    choose = lossk.run.cost.choose_layout
    lossk.run.cost.choose_layout = lambda size, _, taken, **__: in_store(size, taken, super_panel=size.draws, stripes=2)
    try:
        build(path / NAME)
    finally:
        lossk.run.cost.choose_layout = choose


def factor(path: Path) -> None:
    build(path / NAME, form="factor")


def probe_sets(path: Path) -> None:
    """Of tokens, so that every array there can be is written."""
    build(path / NAME, lossk.ProbeSets(a=data(), b=data(1)), train=data(), num_draws=2)


def traces(path: Path) -> None:
    if not (path / NAME).exists():
        tokens = torch.stack([torch.arange(N) // 5, torch.arange(N) % 5], dim=1)
        lossk.LossTraces(losses(), tokens=tokens).save(path / NAME)


def kernel_of(shift: float) -> lossk.LossKernel:
    return lossk.LossKernel.from_traces(lossk.LossTraces(losses() * (1 + shift)))


def save(path: Path) -> None:
    """Also what `cross_kernel` and `sample_losses` have made: they write nothing themselves."""
    if not (path / NAME).exists():
        kernel_of(0).save(path / NAME)


def save_over(path: Path) -> None:
    kernel_of(0).save(path / NAME, overwrite=True)


def save_copy(path: Path) -> None:
    """Of a stored factor, file by file."""
    if not (path / NAME).exists():
        lossk.open(path.parent / "source.lossk").save(path / NAME)


def run_over(path: Path) -> None:
    """`lossk run --overwrite`, and where that was killed `--resume`."""
    place = Replacement(path / NAME, overwrite=not (folder_beside(path / NAME) / NAME).exists())
    try:
        place.begin()
        build(place.path)
        place.place()
    finally:
        place.close()


def run_over_by_renames(path: Path) -> None:
    """On a file system on which two folders cannot change places."""
    _by_renames(run_over, path)


def save_over_by_renames(path: Path) -> None:
    """The same."""
    _by_renames(save_over, path)


def _by_renames(work: Callable[[Path], None], path: Path) -> None:
    exchange = lossk.disk.swap.exchange
    lossk.disk.swap.exchange = lambda a, b: False
    try:
        work(path)
    finally:
        lossk.disk.swap.exchange = exchange


def export_zarr(path: Path) -> None:
    if not (path / NAME).exists():
        kernel_of(0).to_zarr(path / NAME)


def export_npy(path: Path) -> None:
    if not (path / NAME).exists():
        kernel_of(0).to_memmap(path / NAME)


RUNS = (in_memory, out_of_core, factor, probe_sets, run_over, run_over_by_renames)
SAVES = (traces, save, save_copy, save_over, save_over_by_renames)
EXPORTS = (export_zarr, export_npy)
KINDS: dict[str, Callable[[Path], None]] = {kind.__name__: kind for kind in (*RUNS, *SAVES, *EXPORTS)}


def prepare(folder: Path, kind: str) -> None:
    """What lies there before: the store that is saved over, or copied."""
    folder.mkdir()
    if "_over" in kind:
        kernel_of(0.5).save(folder / NAME)


def prepare_source(parent: Path) -> None:
    """What `save_copy` copies."""
    lossk.LossTraces(losses()).save(parent / "source.lossk", dtype="float32")


def arrays(path: Path) -> dict[str, bytes]:
    """Every chunk of a store, or the file of an export."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.glob("*/c/**/*")) if file.is_file()}


def names(folder: Path) -> set[str]:
    """Every file and folder below one."""
    return {os.path.relpath(entry, folder) for entry in folder.rglob("*")}
