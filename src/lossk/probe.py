"""The probe: the losses of all N samples at the present weights."""

from __future__ import annotations

import torch
from torch import Tensor

from lossk.data import Samples
from lossk.task import Task

# One fixed size: the last bits of a matrix product can depend on the batch size, and runs must repeat bitwise.
PROBE_BATCH = 256


def probe_losses(task: Task, samples: Samples, out: Tensor) -> None:
    """Write the loss of every sample at `task.flat` into `out`.

    Args:
        out: [N] float32, nats; typically a row of the panel.
    """
    for start in range(0, len(samples), PROBE_BATCH):
        stop = min(start + PROBE_BATCH, len(samples))
        out[start:stop] = task.losses(samples[start:stop])


def first_non_finite(losses: Tensor) -> int | None:
    """The index of the first NaN or infinity of a vector, or None."""
    bad = (~torch.isfinite(losses)).nonzero()
    return int(bad[0]) if bad.numel() else None
