"""Leading eigenpairs of a kernel, without forming N x N."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lossk.forms.blocks import FactorBlocks

DENSE_EIGENSOLVER = 512  # samples up to which a dense solver is quicker and more robust than an iterative one
GRAM_DRAWS = 4096  # draws up to which the draws' Gram matrix (D^2 float64, here 134 MB) is formed


def way_of(factor: FactorBlocks | None, n: int, k: int) -> str:
    """How k eigenpairs of n samples are found: "gram", "dense" or "iterative"."""
    if factor is not None and max(DENSE_EIGENSOLVER, factor.num_rows) < n and k <= factor.num_rows <= GRAM_DRAWS:
        return "gram"
    return "dense" if n <= DENSE_EIGENSOLVER or k >= n - 1 else "iterative"


def leading(
    matvec: Callable[[Tensor], Tensor], factor: FactorBlocks | None, scale: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues [k], descending, and their eigenvectors [N, k], of the kernel: float64, nats^2.

    Args:
        matvec: v [N] or [N, m] -> K v.
        factor: the kernel's factor form, if it has one.
        scale: [N] float64.
    """
    n = len(scale)
    way = way_of(factor, n, k)
    if way == "gram":
        assert factor is not None
        return by_gram(factor, scale, k)
    if way == "dense":
        values, vectors = np.linalg.eigh(matvec(torch.eye(n, dtype=torch.float64, device="cpu")).numpy())
    else:
        from scipy.sparse.linalg import LinearOperator, eigsh  # slow to import

        operator = LinearOperator((n, n), matvec=lambda v: matvec(torch.from_numpy(v)).numpy(), dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(n)
        values, vectors = eigsh(operator, k=k, which="LA", v0=start)
    order = np.argsort(values)[::-1][:k].copy()
    return torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order])


def by_gram(factor: FactorBlocks, scale: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Eigenpairs of K = A'A, A = F S / sqrt(freedom) [D, N], from the Gram matrix A A' [D, D] of the draws.

    They share their non-zero eigenvalues, and if A A' u = w u then A'u / sqrt(w) is K's eigenvector: one pass over the
    factor for A A', one for the vectors. Nothing is sampled or iterated; in float64 an eigenvalue's error is about
    D 1e-16 of the largest.
    """
    gram = torch.zeros(factor.num_rows, factor.num_rows, dtype=torch.float64, device="cpu")
    for span, stripe in factor.stripes():
        part = stripe.double().mul_(scale[span])
        gram.addmm_(part, part.T)
    values, directions = torch.linalg.eigh(gram.div_(factor.freedom))
    values, directions = values.flip(0)[:k].clamp(min=0.0), directions.flip(1)[:, :k]
    positive = values > factor.num_rows * torch.finfo(torch.float64).eps * values[0]
    gain = torch.where(positive, (values * factor.freedom).rsqrt(), 0.0)
    vectors = torch.empty(len(scale), k, dtype=torch.float64, device="cpu")
    for span, stripe in factor.stripes():
        vectors[span] = scale[span].unsqueeze(1) * (stripe.double().T @ (directions * gain))
    return values, _orthonormal(vectors, int(positive.sum()))


def _orthonormal(vectors: Tensor, found: int) -> Tensor:
    """[N, k] with orthonormal columns, each near its own.

    A'u / sqrt(w) is orthogonal to the others to D 1e-16 times the largest eigenvalue over w only, so small eigenvalues'
    vectors are set right by the larger ones. Past the rank of K (columns from `found` on) any vectors orthogonal to
    those found are eigenvectors, of eigenvalue 0: take some.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    vectors[:, found:] = torch.randn(vectors[:, found:].shape, generator=generator, dtype=torch.float64, device="cpu")
    basis, triangle = torch.linalg.qr(vectors)
    return basis.mul_(triangle.diagonal().sign())
