"""What `test_defaults.py` runs under odd defaults of torch: one short call of most of the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lossk
from conftest import Classification, sgld
from lossk.analysis import baselines, class_similarity, compare_kernels, significant_neighbors
from lossk.analysis.attribution import mislabel_scores
from lossk.interop.posteriors import kernel_from_weights

SHORT: dict[str, Any] = {"num_chains": 2, "num_draws": 6, "backend": "torch", "progress": False}
PASSES = lossk.Passes()  # nothing that a stopwatch chooses

Found = dict[str, Any]  # a name for each number or tensor


def every(name: str, value: Any) -> Found:
    """The tensors, arrays and numbers of a result, named."""
    if isinstance(value, Tensor | np.ndarray | float | int | str):
        return {name: value}
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        pairs = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, tuple | list):
        pairs = [(str(i), part) for i, part in enumerate(value)]
    else:
        return {}
    return {key: leaf for part, inner in pairs for key, leaf in every(f"{name}.{part}", inner).items()}


def reading(kernel: lossk.LossKernel, labels: Tensor) -> Found:
    """Every reading method of a kernel."""
    rows = [0, 3, 4]
    parts = {
        "block": kernel[rows],
        "mask": kernel[labels == 1, [True] + [False] * (len(labels) - 1)],
        "correlation": kernel.correlation(rows, slice(2, 9)),
        "mean_loss": kernel.mean_loss,
        "variance": kernel.variance,
        "lag1": kernel.lag1,
        "dead": kernel.dead,
        "matvec": kernel.matvec([0.1] * len(labels)),
        "eigsh": [x.abs() for x in kernel.eigsh(3)],
        "neighbors": tuple(kernel.neighbors(3)),
        "anti": tuple(kernel.neighbors(3, rows, anti=True)),
        "error": kernel.standard_error(rows, rows),
        "error_lag1": kernel.standard_error(rows, rows, correlation=True, method="lag1"),
        "tiles": [tile for _, _, tile in kernel.tiles()],
        "dense": kernel.to_numpy(correlation=True),
        "diagnostics": kernel.diagnostics,
    }
    if kernel.form == "factor" and kernel.centering == "chain":
        parts["chains"] = kernel.standard_error(rows, rows, method="chains")
    return every(f"{kernel.form} {kernel.dtype}", parts)


def analyses(kernel: lossk.LossKernel, labels: Tensor) -> Found:
    """Some of lossk.analysis that reads a kernel."""
    parts = {
        "significant": significant_neighbors(kernel, 3),
        "mislabeled": mislabel_scores(kernel, labels),
        "classes": class_similarity(kernel, labels, class_names=["a", "b", "c"], num_bootstrap=5),
        "features": class_similarity(kernel.to_numpy(), labels, class_names=["a", "b", "c"], num_bootstrap=5),
        "compared": compare_kernels(kernel, kernel),
    }
    return every("analysis", parts)


def traces() -> lossk.LossTraces:
    """Fixed ones, given as Python floats."""
    values = np.random.default_rng(0).normal(size=(3, 7, 12)) ** 2
    return lossk.LossTraces(values.tolist())


def read_only(problem: Classification, model: nn.Module) -> Found:
    """What needs no sampling: kernels of given traces and their readings, and the baselines."""
    labels = torch.arange(12, device="cpu") % 3
    found = every("traces", {"losses": traces().losses})
    for centering in ("chain", "pooled"):
        kernel = lossk.LossKernel.from_traces(traces(), centering=centering)
        found |= {f"{centering} {name}": value for name, value in reading(kernel, labels).items()}
        found |= {f"{centering} {name}": value for name, value in analyses(kernel, labels).items()}
    cross = lossk.CrossKernel(lossk.LossKernel.from_traces(traces()), slice(0, 8), slice(8, 12))
    found |= every("cross", [cross[:], cross.correlation(), cross.noise_floor, cross.standard_error()])
    kinds = {
        "gradients": baselines.gradient_cosine(model, problem.data),
        "sketched": baselines.gradient_cosine(model, problem.data, dimensions=8),
        "norms": baselines.gradient_norms(model, problem.data),
        "penultimate": baselines.penultimate_features(model, problem.data),
        "confusion": baselines.confusion(model, problem.data, soft=True),
    }
    read = [baseline.correlation() for baseline in (kinds["gradients"], kinds["penultimate"], kinds["confusion"][0])]
    return found | every("baselines", kinds) | every("baselines read", read)


def sampling(problem: Classification, model: nn.Module, folder: Path) -> Found:
    """Kernels of every form and sampler."""
    short = {**SHORT, "passes": PASSES}
    build: Callable[..., lossk.LossKernel] = lossk.build_kernel
    found: Found = {}
    for form in ("tiles", "factor"):
        kernel = build(model, problem.data, sampler=sgld(), form=form, dtype="float16", tile=16, **short)
        found |= reading(kernel, problem.targets)
    stored = build(model, problem.data, sampler=sgld(), form="tiles", out=folder / "store.lossk", tile=16, **short)
    found |= reading(stored, problem.targets)
    found |= reading(lossk.open(folder / "store.lossk"), problem.targets)
    samplers = {
        "auto": lossk.SGLD(batch_size=8),
        "rmsprop": sgld(preconditioner="rmsprop"),
        "baoab": lossk.BAOAB(
            step_size=1e-2, friction=5.0, localization=5.0, batch_size=8, num_burnin_steps=3, num_steps_bw_draws=2
        ),
        "hmc": lossk.HMC(step_size=1e-2, localization=5.0, num_leapfrog_steps=3),
        "laplace": lossk.Laplace(localization=5.0),
        "diagonal": lossk.Laplace(localization=5.0, structure="diagonal"),
        "gaussian": lossk.Gaussian(sigma=0.1),
    }
    for name, sampler in samplers.items():
        run = lossk.sample_losses(model, problem.data, sampler=sampler, **short)
        found |= every(name, {"losses": run.losses, "excess": run.excess, "n_beta": run.n_beta})
    crossed = lossk.cross_kernel(
        model, problem.data, (problem.inputs[:5], problem.targets[:5]), sampler=sgld(), **short
    )
    labels = lossk.predicted_labels(model, problem.data)
    states = [{name: value * (1 + i / 100) for name, value in model.state_dict().items()} for i in range(4)]
    weights = kernel_from_weights(states, model, problem.data, progress=False)
    return found | every("cross_kernel", crossed[:]) | every("predicted", labels) | every("weights", weights[:])
