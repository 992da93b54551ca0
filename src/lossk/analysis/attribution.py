"""Which training samples drive a prediction, and which look mislabelled: read off a kernel, with error bars.

cross = lossk.cross_kernel(model, train, query)
found = influence(cross, top=10)            # found.helpful.samples[j]: what helps query j most
found.to_frame().to_csv("influence.csv")

order, score = mislabel_ranking(kernel, labels)      # most suspicious first
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossk.analysis.baselines import Baseline
from lossk.checks import check_choice, check_instance, check_integer, check_tensor, wrong_kind
from lossk.cross import CrossKernel
from lossk.forms.blocks import tile_spans
from lossk.kernel.kernel import LossKernel
from lossk.kernel.traces import LossTraces
from lossk.optional import require
from lossk.records import check_record

if TYPE_CHECKING:
    import pandas as pd

ENTRIES = 2**24  # of a block of the kernel held at a time: 64 MB
ORDERS = ("influence", "correlation")
SCORES = ("self_influence", "mean_loss", "class_correlation", "class_margin")
DEFAULT_SCORE = "self_influence"  # what the literature ranks by; see mislabel_ranking


@dataclass(frozen=True)
class Ranked:
    """The k strongest training samples of each query, strongest first. All [q, k]."""

    row: Tensor  # int64, of the cross kernel
    samples: Tensor  # int64, number of the sample in the training data
    influence: Tensor  # float32, nats^2: BIF = -K. Negative: the sample lowers the query's loss
    standard_error: Tensor  # float32, nats^2: Monte Carlo, of the influence
    correlation: Tensor  # float32: R, of K's sign
    correlation_error: Tensor  # float32: Monte Carlo, of the correlation
    significant: Tensor  # bool: |R| above the query's noise floor

    def __post_init__(self) -> None:
        check_record(self)


@dataclass(frozen=True)
class Influence:
    """What `influence` found.

    Attributes:
        helpful: largest K first: the samples whose presence lowers the query's loss most (BIF most negative).
        harmful: most negative K first: the samples whose presence raises it.
        noise_floor: [q] float32, the |R| that the best of n unrelated training samples would reach by chance.
        query_samples: [q] int64, the number of each query in its set.
    """

    helpful: Ranked
    harmful: Ranked
    noise_floor: Tensor
    query_samples: Tensor

    def __post_init__(self) -> None:
        check_record(self)

    def to_frame(self) -> pd.DataFrame:
        """One row per query, kind ("helpful", "harmful") and rank (from 1). Needs pandas.

        A place is left out where fewer than `top` training samples have the kind's sign.
        """
        pd = require("pandas", "analysis", "a table")
        parts = []
        for kind, ranked in (("helpful", self.helpful), ("harmful", self.harmful)):
            num_query, k = ranked.row.shape
            columns: dict[str, Any] = {
                "query": self.query_samples.repeat_interleave(k).numpy(),
                "kind": kind,
                "rank": torch.arange(1, k + 1, device="cpu").repeat(num_query).numpy(),
                "train": ranked.samples.flatten().numpy(),
                "influence": ranked.influence.flatten().numpy(),
                "standard_error": ranked.standard_error.flatten().numpy(),
                "correlation": ranked.correlation.flatten().numpy(),
                "correlation_error": ranked.correlation_error.flatten().numpy(),
                "noise_floor": self.noise_floor.repeat_interleave(k).numpy(),
                "significant": ranked.significant.flatten().numpy(),
            }
            frame = pd.DataFrame(columns)
            parts.append(frame[frame.influence < 0] if kind == "helpful" else frame[frame.influence > 0])
        return pd.concat(parts).sort_values(["query", "kind", "rank"], kind="stable", ignore_index=True)


def influence(cross: CrossKernel, *, top: int = 10, by: str = "influence") -> Influence:
    """The training samples that help and harm each query most. Streams: 64 MB of the kernel at a time.

    An influence is the covariance itself, so that samples whose loss moves much come first; a correlation also ranks
    quiet samples. Either way `significant` says which stand above what n unrelated samples would show.

    Args:
        top: samples of either kind per query, from 1 to n.
        by: rank by "influence" (K) or by "correlation" (R).

    Raises:
        ValueError, TypeError: a bad argument.
    """
    cross, by = check_instance("cross", cross, CrossKernel), check_choice("by", by, ORDERS)
    top = check_integer("top", top, 1, cross.num_train)
    floor, found = cross.noise_floor, []
    for columns in tile_spans(cross.num_query, max(1, ENTRIES // cross.num_train)):
        block = cross[:, columns] if by == "influence" else cross.correlation(slice(None), columns)
        largest, smallest = block.topk(top, dim=0).indices, block.topk(top, dim=0, largest=False).indices
        for j in range(block.shape[1]):
            query = columns.start + j
            found.append([_describe(cross, rows[:, j], query, float(floor[query])) for rows in (largest, smallest)])
    helpful, harmful = (
        Ranked(*(torch.stack(parts) for parts in zip(*side, strict=True))) for side in zip(*found, strict=True)
    )
    return Influence(helpful, harmful, floor, cross.query_samples)


def _describe(cross: CrossKernel, rows: Tensor, query: int, floor: float) -> tuple[Tensor, ...]:
    """The fields of Ranked for some rows and one query, each [k]."""
    correlation = cross.correlation(rows, [query]).squeeze(1)
    return (
        rows,
        cross.train_samples[rows],
        cross.influence(rows, [query]).squeeze(1),
        cross.standard_error(rows, [query]).squeeze(1),
        correlation,
        cross.standard_error(rows, [query], correlation=True).squeeze(1),
        correlation.abs() > floor,
    )


def mislabel_scores(kernel: LossKernel | LossTraces, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Scores [N] float64 of the training samples of a kernel, each higher where a label is more suspicious.

    "mean_loss": E[l_i] over the draws: the label stays unlikely however the weights are jiggled.
    "self_influence": K_ii = Var[l_i]: the loss hangs on weights that little else holds in place (as the self-influence
        of influence functions and TracIn does).
    "class_correlation" (with labels): minus the mean of R_ij over the other samples j of the given class: the losses of
        its class do not move with its own.
    "class_margin" (with labels): the largest mean of R_ij over the samples of another class, less that of its own.

    Args:
        kernel: of the training samples with the labels they were given; traces become one.
        labels: [N] integer, those given labels.

    Raises:
        ValueError: labels that do not fit, or a class of one sample (which has nothing to be compared with).
    """
    if isinstance(kernel, LossTraces):
        kernel = LossKernel.from_traces(kernel)
    if not isinstance(kernel, LossKernel):
        raise wrong_kind("kernel", "a LossKernel or LossTraces", kernel)
    scores = {"mean_loss": kernel.mean_loss.double(), "self_influence": kernel.variance.double()}
    return scores if labels is None else {**scores, **class_scores(kernel, labels)}


