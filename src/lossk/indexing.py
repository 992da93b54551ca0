"""What a user may write between the brackets of `kernel[rows, columns]`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossk.arrays import cpu_tensor


def resolve(key: Any, num_samples: int) -> Tensor:
    """An integer, slice, list, range, integer tensor or array, or boolean mask as a 1-D int64 tensor within range.

    Raises:
        IndexError: out of range, not one-dimensional, not integers, or a mask of another length than num_samples.
    """
    if isinstance(key, slice):
        return torch.arange(*key.indices(num_samples), device="cpu")
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        key = [int(key)]
    if isinstance(key, list | tuple | range):
        key = np.asarray(key) if len(key) else np.empty(0, dtype=np.int64)
    index = cpu_tensor(key)
    if index.ndim != 1:
        raise IndexError(f"an index must be one-dimensional, got shape {list(index.shape)}")
    if index.dtype == torch.bool:
        if len(index) != num_samples:
            raise IndexError(f"a mask must have one entry per sample, {num_samples}, got {len(index)}")
        return index.nonzero().squeeze(1)
    if index.is_floating_point() or index.is_complex():
        raise IndexError(f"an index must be integers, a mask or a slice, got {index.dtype}")
    index = index.long()
    outside = (index < -num_samples) | (index >= num_samples)
    if outside.any():
        raise IndexError(f"index {int(index[outside][0])} is out of range for {num_samples} samples")
    return torch.where(index < 0, index + num_samples, index)
