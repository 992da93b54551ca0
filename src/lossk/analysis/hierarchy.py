"""How classes lie to one another in a kernel: mean correlations between classes, and their dendrogram."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lossk.analysis.class_matrix import Array, ClassMatrix
from lossk.analysis.inputs import check_classes, check_names, check_seed, check_square
from lossk.analysis.pairs import Kernel, KernelPairs, Pairs, as_pairs, blocks, spans_of
from lossk.checks import check_choice, check_flag, check_integer
from lossk.kernel.chains import has_chains, leave_one_chain_out
from lossk.kernel.kernel import LossKernel
from lossk.kernel.read_memory import MOST_GROUPS, check_class_means
from lossk.records import check_record

METHODS = ("average", "complete", "single", "weighted", "centroid", "median", "ward")  # of SciPy's linkage
MOST_BOOTSTRAP = 10**5  # replicates, each [C, C] float64


@dataclass(frozen=True)
class ClassSimilarity:
    """Means over the pairs of different live samples, one of each class (both of it, on the diagonal)."""

    class_names: tuple[str, ...]
    signed: ClassMatrix  # mean R; NaN on the diagonal of a class of one
    absolute: ClassMatrix  # mean |R|: what two classes share, whichever way it moves
    counts: Array  # [C] live samples

    def __post_init__(self) -> None:
        check_record(self)

    @property
    def matrix(self) -> Array:
        """Mean R, [C, C] float64."""
        return self.signed.matrix


@dataclass(frozen=True)
class Dendrogram:
    """Agglomerative clustering of classes (SciPy's)."""

    class_names: tuple[str, ...]
    linkage: Array  # [C - 1, 4], as scipy.cluster.hierarchy.dendrogram takes it
    cophenetic: Array  # [C, C]: the height at which two classes are first together
    cophenetic_correlation: float  # of these with the distances: how far a tree is a fair picture

    def __post_init__(self) -> None:
        check_record(self)

    def cut(self, num_parts: int) -> np.ndarray:
        """The part, from 0, of each class when the tree is cut into that many: [C] int."""
        from scipy.cluster.hierarchy import fcluster

        num_parts = check_integer("num_parts", num_parts, 1)
        return fcluster(self.linkage, num_parts, criterion="maxclust") - 1


def class_similarity(
    source: Kernel | Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    class_names: Sequence[str],
    *,
    num_bootstrap: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> ClassSimilarity:
    """Mean R and mean |R| between classes, streamed over tiles; the diagonal pairs (i, i) and dead samples left out.

    Time: one pass over the N^2 / 2 pairs, and one more per chain of a kernel in factor form. Memory: a tile in float64
    and [1000, 1000] sums.

    Standard errors. Over images: a bootstrap within each class; where there are more than 1000 images, of groups of
    images, so that sums between groups suffice. Over chains: the jackknife, of a kernel whose form knows its chains
    (`LossKernel.from_traces`); None of one in tiles.

    Args:
        source: a kernel; or a symmetric [N, N] similarity or [N, d] features, whose correlations are cosines.
        labels: [N] integers from 0 to C - 1.
        class_names: [C].

    Raises:
        ValueError: labels of another length or out of range.
        MemoryError: more than the memory now available.
    """
    num_bootstrap, seed = check_integer("num_bootstrap", num_bootstrap, 0, MOST_BOOTSTRAP), check_seed(seed)
    class_names, progress = check_names("class_names", class_names), check_flag("progress", progress)
    pairs, count = as_pairs("source", source), len(class_names)
    labels = check_classes(labels, pairs.num_samples, count, "source")
    check_class_means(pairs.num_samples, pairs.side, count, num_bootstrap)
    live = labels.masked_fill(pairs.dead, -1)
    group, per_class = _grouped(live, count, seed)
    signed, absolute = pair_sums(pairs, group, count * per_class, progress=progress)
    sizes = torch.bincount(group[group >= 0], minlength=count * per_class).double()
    number = torch.outer(sizes, sizes) - torch.diag(sizes)
    draws = _resampled(sizes.reshape(count, per_class) > 0, num_bootstrap, seed)
    chains = _chains(source, live, count, progress)
    enough = num_bootstrap > 1 and per_class > 1

    def matrix(sums: Tensor, which: int) -> ClassMatrix:
        replicates = _replicates(sums, number, draws) if enough else None
        return ClassMatrix(
            _means(sums, number, count), replicates, per_class, None if chains is None else chains[:, which]
        )

    live_counts = sizes.reshape(count, per_class).sum(dim=1).numpy()
    return ClassSimilarity(class_names, matrix(signed, 0), matrix(absolute, 1), live_counts)


def pair_sums(pairs: Pairs, group: Tensor, num_groups: int, *, progress: bool = False) -> tuple[Tensor, Tensor]:
    """Sums of R and of |R| over ordered pairs of different samples of two groups: [groups, groups] float64 each.

    Args:
        group: [N] int64; -1 leaves a sample out.
    """
    place = group.masked_fill(group < 0, num_groups)  # one more group, thrown away at the end
    sums = torch.zeros(2, num_groups + 1, num_groups + 1, dtype=torch.float64, device="cpu")
    parts = list(blocks(spans_of(pairs)))
    for rows, columns in tqdm(parts, desc="class means", unit="tile", disable=not progress):
        block = pairs.correlation(rows, columns)
        if rows == columns:
            block.fill_diagonal_(0.0)
        for out in sums:
            by_row = block.new_zeros(num_groups + 1, block.shape[1]).index_add_(0, place[rows], block)
            both = torch.zeros_like(out).index_add_(0, place[columns], by_row.T.contiguous())
            out += both if rows == columns else both + both.T
            block.abs_()
    sums = (sums + sums.transpose(1, 2)) / 2  # a diagonal tile is symmetric only up to rounding
    return sums[0, :num_groups, :num_groups], sums[1, :num_groups, :num_groups]


def _grouped(live: Tensor, count: int, seed: int) -> tuple[Tensor, int]:
    """[N] group of each sample, class * per_class + a random one of the class's; -1 where live is, and per_class."""
    largest = int(torch.bincount(live[live >= 0], minlength=count).max()) if (live >= 0).any() else 1
    per_class = max(1, min(largest, max(2, MOST_GROUPS // max(count, 1))))
    group = torch.full_like(live, -1)
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    for label in range(count):
        members = (live == label).nonzero().squeeze(1)
        order = torch.from_numpy(rng.permutation(len(members)))
        group[members[order]] = label * per_class + torch.arange(len(members), device="cpu") % per_class
    return group, per_class


def _resampled(exists: Tensor, num_bootstrap: int, seed: int) -> Tensor:
    """How often each group is drawn, class by class and as often as the class has groups: [B, C, groups] float64."""
    rng = np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=(1,)))
    draws = torch.zeros(num_bootstrap, *exists.shape, dtype=torch.float64, device="cpu")
    for label, mine in enumerate(exists):
        groups = int(mine.sum())
        if groups:
            drawn = rng.multinomial(groups, np.full(groups, 1 / groups), size=num_bootstrap)
            draws[:, label, :groups] = torch.from_numpy(drawn).double()  # existing groups come first
    return draws


def _means(sums: Tensor, number: Tensor, count: int) -> Array:
    """[C, C] means from sums and numbers of pairs between groups."""
    ones = torch.ones(count, len(sums) // count, dtype=torch.float64, device="cpu")
    return _weighted_means(sums, number, ones)


def _weighted_means(sums: Tensor, number: Tensor, weights: Tensor) -> Array:
    """[C, C] means, the pairs of groups g and h counted weights_g weights_h times; NaN where there is no pair.

    Args:
        weights: [C, groups of a class] float64.
    """
    count, per_class = weights.shape

    def between_classes(of: Tensor) -> Tensor:
        by_row = torch.bmm(weights.unsqueeze(1), of.reshape(count, per_class, -1)).reshape(count, count, per_class)
        return torch.einsum("abh,bh->ab", by_row, weights)

    total, pairs = between_classes(sums), between_classes(number)
    return torch.where(pairs > 0, total / pairs, float("nan")).numpy()


def _replicates(sums: Tensor, number: Tensor, draws: Tensor) -> Array:
    """[B, C, C]. A group drawn twice counts its inner pairs four times, but no image is paired with itself."""
    out = np.empty((len(draws), draws.shape[1], draws.shape[1]))
    for replicate, weights in zip(out, draws, strict=True):
        replicate[:] = _weighted_means(sums, number, weights)
    return out


def _chains(source: object, live: Tensor, count: int, progress: bool) -> Array | None:
    """[chains, 2, C, C]: mean R and |R| with each chain left out."""
    if not isinstance(source, LossKernel) or not has_chains(source):
        return None
    sizes = torch.bincount(live[live >= 0], minlength=count).double()
    number = torch.outer(sizes, sizes) - torch.diag(sizes)
    found = []
    for kernel in leave_one_chain_out(source):
        sums = pair_sums(KernelPairs(kernel), live, count, progress=progress)
        found.append(np.stack([_means(part, number, count) for part in sums]))
    return np.stack(found)


def dendrogram(similarity: ClassMatrix | Array, class_names: Sequence[str], *, method: str = "average") -> Dendrogram:
    """Cluster classes by d = sqrt(2 (1 - s)): of mean R, the root mean square distance of their samples.

    Args:
        similarity: [C, C], at most 1 off the diagonal; the diagonal is not used.
        method: of scipy.cluster.hierarchy.linkage: one of `METHODS`
    """
    from scipy.cluster.hierarchy import cophenet, linkage
    from scipy.spatial.distance import squareform

    matrix = check_square("similarity", similarity.matrix if isinstance(similarity, ClassMatrix) else similarity)
    class_names, method = check_names("class_names", class_names), check_choice("method", method, METHODS)
    count = len(class_names)
    if matrix.shape != (count, count) or count < 3:
        raise ValueError(
            f"similarity and class_names must be of the same classes, at least 3, got {len(matrix)} and {count}"
        )
    upper = matrix[np.triu_indices(count, 1)]
    if not np.isfinite(upper).all() or upper.max() > 1 + 1e-9:
        raise ValueError("similarity must be finite and at most 1 off the diagonal")
    distance = np.sqrt(2.0 * np.clip(1.0 - upper, 0.0, None))
    tree = linkage(distance, method)
    heights = cophenet(tree)
    varies = np.ptp(heights) > 0 and np.ptp(distance) > 0
    correlation = float(np.corrcoef(heights, distance)[0, 1]) if varies else float("nan")
    return Dendrogram(class_names, tree, squareform(heights), correlation)
