"""Checks of attribution against facts: retraining on subsets, planted label noise, a network that learnt nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from lossk.analysis.baselines import Baseline
from lossk.analysis.inputs import check_labels, check_seed
from lossk.analysis.purity import chance_purity, class_purity
from lossk.checks import check_callable, check_flag, check_instance, check_integer, check_number, check_tensor
from lossk.kernel.kernel import LossKernel
from lossk.kernel.neighbors import Neighbors
from lossk.optional import require
from lossk.records import check_record

MOST_BOOTSTRAP = 10**6
MOST_ENTRIES = 2**34  # of the masks, a byte each
Train = Callable[[Tensor, int], Tensor]  # (rows [m] int64 of the training samples, seed) -> losses of the queries [q]


class Correlated(Protocol):
    """A `LossKernel`, or a baseline that reads like one."""

    @property
    def num_samples(self) -> int: ...

    def correlation(self, rows: Any = ..., columns: Any = ...) -> Tensor: ...

    def neighbors(self, k: int = ..., rows: Any = ...) -> Neighbors: ...


@dataclass(frozen=True)
class DatamodelingScore:
    """What `linear_datamodeling_score` found."""

    per_query: Tensor  # [q] float64: Spearman's rank correlation over the subsets; NaN where an outcome is constant
    mean: float  # over the queries that have one
    standard_error: float  # of the mean, by bootstrap over subsets and queries

    def __post_init__(self) -> None:
        check_record(self)


def random_subsets(num_train: int, num_subsets: int, *, fraction: float = 0.5, seed: int = 0) -> Tensor:
    """Random subsets of one size, as rows of a mask [S, n] bool.

    Args:
        fraction: of the training samples in each, between 0 and 1.
    """
    num_train = check_integer("num_train", num_train, 2)
    num_subsets = check_integer("num_subsets", num_subsets, 1)
    fraction = check_number("fraction", fraction, above=0.0, most=1.0)
    seed = check_seed(seed)
    if num_train * num_subsets > MOST_ENTRIES:
        raise MemoryError(f"num_subsets x num_train must be at most {MOST_ENTRIES:,}, got {num_subsets} x {num_train}")
    size = round(fraction * num_train)
    if not 0 < size < num_train:
        raise ValueError(f"fraction must leave some of the {num_train} samples in and some out, got {fraction}")
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    masks = torch.zeros(num_subsets, num_train, dtype=torch.bool, device="cpu")
    for mask in masks:
        mask[torch.from_numpy(rng.choice(num_train, size, replace=False))] = True
    return masks


def retrain_on_subsets(train: Train, masks: Tensor, *, seeds: Sequence[int] = (0,), progress: bool = True) -> Tensor:
    """Losses of the queries after training on each subset, averaged over seeds: [S, q] float64, nats.

    Args:
        train: trains a fresh model on rows [m] of the training samples with a seed, and returns the losses [q] of the
            queries under it.
        masks: [S, n] bool, from `random_subsets`.
        seeds: of initial weights and batches; the same ones for every subset.

    Raises:
        ValueError: masks of another shape, no seed, or losses that are not finite or change their number.
    """
    train, progress = check_callable("train", train), check_flag("progress", progress)
    masks = _check_masks(masks)
    if isinstance(seeds, list | tuple) and not seeds:
        raise ValueError("seeds must hold at least one seed, got none")
    seeds = [int(seed) for seed in check_tensor("seeds", seeds, ("S",), of="an integer")]
    outcomes: list[Tensor] = []
    with tqdm(total=len(masks) * len(seeds), desc="retraining", unit="model", disable=not progress) as bar:
        for number, mask in enumerate(masks):
            rows, runs = mask.nonzero().squeeze(1), []
            for seed in seeds:
                losses = check_tensor("what train returns", train(rows, seed), finite=False).cpu().double()
                if losses.ndim != 1 or not len(losses) or not torch.isfinite(losses).all():
                    found = list(losses.shape)
                    raise ValueError(f"train must return finite losses [q], got {found} for subset {number}")
                runs.append(losses)
                bar.update()
            lengths = {len(losses) for losses in (*runs, *outcomes[:1])}
            if len(lengths) > 1:
                raise ValueError(
                    f"train must return as many losses each time, got {sorted(lengths)} at subset {number}"
                )
            outcomes.append(torch.stack(runs).mean(dim=0))
    return torch.stack(outcomes)


def linear_datamodeling_score(
    helpfulness: Tensor, masks: Tensor, outcomes: Tensor, *, num_bootstrap: int = 200, seed: int = 0
) -> DatamodelingScore:
    """LDS (Park et al. 2023, arXiv 2303.14186): does a sum of attributions rank what retraining does?

    For each query j, Spearman's correlation over the subsets S between the predicted loss, -sum of helpfulness_ij over
    i in S, and the loss of j after training on S.

    Args:
        helpfulness: [n, q], of a kernel's sign: K (that is, -BIF), or a baseline's similarity.
        masks: [S, n] bool.
        outcomes: [S, q] losses, from `retrain_on_subsets`.
        num_bootstrap: resamples of subsets and of queries for the standard error.

    Raises:
        ValueError: shapes that do not fit, non-finite numbers, or fewer than 3 subsets.
    """
    masks, seed = _check_masks(masks), check_seed(seed)
    helpfulness = check_tensor("helpfulness", helpfulness, ("n", "q")).cpu().double()
    outcomes = check_tensor("outcomes", outcomes, ("S", "q")).cpu().double()
    wanted = [masks.shape[1], outcomes.shape[-1]]
    if list(helpfulness.shape) != wanted or list(outcomes.shape) != [len(masks), wanted[1]] or len(masks) < 3:
        raise ValueError(
            "helpfulness must be [n, q], masks [S, n] and outcomes [S, q] with at least 3 subsets, got "
            f"{list(helpfulness.shape)}, {list(masks.shape)} and {list(outcomes.shape)}"
        )
    num_bootstrap = check_integer("num_bootstrap", num_bootstrap, 2, MOST_BOOTSTRAP)
    predicted, found = (-(masks.double() @ helpfulness)).numpy(), outcomes.numpy()
    per_query = _spearman(predicted, found)
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    means = []  # NaN of a resample of one subset only, which can happen where subsets are few
    for _ in range(num_bootstrap):
        rows, columns = rng.integers(0, len(masks), len(masks)), rng.integers(0, wanted[1], wanted[1])
        means.append(_mean(_spearman(predicted[rows][:, columns], found[rows][:, columns])))
    return DatamodelingScore(torch.from_numpy(per_query), _mean(per_query), float(np.nanstd(means, ddof=1)))


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each column of [S, q] arrays: [q]; NaN where a column is constant."""
    ranks = [stats.rankdata(x, axis=0) for x in (a, b)]
    x, y = (r - r.mean(axis=0) for r in ranks)
    size = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    return np.where(size > 0, (x * y).sum(axis=0) / np.where(size > 0, size, 1.0), np.nan)


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")


