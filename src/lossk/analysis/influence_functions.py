"""Classical influence as a baseline: damped influence functions, for small models.

The sign is a kernel's: S_ij > 0 where training more on sample j lowers the loss of sample i. At damping
lambda = gamma / n_beta, n_beta K tends to the damped influence as n_beta grows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor, nn
from tqdm.auto import tqdm

from lossk.analysis.baselines import Baseline, spans_of
from lossk.analysis.gradients import frozen, gradient_batches, losses_of
from lossk.checks import check_choice, check_flag, check_number
from lossk.data.data import Samples, Transform
from lossk.data.probe_sets import ProbeSets
from lossk.task.losses import LossFunction, forward, split_batch
from lossk.task.task import Task

CURVATURES = ("gauss-newton", "hessian")
SOLVERS = ("auto", "dense", "cg")
DENSE_WEIGHTS = 4096  # the most for which "auto" forms the P x P curvature: 134 MB in float64
BATCH = 1024

Product = Callable[[Tensor], Tensor]  # v [P] float32 -> H v [P] float32


def damped_influence(
    model: nn.Module,
    data: Any,
    *,
    train: Any,
    damping: float,
    curvature: str = "gauss-newton",
    solver: str = "auto",
    loss: str | LossFunction = "cross_entropy",
    params: Sequence[str] | None = None,
    transform: Transform | None = None,
    tolerance: float = 1e-4,
    progress: bool = False,
) -> Baseline:
    """S_ij = g_i' (H + damping I)^-1 g_j with per-sample gradients g at w* (Koh and Liang 2017, arXiv 1703.04730).

    Costs P products H v with the whole training set ("dense", 8 P^2 bytes), or some tens for each of the N samples
    ("cg"): for models of some thousand weights, or few samples.

    Args:
        data: the N samples between which influence is wanted, in any form `build_kernel` takes, or `ProbeSets`.
        train: the data that defines the training loss, whose curvature is H.
        damping: lambda, greater than 0, in the units of H (nats per squared weight).
        curvature: "gauss-newton", of the losses "cross_entropy" and "mse": positive semi-definite everywhere (it is the
            Fisher matrix of these losses); or "hessian", exact, which must be positive definite once damped.
        solver: "dense" (Cholesky), "cg" (SciPy's conjugate gradients), or "auto": dense up to 4,096 weights.
        tolerance: relative residual of "cg".

    Raises:
        ValueError: a bad argument, or a damped Hessian that is not positive definite.
    """
    damping, tolerance = check_number("damping", damping, above=0.0), check_number("tolerance", tolerance, above=0.0)
    curvature = check_choice("curvature", curvature, CURVATURES)
    solver, progress = check_choice("solver", solver, SOLVERS), check_flag("progress", progress)
    everything = _beside(data, train)
    with frozen(model, everything, loss=loss, params=params, transform=transform) as (task, sets):
        probes, train_samples = _split(sets)
        product = _curvature(task, train_samples, curvature)
        size = sum(map(len, probes.values()))
        gradients = torch.empty(size, task.num_weights, dtype=torch.float32, device="cpu")
        for rows, part in gradient_batches(
            task, list(probes.values()), losses_of(task), progress=progress, what="gradients"
        ):
            gradients[rows] = part.cpu()
        name = f"influence functions ({'Gauss-Newton' if curvature == 'gauss-newton' else 'Hessian'})"
        if solver == "dense" or (solver == "auto" and task.num_weights <= DENSE_WEIGHTS):
            whitened = _whiten(gradients, _matrix(product, task, progress), damping)
            return Baseline(name, whitened, sets=spans_of(probes))
        duals = _solve(gradients, product, damping, tolerance, progress)
        return Baseline(name, gradients, duals=duals, sets=spans_of(probes))


def _beside(data: Any, train: Any) -> ProbeSets:
    """The probe sets and the training data, read together so that what is given twice is held once."""
    several = {f"data {name}": samples for name, samples in data.sets.items()} if isinstance(data, ProbeSets) else {}
    if train is None or isinstance(train, ProbeSets):
        raise TypeError(f"train must be the data of the training loss, got {type(train).__name__}")
    return ProbeSets(**(several or {"data": data}), train=train)


def _split(sets: Mapping[str, Samples]) -> tuple[dict[str, Samples], Samples]:
    if "data" in sets:
        return {"": sets["data"]}, sets["train"]
    return {name.removeprefix("data "): part for name, part in sets.items() if name != "train"}, sets["train"]


def _curvature(task: Task, train: Samples, curvature: str) -> Product:
    if curvature == "hessian":
        return lambda v: _hessian_product(task, train, v)
    if task.loss.name not in ("cross_entropy", "mse"):
        raise ValueError(
            "curvature='gauss-newton' is of loss='cross_entropy' or 'mse'; use curvature='hessian' for "
            f"{task.loss.name}"
        )
    return lambda v: _gauss_newton_product(task, train, v)


def _hessian_product(task: Task, train: Samples, v: Tensor) -> Tensor:
    out = torch.zeros_like(v)
    for _, batch in train.batches(BATCH):
        with torch.enable_grad():
            losses = task.loss.per_sample(task.model, batch)
            first = torch.autograd.grad(
                losses.sum() / len(train), task.sampled, create_graph=True, allow_unused=True, materialize_grads=True
            )
            along = task.flatten(first) @ v
            if not along.requires_grad:
                continue  # linear in the weights: no curvature
            second = torch.autograd.grad(along, task.sampled, allow_unused=True, materialize_grads=True)
        out += task.flatten(second)
    return out


def _gauss_newton_product(task: Task, train: Samples, v: Tensor) -> Tensor:
    """(1/n) sum_i J_i' S_i J_i v, J the outputs' Jacobian and S the loss's Hessian in the outputs."""
    out = torch.zeros_like(v)
    for _, batch in train.batches(BATCH):
        with torch.enable_grad():
            outputs = forward(task.model, split_batch(batch)[0]).flatten(1)  # [B, C]
            u = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(outputs, task.sampled, u, create_graph=True, materialize_grads=True)
            (along,) = torch.autograd.grad(task.flatten(pulled) @ v, u, retain_graph=True)  # J v: J'u is linear in u
        values = outputs.detach()
        if task.loss.name == "cross_entropy":
            p = values.softmax(dim=1)
            bent = p * along - p * (p * along).sum(dim=1, keepdim=True)
        else:
            bent = 2.0 / values.shape[1] * along
        out += task.flatten(torch.autograd.grad(outputs, task.sampled, bent / len(train), materialize_grads=True))
    return out


def _matrix(product: Product, task: Task, progress: bool) -> Tensor:
    """H [P, P] float64, symmetrised."""
    size = task.num_weights
    h = torch.empty(size, size, dtype=torch.float64, device="cpu")
    basis = torch.zeros(size, device=task.device, dtype=torch.float32)
    for i in tqdm(range(size), desc="curvature", unit="column", disable=not progress, dynamic_ncols=True):
        basis[i] = 1.0
        h[i] = product(basis).double().cpu()
        basis[i] = 0.0
    return (h + h.T) / 2


def _whiten(gradients: Tensor, h: Tensor, damping: float) -> Tensor:
    """[N, P] float64 vectors whose inner products are g_i' (H + damping I)^-1 g_j."""
    h.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(h)
    if int(failed):
        smallest = float(torch.linalg.eigvalsh(h)[0]) - damping
        raise ValueError(
            f"damping must be greater than {-smallest:.3g}, as the curvature's smallest eigenvalue is {smallest:.3g} "
            f"(or use curvature='gauss-newton'), got {damping:g}"
        )
    return torch.linalg.solve_triangular(factor, gradients.double().T, upper=False).T.contiguous()


def _solve(gradients: Tensor, product: Product, damping: float, tolerance: float, progress: bool) -> Tensor:
    """(H + damping I)^-1 g_j of every sample by conjugate gradients: [N, P] float32."""

    def damped(v: np.ndarray) -> np.ndarray:
        vector = torch.from_numpy(v).float().reshape(-1)
        out = (product(vector) + damping * vector).double().numpy()
        if float(v.reshape(-1) @ out) <= 0 and np.any(v):
            raise ValueError(
                f"damping must make the curvature positive definite, got {damping:g}; raise it, or use "
                "curvature='gauss-newton'"
            )
        return out

    size = gradients.shape[1]
    operator = LinearOperator((size, size), matvec=damped, dtype=np.float64)
    duals = torch.empty_like(gradients)
    for i in tqdm(range(len(gradients)), desc="solving", unit="sample", disable=not progress, dynamic_ncols=True):
        solution, failed = cg(operator, gradients[i].double().numpy(), rtol=tolerance, maxiter=10 * size)
        if failed:
            raise ValueError(f"tolerance={tolerance:g} was not reached for sample {i}; raise it or the damping")
        duals[i] = torch.from_numpy(solution).float()
    return duals
