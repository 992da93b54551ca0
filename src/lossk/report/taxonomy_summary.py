"""A kernel beside a taxonomy of its classes: class means, nearest neighbors, and a map colored by place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lossk.analysis import align, class_similarity, map_kernel
from lossk.analysis.alignment import Alignment
from lossk.analysis.class_matrix import Array
from lossk.analysis.taxonomy import Taxonomy
from lossk.analysis.wordnet import wordnet_with_words
from lossk.kernel.kernel import LossKernel
from lossk.kernel.neighbors import Neighbors
from lossk.report.taxonomy_picture import draw_taxonomy_map

FEWEST_CLASSES = 4
MANY_CLASSES = 100  # with more, each relabelling costs milliseconds and each replicate megabytes
MEASURES = ("wu_palmer", "path")


@dataclass(frozen=True)
class Classes:
    """The classes that a kernel's samples have, in a taxonomy."""

    taxonomy: Taxonomy
    labels: Tensor  # [N] int64, positions in the taxonomy's classes
    names: Sequence[str]  # [C]
    words: Mapping[str, str]  # of each node of the taxonomy


def wordnet_classes(labels: Tensor, class_names: Sequence[str], synsets: Sequence[str]) -> Classes:
    """Classes of labels [N] that are positions in `class_names` and in `synsets`, WordNet's nouns; absent ones left
    out. Needs lossk[analysis] and WordNet."""
    present, numbers = labels.unique(return_inverse=True)
    chosen = [synsets[i] for i in present.tolist()]
    taxonomy, words = wordnet_with_words(dict(zip(chosen, chosen, strict=True)))
    return Classes(taxonomy, numbers, [class_names[i] for i in present.tolist()], words)


def describe_taxonomy(kernel: LossKernel, classes: Classes, neighbors: Neighbors, seed: int = 0) -> str:
    """Alignment of the class means with the taxonomy, and how near in it the nearest neighbors are."""
    similarity = classes.taxonomy.similarity("wu_palmer")
    lines = [f"{len(classes.names):,} classes in WordNet.", *_of_neighbors(neighbors, classes, similarity)]
    if len(classes.names) < FEWEST_CLASSES:
        return "\n".join([*lines, f"Too few classes for an alignment with WordNet, which takes {FEWEST_CLASSES}."])
    alignment = aligned(kernel, classes, {"wu_palmer": similarity, "path": classes.taxonomy.similarity("path")}, seed)
    lines.append("Class means against WordNet (value ± standard errors; triplets: chance is 0.5):")
    for measure in MEASURES:
        for name in ("mean R", "mean |R|"):
            lines.append(f"  {measure:9s}  {name:9s} " + _statistics(alignment, name, measure))
    return "\n".join(lines)


def aligned(kernel: LossKernel, classes: Classes, references: dict[str, Array], seed: int = 0) -> Alignment:
    """`align` of mean R and mean |R|, with as many replicates and relabellings as the classes allow."""
    many = len(classes.names) > MANY_CLASSES
    found = class_similarity(kernel, classes.labels, classes.names, num_bootstrap=20 if many else 200, seed=seed)
    return align(
        {"mean R": found.signed, "mean |R|": found.absolute},
        references,
        num_permutations=199 if many else 9999,
        seed=seed,
    )


def _statistics(alignment: Alignment, name: str, measure: str) -> str:
    parts = []
    for statistic in ("spearman", "triplets"):
        row = alignment.row(name, measure, statistic)
        both = (("images", row.image_error), ("chains", row.chain_error))
        errors = [f"{error:.3f} ({over})" for over, error in both if np.isfinite(error)]
        p = f" (p = {row.p:.3f})" if np.isfinite(row.p) else ""
        parts.append(f"{statistic} {row.value:+.3f}" + (f" ± {', '.join(errors)}" if errors else "") + p)
    return "   ".join(parts)


def _of_neighbors(neighbors: Neighbors, classes: Classes, similarity: Array) -> list[str]:
    """Mean similarity of a sample's class to those of its neighbors, beside that to those of all others."""
    labels = classes.labels
    there = neighbors.index >= 0
    near = torch.from_numpy(similarity)[labels.unsqueeze(1), labels[neighbors.index.clamp(min=0)]]
    counts = torch.bincount(labels, minlength=len(classes.names)).double()
    others = torch.from_numpy(similarity) @ counts - 1.0  # of each class's sample: to all samples but itself
    chance = float((others[labels] / (len(labels) - 1)).mean())
    k = neighbors.index.shape[1]
    return [
        f"Of each sample's {k} nearest neighbors, the class's Wu-Palmer similarity to its own is "
        f"{float(near[there].mean()):.3f} on average (of any other sample's: {chance:.3f})."
    ]


def write_taxonomy_map(kernel: LossKernel, classes: Classes, path: Path, title: str) -> None:
    """The UMAP of a kernel, colored by the place of each sample's class."""
    drawn = map_kernel(kernel)
    draw_taxonomy_map(drawn, classes.labels.numpy(), classes.taxonomy, classes.words, path, title=title)
