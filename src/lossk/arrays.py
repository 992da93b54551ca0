"""A caller's numbers as a tensor, whatever torch's defaults are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def cpu_tensor(values: Any) -> Tensor:
    """The values in host memory, without a graph, in their own dtype; Python floats are float64, integers int64.

    `torch.as_tensor` would give Python floats the default dtype, and move everything to the default device.
    """
    if isinstance(values, Tensor):
        return values.detach().cpu()
    return torch.from_numpy(np.asarray(values))
