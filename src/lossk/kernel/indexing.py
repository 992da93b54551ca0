"""What a user may write between the brackets of `kernel[rows, columns]`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossk.checks import check_tensor, plain_scalar, shown


def rows_and_columns(key: Any) -> tuple[Any, Any]:
    """The two indices of `kernel[rows, columns]`, or of `kernel[rows]`, all columns.

    Raises:
        IndexError: three or more.
    """
    if not isinstance(key, tuple):
        return key, slice(None)
    if len(key) != 2:
        raise IndexError(f"an index must be [rows] or [rows, columns], got {len(key)} parts: {shown(key)}")
    return key


def is_integer(key: Any) -> bool:
    """A single integer, of Python, NumPy or torch; no flag, and no array of one dimension or more."""
    plain = plain_scalar(key)
    return hasattr(type(plain), "__index__") and not isinstance(plain, bool | Tensor | np.ndarray)


def resolve(key: Any, num_samples: int, name: str = "index") -> Tensor:
    """An integer, slice, list, range, integer tensor or array, or boolean mask as a 1-D int64 tensor within range.

    Args:
        name: of the argument, for errors.

    Raises:
        TypeError: something else, or entries that are neither integers nor flags.
        IndexError: out of range, not one-dimensional, or a mask of another length than num_samples.
    """
    if isinstance(key, slice):
        return _of_slice(key, num_samples, name)
    plain = plain_scalar(key)
    if is_integer(plain):
        key = [_within(name, int(plain.__index__()), num_samples)]
    several = isinstance(key, Tensor | list | tuple | range) or hasattr(type(key), "__array__")
    if not several or isinstance(plain, bool | float):
        raise TypeError(f"{name} must be integers, a mask or a slice, got {shown(key)}")
    if isinstance(key, list | tuple) and not len(key):
        return torch.empty(0, dtype=torch.int64, device="cpu")
    index = check_tensor(name, key, of="an integer or a flag")
    if index.ndim != 1:
        raise IndexError(f"{name} must be one-dimensional, got shape {list(index.shape)}")
    if index.dtype == torch.bool:
        if len(index) != num_samples:
            raise IndexError(f"{name}: a mask must have one entry per sample, {num_samples}, got {len(index)}")
        return index.nonzero().squeeze(1).cpu()
    wraps, index = index.dtype == torch.uint64, index.to("cpu", torch.int64)
    if wraps and (index < 0).any():  # beyond int64, where it would count from the end
        _within(name, int(index[index < 0][0]) + 2**64, num_samples)
    outside = (index < -num_samples) | (index >= num_samples)
    if outside.any():
        _within(name, int(index[outside][0]), num_samples)
    return torch.where(index < 0, index + num_samples, index)


def _within(name: str, number: int, num_samples: int) -> int:
    if not -num_samples <= number < num_samples:
        raise IndexError(f"{name}: index {number} is out of range for {num_samples} samples")
    return number


def _of_slice(key: slice, num_samples: int, name: str) -> Tensor:
    try:
        bounds = key.indices(num_samples)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} must be a slice of integers, with a step that is not 0, got {shown(key)}") from error
    return torch.from_numpy(np.arange(*bounds, dtype=np.int64))
