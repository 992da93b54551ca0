"""In how many directions the data beat the pull: the effective dimension of a law at w*.

    d_eff = sum_k n_beta h_k / (n_beta h_k + localization),   h_k the positive eigenvalues of the Hessian of L_n at w*

(MacKay 1992, "Bayesian interpolation": the number of well-determined parameters.) It is between 0 and the number of
weights; a direction counts half where n_beta h = localization. With a metric, h are eigenvalues in the chain's own
coordinates, where the pull is isotropic.

Up to 96 weights the Hessian is made whole. Beyond, the trace is estimated by stochastic Lanczos quadrature (Ubaru, Chen
and Saad 2017, "Fast estimation of tr(f(A))"): for a random vector v of signs, v' f(H) v is a sum over the Ritz values
of a few Lanczos steps, and the mean over vectors is the trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from lossk.curvature.curvature import PILOT_CHAIN, Products, lanczos
from lossk.data.data import Samples
from lossk.data.minibatches import Minibatches
from lossk.ops.philox import normals
from lossk.pilot.pilot import Pilot
from lossk.task.task import Task

Array = NDArray[np.float64]

EXACT = 96  # weights, up to which the Hessian is made whole
MOST_SAMPLES = 256
PROBES, ITERATIONS = 3, 10
SHARE = 0.06  # of a run's passes, beyond which it stays unknown
SEED = 0  # of samples and probes: what is measured belongs to the law, and that does not depend on the run's seed
STREAM = 7  # of the Philox counter


def effective_dimension(
    task: Task, train: Samples, *, n_beta: float, localization: float, most: int = MOST_SAMPLES, probes: int = PROBES,
    iterations: int = ITERATIONS,
) -> float:  # fmt: skip
    """d_eff of the law of an entered task, at w*, from the Hessian over up to `most` training samples.

    Over fewer samples than there are, directions that only others have are missed: it is a little too small.

    Args:
        localization: gamma, greater than 0.
        probes, iterations: of the estimate, which costs 2 gradients of all `most` samples for each pair of them.

    Raises:
        ValueError: derivatives of the loss are not finite.
    """
    task.reset()
    products = Products(task, train, Minibatches(len(train), most, seed=SEED, chain=PILOT_CHAIN)[0])

    def share(eigenvalues: Array) -> Array:
        beaten = n_beta * np.clip(eigenvalues, 0.0, None)
        return np.asarray(beaten / (beaten + localization))

    count = task.num_weights
    if count <= EXACT:
        return float(share(np.asarray(np.linalg.eigvalsh(_matrix(products.hessian, task)), dtype=np.float64)).sum())
    found = []
    for number in range(probes):
        noise = normals(SEED, PILOT_CHAIN, number, count, stream=STREAM).to(task.device)
        start = torch.where(noise > 0, 1.0, -1.0).to(noise.dtype)
        values, weights = ritz(products.hessian, start, min(iterations, count))
        found.append(count * float(weights @ share(values)))
    return sum(found) / len(found)


def count_directions(
    pilot: Pilot | None, sampler: Any, task: Task, train: Samples, run_passes: float
) -> tuple[Pilot | None, list[str]]:
    """A pilot that knows the effective dimension of a resolved sampler's law, and a line that says it.

    Args:
        run_passes: what the run's own passes come to, in forward passes of one sample; none is added to a short run.
    """
    localization, n_beta = getattr(sampler, "localization", 0.0), getattr(sampler, "n_beta", None)
    count = task.num_weights
    products = count if count <= EXACT else PROBES * ITERATIONS
    dear = 6 * products * min(len(train), MOST_SAMPLES) > SHARE * run_passes  # two gradients, for 3 passes each
    if pilot is None or n_beta is None or not localization > 0 or dear:
        return pilot, []
    found = effective_dimension(task, train, n_beta=float(n_beta), localization=float(localization))
    line = f"effective dimension = {found:.3g}: of {count} directions, those in which the data beat the pull"
    return dataclasses.replace(pilot, effective_dimension=found), [line]


def ritz(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> tuple[Array, Array]:
    """(Ritz values, the share that `start` has in each, squared) of a symmetric operator after so many steps.

    Copies of a Ritz value, which lost orthogonality makes, share its weight, and the sum over them stays.
    """
    for _, diagonal, beside, norm in lanczos(product, start):
        if len(diagonal) == iterations or norm <= 1e-6 * max(map(abs, diagonal)):
            values, vectors = eigh_tridiagonal(diagonal, beside)
            return np.asarray(values), np.asarray(vectors[0] ** 2)
    raise AssertionError("the iteration has no end of its own")


def _matrix(product: Callable[[Tensor], Tensor], task: Task) -> Array:
    """[P, P] float64, symmetric: an operator on unit vectors."""
    eye = torch.eye(task.num_weights, dtype=torch.float32, device=task.device)
    whole = torch.stack([product(unit) for unit in eye]).double().cpu().numpy()
    return np.asarray((whole + whole.T) / 2)
