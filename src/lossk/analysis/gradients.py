"""Gradients of single samples' losses at the trained weights, whole or sketched into few dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from tqdm.auto import tqdm

from lossk.analysis.inputs import check_seed
from lossk.checks import (
    check_callable,
    check_instance,
    check_integer,
    check_optional,
    check_strings,
    check_tensor,
    check_text,
)
from lossk.data.data import Samples, Transform
from lossk.data.probe_sets import ProbeSets, read_sources
from lossk.data.trees import leaves, map_tensors
from lossk.task.agreement import prove
from lossk.task.losses import LossFunction, resolve_loss
from lossk.task.passes import Passes
from lossk.task.task import Task

BATCH_BYTES = 2**27  # of gradients held at a time
LARGEST_BATCH = 256

SampleValue = Callable[[nn.Module, Any], Tensor]  # (model, batch of one) -> scalar


@contextmanager
def frozen(
    model: nn.Module,
    data: Any,
    *,
    loss: str | LossFunction = "cross_entropy",
    params: Sequence[str] | None = None,
    transform: Transform | None = None,
) -> Iterator[tuple[Task, Mapping[str, Samples]]]:
    """The model frozen as a run of lossk has it, and its data by sets (a lone one under ""); put back on leaving.

    Raises:
        ValueError, TypeError: data, loss or model that `build_kernel` would refuse, or a loss per token.
    """
    check_instance("model", model, nn.Module)
    transform = check_optional(check_callable, "transform", transform)
    params = check_optional(check_strings, "params", params, "name patterns")
    sets = read_data(data, transform)
    task = Task(model, resolve_loss(loss), params=params)
    task.use_passes(Passes(memory_format="contiguous"))  # weights in `task.flat` lie as in the model
    names = {id(samples): name or "data" for name, samples in sets.items()}
    proven, positions = prove(task, {names[id(samples)]: samples for samples in sets.values()})
    if any(each is not None for each in positions.values()):
        raise ValueError(f"loss must be one per sample for a baseline, got one per token ({task.loss.name})")
    with task:
        yield task, {name: proven[names[id(samples)]] for name, samples in sets.items()}


def read_data(data: Any, transform: Transform | None) -> Mapping[str, Samples]:
    """The probe sets of `data`, a lone one under the name ""."""
    train = next(iter(data.sets.values())) if isinstance(data, ProbeSets) else None
    return read_sources(data, train, transform, name="data")[0]


def losses_of(task: Task) -> SampleValue:
    """The value whose gradients are wanted is the sample's loss."""

    def value(model: nn.Module, batch: Any) -> Tensor:
        return task.loss.per_sample(model, batch)[0]

    return value


