"""Class purity: do a sample's nearest neighbors share its label, and how often would they by chance?"""

from __future__ import annotations

import torch
from torch import Tensor

from lossk.analysis.inputs import check_index, check_labels
from lossk.checks import check_integer, check_tensor


def class_purity(index: Tensor, labels: Tensor) -> float:
    """Mean share of each sample's k neighbors that carry its label, in [0, 1]; `neighbor_purity` averaged."""
    return neighbor_purity(index, labels).mean().item()


def neighbor_purity(index: Tensor, labels: Tensor) -> Tensor:
    """Share of each sample's k neighbors that carry its label: [N] float64.

    Args:
        index: [N, k] integer, as `kernel.neighbors(k).index`; -1 stands for no neighbor and counts as another class,
            so that samples without neighbors lower the purity instead of vanishing from it.
        labels: [N] integer.
    """
    labels = check_labels("labels", labels)
    index = check_tensor("index", index, of="an integer").cpu()
    if index.ndim != 2 or len(index) != len(labels):
        raise ValueError(
            f"index must be [N, k] and labels [N], got shapes {list(index.shape)} and {list(labels.shape)}"
        )
    index = check_index("index", index, len(labels) - 1)
    same = (labels[index.clamp(min=0)] == labels.unsqueeze(1)) & (index >= 0)
    return same.double().mean(dim=1)


def chance_purity(labels: Tensor) -> float:
    """Expected share of same-label samples among random other samples: sum_c n_c (n_c - 1) / (N (N - 1))."""
    labels = check_labels("labels", labels)
    if len(labels) < 2:
        raise ValueError(f"labels must be [N] with N at least 2, got shape {list(labels.shape)}")
    counts = torch.unique(labels, return_counts=True)[1].double()
    return float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))


def raw_neighbors(images: Tensor, k: int) -> Tensor:
    """The k nearest other samples by Euclidean distance of raw inputs: [N, k] int64. Needs scikit-learn."""
    from sklearn.neighbors import NearestNeighbors

    flat = check_tensor("images", images).cpu()
    if flat.ndim < 2 or 0 in flat.shape:
        raise ValueError(f"images must be [N, ...], at least one number each, got shape {list(flat.shape)}")
    rows = flat.reshape(len(flat), -1).numpy()
    k = check_integer("k", k, 1)
    if k >= len(flat):
        raise ValueError(f"k must be from 1 to N - 1 = {len(flat) - 1}, got {k}")
    # Without an argument kneighbors leaves each sample itself out, also where several inputs are identical.
    found = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(rows).kneighbors(return_distance=False)
    return torch.from_numpy(found).long()
