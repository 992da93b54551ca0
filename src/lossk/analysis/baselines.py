"""What else relates samples: similarities that need no sampling, read like a loss kernel.

    kernel, cosine = lossk.build_kernel(model, data), baselines.gradient_cosine(model, data)
    kernel.correlation(rows, columns), cosine.correlation(rows, columns)
    kernel.neighbors(10).index, cosine.neighbors(10).index

Whether weight-space coupling adds anything is then a comparison of like with like. See also `influence_functions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossk.ambient import without_autocast
from lossk.analysis.gradients import Sketch, check_module, frozen, gradient_batches, losses_of, read_data
from lossk.analysis.inputs import check_labels, check_seed
from lossk.analysis.purity import neighbor_purity
from lossk.checks import (
    check_callable,
    check_flag,
    check_instance,
    check_integer,
    check_number,
    check_optional,
    check_tensor,
)
from lossk.data.data import Samples, Transform
from lossk.data.trees import leaves
from lossk.forms.blocks import tile_spans
from lossk.kernel.dense import AsArray, refuse_too_large
from lossk.kernel.indexing import resolve, rows_and_columns
from lossk.kernel.neighbors import Neighbors, nearest_of_rows
from lossk.records import check_record
from lossk.task.losses import LossFunction, forward, split_batch
from lossk.task.task import Task

BATCH = 256


@dataclass(frozen=True)
class Baseline(AsArray):
    """A similarity of N samples held as vectors: S_ij = features_i . duals_j. Deterministic: no Monte Carlo error.

    It is read as a kernel is: `baseline[rows, columns]`, `.correlation(rows, columns)`, `.neighbors(k)`, `.matvec(v)`,
    `.variance` (the diagonal), `.dead`, `.sets`. A positive entry means what a positive covariance means.

    Attributes:
        name: for tables.
        features: [N, d] float32 or float64.
        duals: [N, d], where the second argument is another vector (influence functions); None: the features.
        sets: the rows of each probe set.
        noise: standard error of a correlation near 0, where the features are a random sketch; 0: exact.
        tile: samples whose similarities are formed at a time.
    """

    name: str
    features: Tensor
    duals: Tensor | None = None
    sets: Mapping[str, slice] = field(default_factory=dict)
    noise: float = 0.0
    tile: int = 4096

    def __post_init__(self) -> None:
        check_record(self)
        check_integer("tile", self.tile, 1)
        check_number("noise", self.noise, least=0.0)
        for name, rows in self.sets.items():
            check_instance(f"sets[{name!r}]", rows, slice)
        for part, values in (("features", self.features), ("duals", self.duals)):
            if values is None:
                continue
            check_tensor(part, values, finite=False)
            if values.ndim != 2 or not values.is_floating_point() or values.shape != self.features.shape:
                raise ValueError(
                    f"{part} must be floating point [N, d], duals of the features' shape {list(self.features.shape)}, "
                    f"got {values.dtype} of shape {list(values.shape)}"
                )
            bad = (~torch.isfinite(values)).any(dim=1).nonzero()
            if len(bad):
                raise ValueError(f"{part} must be finite; those of sample {int(bad[0])} are not ({self.name})")

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.features)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, N)."""
        return self.num_samples, self.num_samples

    def to_numpy(self) -> np.ndarray:
        """The whole matrix: [N, N] float32. Refuses, with the size, what free memory cannot hold.

        Raises:
            MemoryError: the matrix needs more than the memory now available.
        """
        refuse_too_large(*self.shape, "read blocks, baseline[rows, columns]")
        return self.similarity().numpy()

    @property
    def _right(self) -> Tensor:
        return self.features if self.duals is None else self.duals

    @property
    def variance(self) -> Tensor:
        """[N] float64: the diagonal S_ii, in the place of a kernel's variance."""
        return (self.features.double() * self._right.double()).sum(dim=1)

    @property
    def dead(self) -> Tensor:
        """[N] bool: samples without direction, S_ii at most 0. Their correlations are 0."""
        return self.variance <= 0

    def similarity(self, rows: Any = slice(None), columns: Any = slice(None)) -> Tensor:
        """S_ij: [r, c] float32."""
        rows, columns = resolve(rows, self.num_samples, "rows"), resolve(columns, self.num_samples, "columns")
        with without_autocast():
            return (self.features[rows] @ self._right[columns].T).float()

    def __getitem__(self, key: Any) -> Tensor:
        return self.similarity(*rows_and_columns(key))

    def correlation(self, rows: Any = slice(None), columns: Any = slice(None)) -> Tensor:
        """S_ij / sqrt(S_ii S_jj), of features their cosine: [r, c] float32 in [-1, 1].

        As in a kernel, 0 for i != j where S_ii or S_jj is 0, and 1 for i = j.
        """
        rows, columns = resolve(rows, self.num_samples, "rows"), resolve(columns, self.num_samples, "columns")
        block = self._correlate(rows, columns)
        return torch.where(rows.unsqueeze(1) == columns, torch.ones((), dtype=torch.float32, device="cpu"), block)

    def _correlate(self, rows: Tensor, columns: Tensor | slice) -> Tensor:
        variance = self.variance
        gain = torch.where(variance > 0, variance.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
        left, right = self.features[rows].double(), self._right[columns].double()
        block = (left * gain[rows].unsqueeze(1)) @ (right * gain[columns].unsqueeze(1)).T
        return block.clamp(-1.0, 1.0).float()

    def matvec(self, v: Tensor) -> Tensor:
        """S v for v [N] or [N, m], float64, without forming S."""
        v = check_tensor("v", v).double()
        if v.ndim not in (1, 2) or v.shape[0] != self.num_samples:
            raise ValueError(f"v must have shape [{self.num_samples}] or [{self.num_samples}, m], got {list(v.shape)}")
        inner = self._right.double().T @ v.reshape(self.num_samples, -1)
        return (self.features.double() @ inner).reshape(v.shape)

    def neighbors(self, k: int = 10, rows: Any = None) -> Neighbors:
        """The k most correlated other samples, as `LossKernel.neighbors`; ties go to the smaller index.

        `noise_floor` is 0 where features are exact: there is no noise for a neighbor to be. Of a sketch it is three
        times its standard error.
        """
        k = check_integer("k", k, 1, self.num_samples - 1, limit=f"N - 1 = {self.num_samples - 1}")
        rows = resolve(slice(None) if rows is None else rows, self.num_samples, "rows")
        found = nearest_of_rows(self._correlation_rows, self.dead, rows, k)
        return found._replace(noise_floor=torch.full((len(rows),), 3.0 * self.noise, dtype=torch.float32, device="cpu"))

    def _correlation_rows(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        return ((span, self._correlate(rows, span)) for span in tile_spans(self.num_samples, self.tile))


def raw_inputs(data: Any, *, transform: Transform | None = None, centred: bool = False) -> Baseline:
    """Cosine of the raw inputs (pixels), all tensors of a sample flattened one after the other.

    Args:
        data: samples (inputs, targets) in any form `build_kernel` takes, or `ProbeSets`; targets are not looked at.
        centred: about the mean input.
    """
    centred, transform = check_flag("centred", centred), check_optional(check_callable, "transform", transform)
    sets = read_data(data, transform)
    rows = []
    for samples in sets.values():
        inputs = [leaves(split_batch(batch)[0]) for _, batch in samples.batches(BATCH)]
        rows += [torch.cat([t.detach().cpu().flatten(1).float() for t in tensors], dim=1) for tensors in inputs]
    widths = {row.shape[1] for row in rows}
    if len(widths) > 1:
        raise ValueError(f"inputs must be of one size to be compared, got {sorted(widths)} numbers per sample")
    return Baseline("raw inputs", _about_mean(torch.cat(rows), centred), sets=spans_of(sets))


def penultimate_features(
    model: nn.Module,
    data: Any,
    *,
    layer: str | None = None,
    transform: Transform | None = None,
    centred: bool = False,
) -> Baseline:
    """Cosine of the features before the output: what goes into the last `nn.Linear` that a forward pass calls.

    Args:
        model: used in eval mode and given back bit-identical.
        data: samples (inputs, targets), or `ProbeSets`; targets are not looked at.
        layer: take the inputs of this module instead; flattened to one vector per sample.
        centred: about the mean feature.

    Raises:
        ValueError: no Linear layer was called, no such layer, or its inputs are not one row per sample.
    """
    centred, wanted = check_flag("centred", centred), None if layer is None else check_module(model, layer)
    with frozen(model, data, loss=_no_loss, transform=transform) as (task, sets), torch.no_grad():
        rows = [_layer_inputs(task, batch, wanted) for samples in sets.values() for _, batch in samples.batches(BATCH)]
        features = torch.cat(rows)
    return Baseline("penultimate features", _about_mean(features.clone(), centred), sets=spans_of(sets))


def gradient_cosine(
    model: nn.Module,
    data: Any,
    *,
    loss: str | LossFunction = "cross_entropy",
    params: Sequence[str] | None = None,
    transform: Transform | None = None,
    dimensions: int | None = 2048,
    seed: int = 0,
    progress: bool = False,
) -> Baseline:
    """Cosine of the per-sample gradients of the loss at w*, S_ij = g_i . g_j: gamma K_ij as n_beta -> 0.

    Args:
        dimensions: of the random sketch that gradients are kept in (`lossk.analysis.gradients.Sketch`); a cosine is off
            by about 1 / sqrt(dimensions) (`.noise`). None keeps them whole, 4 N P bytes.
        seed: of the sketch.
        params: patterns of the parameters to take gradients in; None is all that require grad.
    """
    dimensions = check_optional(check_integer, "dimensions", dimensions, 1)
    seed, progress = check_seed(seed), check_flag("progress", progress)
    if dimensions is not None and dimensions % Sketch.BLOCKS:
        raise ValueError(f"dimensions must be a positive multiple of {Sketch.BLOCKS}, got {dimensions}")
    with frozen(model, data, loss=loss, params=params, transform=transform) as (task, sets):
        exact = dimensions is None or dimensions >= task.num_weights
        sketch = None if dimensions is None or exact else Sketch(task.num_weights, dimensions, seed)
        width = task.num_weights if sketch is None else sketch.dimensions
        features = torch.empty(sum(map(len, sets.values())), width, dtype=torch.float32, device="cpu")
        batches = gradient_batches(task, list(sets.values()), losses_of(task), progress=progress, what="gradients")
        for rows, gradients in batches:
            features[rows] = gradients.cpu() if sketch is None else sketch(gradients)
    noise = 0.0 if sketch is None else width**-0.5
    return Baseline("gradient cosine", features, sets=spans_of(sets), noise=noise)


def gradient_norms(
    model: nn.Module,
    data: Any,
    *,
    loss: str | LossFunction = "cross_entropy",
    params: Sequence[str] | None = None,
    transform: Transform | None = None,
    progress: bool = False,
) -> Tensor:
    """|g_i| of every sample's loss at w*: [N] float64."""
    progress = check_flag("progress", progress)
    with frozen(model, data, loss=loss, params=params, transform=transform) as (task, sets):
        batches = gradient_batches(task, list(sets.values()), losses_of(task), progress=progress, what="gradients")
        return torch.cat([gradients.double().norm(dim=1).cpu() for _, gradients in batches])


def confusion(
    model: nn.Module, data: Any, *, transform: Transform | None = None, soft: bool = False
) -> tuple[Baseline, Tensor]:
    """How often the model takes one class for another, as a similarity of classes and so of samples.

    P[a, b] is the share of samples of class a that the model calls b (`soft`: the mean probability it gives b), and the
    similarity of two samples is M[y_i, y_j], M = (P + P') / 2: a statement about classes only.

    Returns:
        (the baseline, P [C, C] float64); rows of P of classes without samples are 0.
    """
    soft = check_flag("soft", soft)
    with frozen(model, data, transform=transform) as (task, sets), torch.no_grad():
        given, labels = [], []
        for samples in sets.values():
            for _, batch in samples.batches(BATCH):
                inputs, targets = split_batch(batch)
                logits = forward(task.network, inputs).double().cpu()
                hard = F.one_hot(logits.argmax(dim=1), logits.shape[1]).double()
                given.append(logits.softmax(dim=1) if soft else hard)
                labels.append(targets.long().cpu())
    probabilities, classes = torch.cat(given), torch.cat(labels)
    members = F.one_hot(classes, probabilities.shape[1]).double()  # [N, C]
    p = members.T @ probabilities / members.sum(dim=0).clamp(min=1.0).unsqueeze(1)
    m = (p + p.T) / 2
    name = "confusion (probabilities)" if soft else "confusion matrix"
    return Baseline(name, members.clone(), duals=m[classes].clone(), sets=spans_of(sets)), p.clone()


def knn_disagreement(features: Baseline, labels: Tensor, k: int = 10) -> Tensor:
    """Share of each sample's k nearest neighbors that carry another label: [N] float64, high where it is suspicious.

    A common detector of wrong labels that needs no retraining (k-nearest-neighbor editing, Wilson 1972).
    """
    features = check_instance("features", features, Baseline)
    labels = check_labels("labels", labels, features.num_samples)
    return 1.0 - neighbor_purity(features.neighbors(k).index, labels)


def spans_of(sets: Mapping[str, Samples]) -> dict[str, slice]:
    """The rows of each named set; nothing for a lone one."""
    spans, start = {}, 0
    for name, samples in sets.items():
        spans[name] = slice(start, start + len(samples))
        start += len(samples)
    return {} if list(spans) == [""] else spans


def _about_mean(features: Tensor, centred: bool) -> Tensor:
    return features - features.double().mean(dim=0).float() if centred else features


def _no_loss(model: nn.Module, batch: Any) -> Tensor:
    """Stands in where targets do not matter; differentiable, so that the checks of a run apply."""
    return forward(model, split_batch(batch)[0]).float().flatten(1).square().mean(dim=1)


def _layer_inputs(task: Task, batch: Any, wanted: nn.Module | None) -> Tensor:
    """[B, d] float32: the inputs of `wanted`, or of the Linear called last."""
    seen: list[Tensor] = []
    modules = [wanted] if wanted is not None else [m for m in task.model.modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:1])) for m in modules]
    try:
        forward(task.model, split_batch(batch)[0])
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("model must call an nn.Linear (or the given layer) in its forward pass, but called none")
    last, size = seen[-1], len(leaves(batch)[0])
    if last.ndim < 2 or len(last) != size or (wanted is None and last.ndim != 2):
        raise ValueError(
            f"the last Linear's inputs must be one row per sample, [{size}, d], got {list(last.shape)}; name a layer="
        )
    return last.flatten(1).float().cpu()
