"""What the analyses are given, checked: kernels, labels, class names, matrices, random seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossk.checks import check_integer, check_mapping, check_strings, check_tensor, shown, wrong_kind, wrong_value
from lossk.kernel.kernel import LossKernel
from lossk.kernel.neighbors import Neighbors
from lossk.kernel.traces import LossTraces

MOST_SEED = 2**32 - 1  # of NumPy's and UMAP's generators


def check_kernel(name: str, value: Any) -> LossKernel:
    """A LossKernel."""
    if not isinstance(value, LossKernel):
        raise wrong_kind(name, "a lossk.LossKernel", value)
    return value


def check_traces(name: str, value: Any) -> LossTraces:
    """LossTraces."""
    if not isinstance(value, LossTraces):
        raise wrong_kind(name, "a lossk.LossTraces", value)
    return value


def check_neighbors(name: str, value: Any, num_samples: int, k: int) -> Neighbors:
    """Neighbors of all samples, at least k of each."""
    if not isinstance(value, Neighbors):
        raise wrong_kind(name, "what kernel.neighbors(k) returns", value)
    rows, given = value.index.shape
    if rows != num_samples or given < k:
        raise ValueError(f"{name} must be of all {num_samples} samples, at least {k} of each, got {rows} of {given}")
    return value


def check_seed(seed: Any) -> int:
    """An integer from 0 to 2^32 - 1."""
    return check_integer("seed", seed, 0, ceiling=MOST_SEED)


def check_labels(name: str, value: Any, num_samples: int | None = None) -> Tensor:
    """[N] int64 of whole numbers, on the CPU."""
    found = check_tensor(name, value, of="a real number", finite=False)
    length = "N" if num_samples is None else str(num_samples)
    if found.ndim != 1 or not len(found) or (num_samples is not None and len(found) != num_samples):
        raise ValueError(f"{name} must be [{length}], got {list(found.shape)}")
    if found.is_floating_point() or found.dtype == torch.bool:
        raise ValueError(f"{name} must be integers [{length}], got {found.dtype} {list(found.shape)}")
    return found.cpu().to(torch.int64)


def check_classes(labels: Any, num_samples: int, count: int, of: str) -> Tensor:
    """Labels [N] int64 from 0 to `count` - 1, of the samples of the argument `of`."""
    given = check_tensor("labels", labels, of="a real number", finite=False)
    if given.ndim == 1 and len(given) != num_samples:
        raise ValueError(f"labels must be [{num_samples}], got [{len(given)}] (a sample of {of} each)")
    found = check_labels("labels", labels)
    if not (int(found.min()) >= 0 and int(found.max()) < count):
        found_range = f"{int(found.min())} to {int(found.max())} ({count} class_names)"
        raise ValueError(f"labels must be from 0 to {count - 1}, got {found_range}")
    return found


def check_index(name: str, value: Any, most: int) -> Tensor:
    """Neighbors [N, k] int64 from -1, which stands for none, to `most`."""
    found = check_tensor(name, value, ("N", "k"), of="an integer", at_least=0).to(torch.int64)
    if found.numel() and not (int(found.min()) >= -1 and int(found.max()) <= most):
        raise ValueError(f"{name} must be from -1 to N - 1 = {most}, got {int(found.min())} to {int(found.max())}")
    return found


def check_names(name: str, value: Any, count: int | None = None) -> tuple[str, ...]:
    """Texts, one for each class."""
    found = check_strings(name, value, "class names")
    if count is not None and len(found) != count:
        raise wrong_value(name, f"{count} class names", value)
    return found


def check_square(name: str, value: Any, *, least: int = 1, finite: bool = False) -> NDArray[np.float64]:
    """A matrix [C, C] float64 of numbers, C at least `least`."""
    found = check_tensor(name, value, ("C", "C"), finite=finite).cpu().double().numpy()
    if found.shape[0] != found.shape[1] or len(found) < least:
        raise ValueError(f"{name} must be [C, C], C at least {least}, got shape {list(found.shape)}")
    return found


def check_named(name: str, value: Any) -> Mapping[str, Any]:
    """A dict of at least one entry, whose keys are texts."""
    found = check_mapping(name, value)
    if not found:
        raise ValueError(f"{name} must not be empty, got {shown(value)}")
    return found


def check_list(name: str, value: Any, what: str) -> Sequence[Any]:
    """A list or a tuple."""
    if not isinstance(value, list | tuple):
        raise wrong_kind(name, f"a list of {what}", value)
    return value