def class_scores(kernel: LossKernel | Baseline, labels: Tensor) -> dict[str, Tensor]:
    """The scores of `mislabel_scores` that compare with classes, of a kernel or of a baseline: [N] float64 each.

    A dead sample, of which nothing is known, takes the lowest score of all.
    """
    kernel = check_instance("kernel", kernel, LossKernel, Baseline)
    labels = check_tensor("labels", labels, of="a real number").cpu()
    if labels.shape != (kernel.num_samples,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers [{kernel.num_samples}], got {labels.dtype} {list(labels.shape)}")
    classes, member = labels.unique(return_inverse=True)
    counts = member.bincount(minlength=len(classes))
    if len(classes) < 2 or int(counts.min()) < 2:
        few = f"{len(classes)} classes, the smallest of {int(counts.min())}"
        raise ValueError(f"labels must be of at least 2 classes with at least 2 samples each, got {few}")
    means = _class_means(kernel, F.one_hot(member, len(classes)).double())
    own = means.gather(1, member.unsqueeze(1)).squeeze(1)
    others = means.scatter(1, member.unsqueeze(1), float("-inf")).amax(dim=1)
    alive = kernel.variance > 0
    scores = {"class_correlation": -own, "class_margin": others - own}
    if not alive.any():
        return scores
    return {name: torch.where(alive, score, score[alive].min()) for name, score in scores.items()}


def _class_means(kernel: LossKernel | Baseline, members: Tensor) -> Tensor:
    """Mean correlation of each sample with the other samples of each class: [N, C] float64, by one product with K."""
    deviation = kernel.variance.double().clamp(min=0.0).sqrt()
    gain = torch.where(deviation > 0, 1.0 / deviation, 0.0).unsqueeze(1)
    sums = gain * kernel.matvec(gain * members)
    alive = (deviation > 0).double().unsqueeze(1)
    return (sums - alive * members) / (members.sum(dim=0) - members)


def mislabel_ranking(
    kernel: LossKernel | LossTraces, labels: Tensor | None = None, *, score: str = DEFAULT_SCORE
) -> tuple[Tensor, Tensor]:
    """Samples ordered by how suspicious their label is: (order [N] int64, most suspicious first; score [N] float64).

    Args:
        kernel, labels: as in `mislabel_scores`.
        score: one of its names. The default, self-influence, is the kernel's own quantity, needs no labels, and is what
            influence functions and TracIn rank by; "mean_loss" has less Monte Carlo error. `bench.studies.mislabels`
            compares them all, with baselines.
    """
    score = check_choice("score", score, SCORES)
    if labels is None and score.startswith("class_"):
        raise ValueError(f"score={score!r} needs labels, got None")
    scores = mislabel_scores(kernel, labels)[score]
    return torch.argsort(scores, descending=True, stable=True), scores