def gradient_batches(
    task: Task, sets: Sequence[Samples], value: SampleValue, *, progress: bool, what: str
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, gradients [b, P] float32) of all samples, one set after the other, with respect to the sampled weights.

    The weights lie as in `task.flat`. Gradients of a batch are taken at once (torch.func), or sample by sample where
    the model has operations that cannot be: the numbers are the same within float32 rounding.
    """
    size = max(1, min(LARGEST_BATCH, BATCH_BYTES // (8 * task.num_weights)))
    together = _vectorised(task, value)
    few = map_tensors(lambda t: t[:2], sets[0][: min(2, len(sets[0]))])
    try:
        together(few)
        of_batch = together
    except RuntimeError:
        of_batch = _one_by_one(task, value)
    row = 0
    total = sum(len(samples) for samples in sets)
    with tqdm(total=total, desc=what, unit="sample", disable=not progress, dynamic_ncols=True) as bar:
        for samples in sets:
            for start in range(0, len(samples), size):
                gradients = of_batch(samples[start : start + size])
                yield slice(row, row + len(gradients)), gradients
                row += len(gradients)
                bar.update(len(gradients))


class _Within(nn.Module):
    """The value as a module around the model, so that it sees the model itself, with whatever attributes it reads."""

    def __init__(self, model: nn.Module, value: SampleValue) -> None:
        super().__init__()
        self.training = model.training
        self.model, self.value = model, value

    def forward(self, batch: Any) -> Tensor:
        return self.value(self.model, batch)


def _vectorised(task: Task, value: SampleValue) -> Callable[[Any], Tensor]:
    within = _Within(task.model, value)
    weights = {f"model.{name}": p.detach() for name, p in zip(task.names, task.sampled, strict=True)}

    def of_batch(batch: Any) -> Tensor:
        def of_one(parameters: dict[str, Tensor], parts: list[Tensor]) -> Tensor:
            rest = iter(parts)
            return functional_call(within, parameters, (map_tensors(lambda _: next(rest).unsqueeze(0), batch),))

        found = vmap(grad(of_one), in_dims=(None, 0))(weights, leaves(batch))
        parts = list(found.values())
        return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1).float()

    return of_batch


def _one_by_one(task: Task, value: SampleValue) -> Callable[[Any], Tensor]:
    def of_batch(batch: Any) -> Tensor:
        rows = []
        for i in range(len(leaves(batch)[0])):
            with torch.enable_grad():
                scalar = value(task.model, map_tensors(lambda t: t[i : i + 1], batch))  # noqa: B023
            parts = torch.autograd.grad(scalar, task.sampled, allow_unused=True, materialize_grads=True)
            rows.append(task.flatten([part.float() for part in parts]))
        return torch.stack(rows)

    return of_batch


class Sketch:
    """A random projection from P to d dimensions that keeps inner products.

    Every weight goes, with random signs, into one dimension of each of 4 blocks of d / 4 (the block form of the sparse
    Johnson-Lindenstrauss transform, Kane and Nelson 2014, arXiv 1012.1577; of one block: a count sketch). For fixed x
    and y the projected inner product is unbiased, with variance at most (|x|^2 |y|^2 + (x'y)^2) / d whatever x and y,
    as that of a dense Gaussian projection: a cosine is off by about sqrt((1 + cos^2) / d).

    Args:
        num_weights: P.
        dimensions: d, a multiple of 4.
        seed: of the projection.
    """

    BLOCKS = 4

    def __init__(self, num_weights: int, dimensions: int, seed: int) -> None:
        num_weights, seed = check_integer("num_weights", num_weights, 1), check_seed(seed)
        dimensions = check_integer("dimensions", dimensions, 1)
        if dimensions % self.BLOCKS:
            raise ValueError(f"dimensions must be a positive multiple of {self.BLOCKS}, got {dimensions}")
        self.dimensions, self.num_weights = dimensions, num_weights
        side = dimensions // self.BLOCKS
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        rows = np.concatenate([rng.integers(0, side, num_weights) + b * side for b in range(self.BLOCKS)])
        signs = rng.choice(np.array([-1.0, 1.0], dtype=np.float32), self.BLOCKS * num_weights)
        columns = np.tile(np.arange(num_weights), self.BLOCKS)
        shape = (dimensions, num_weights)
        self._matrix = sparse.csr_array((signs / np.float32(self.BLOCKS**0.5), (rows, columns)), shape=shape)

    def __call__(self, gradients: Tensor) -> Tensor:
        """[b, P] float32 -> [b, d] float32."""
        gradients = check_tensor("gradients", gradients, ("b", self.num_weights), finite=False).float()
        return torch.from_numpy(np.ascontiguousarray((self._matrix @ gradients.cpu().numpy().T).T))


def check_module(model: nn.Module, name: str) -> nn.Module:
    """The module of that name.

    Raises:
        ValueError: there is none.
    """
    check_text("layer", name)
    found = dict(check_instance("model", model, nn.Module).named_modules())
    if name not in found or not name:
        raise ValueError(f"layer must name a module of the model, got {name!r}; it has {', '.join(list(found)[1:9])}")
    return found[name]