def _check_masks(masks: Tensor) -> Tensor:
    found = check_tensor("masks", masks, of="a real number").cpu()
    if found.ndim != 2 or found.dtype != torch.bool or 0 in found.shape:
        raise ValueError(f"masks must be [S, n] bool, got {found.dtype} of shape {list(found.shape)}")
    return found


def auroc(scores: Tensor, wrong: Tensor, *, num_bootstrap: int = 200, seed: int = 0) -> tuple[float, float]:
    """Area under the ROC curve of finding wrong labels by high scores, and its bootstrap standard error over samples.

    0.5 is chance. Needs scikit-learn.

    Args:
        scores: [N], higher where more suspicious.
        wrong: [N] bool, which labels were planted wrong.

    Raises:
        ValueError: shapes that do not fit, a score that is not finite, or only one kind of labels.
    """
    scores = check_tensor("scores", scores, finite=False).cpu()
    wrong = check_tensor("wrong", wrong, of="a flag").cpu()
    if scores.ndim != 1 or not len(scores) or scores.shape != wrong.shape or wrong.dtype != torch.bool:
        raise ValueError(f"scores and wrong (bool) must be [N], got {list(scores.shape)} and {list(wrong.shape)}")
    num_bootstrap, seed = check_integer("num_bootstrap", num_bootstrap, 2, MOST_BOOTSTRAP), check_seed(seed)
    if not torch.isfinite(scores).all():
        raise ValueError(f"scores must be finite, sample {int((~torch.isfinite(scores)).nonzero()[0])} is not")
    metrics = require("sklearn.metrics", "analysis", "an AUROC", package="scikit-learn")
    if bool(wrong.all()) or not bool(wrong.any()):
        raise ValueError(f"wrong must mark some samples and not others, got {int(wrong.sum())} of {len(wrong)}")
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    bad, good = scores[wrong].double().numpy(), scores[~wrong].double().numpy()
    truth = np.repeat([1, 0], [len(bad), len(good)])
    value = metrics.roc_auc_score(truth, np.concatenate([bad, good]))
    again = [
        metrics.roc_auc_score(truth, np.concatenate([rng.choice(bad, len(bad)), rng.choice(good, len(good))]))
        for _ in range(num_bootstrap)
    ]
    return float(value), float(np.std(again, ddof=1))


@dataclass(frozen=True)
class RandomisationCheck:
    """A kernel beside that of the same network before training: what training put into it.

    Were the entries alike and the purities equal, the kernel would show the architecture and the labels, not what was
    learnt (the sanity check of Adebayo et al. 2018, arXiv 1810.03292).
    """

    pearson: float  # of the correlations R_ij, i < j, of the two
    spearman: float
    purity_trained: float  # share of the k nearest neighbors of the same class
    purity_random: float
    purity_chance: float

    def __post_init__(self) -> None:
        check_record(self)


def randomisation_check(
    trained: Correlated, untrained: Correlated, labels: Tensor, *, k: int = 10, most: int = 2000, seed: int = 0
) -> RandomisationCheck:
    """Compare the kernel of a trained network with that of one with random weights, on the same samples.

    Args:
        labels: [N] integer.
        k: neighbors.
        most: samples between which entries are compared, chosen at random from `seed`; neighbors are of all.
    """
    for name, kernel in (("trained", trained), ("untrained", untrained)):
        check_instance(name, kernel, LossKernel, Baseline)
    labels, k = check_labels("labels", labels), check_integer("k", k, 1)
    most, seed = check_integer("most", most, 3), check_seed(seed)
    if not trained.num_samples == untrained.num_samples == len(labels):
        counts = f"{trained.num_samples}, {untrained.num_samples} and {len(labels)}"
        raise ValueError(f"trained, untrained and labels must be of the same samples, got {counts}")
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    n = trained.num_samples
    rows = torch.from_numpy(np.sort(rng.choice(n, min(n, most), replace=False)))
    upper = np.triu_indices(len(rows), 1)
    a, b = (kernel.correlation(rows, rows).double().numpy()[upper] for kernel in (trained, untrained))
    return RandomisationCheck(
        pearson=float(np.corrcoef(a, b)[0, 1]),
        spearman=float(stats.spearmanr(a, b).statistic),
        purity_trained=class_purity(trained.neighbors(k).index, labels),
        purity_random=class_purity(untrained.neighbors(k).index, labels),
        purity_chance=chance_purity(labels),
    )
