"""What comes with a kernel's or with traces' columns: tokens, sets, the draws' excess, diagnostics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossk.checks import check_instance, check_mapping, check_tensor, plain_scalar, shown
from lossk.diagnostics.diagnostics import Diagnostics


def check_diagnostics(diagnostics: Any) -> Diagnostics | None:
    """Those of a run, or None."""
    return None if diagnostics is None else check_instance("diagnostics", diagnostics, Diagnostics)


def check_excess(excess: Any, num_chains: int, num_draws: int) -> Tensor | None:
    """[C, T] rise of the training loss; NaN where a draw's is not known."""
    if excess is None:
        return None
    return check_tensor("excess", excess, (num_chains, num_draws), finite=False).cpu()


def check_tokens(tokens: Any, num_samples: int) -> Tensor | None:
    """[N, 2] int64, (sample, position) of each column."""
    if tokens is None:
        return None
    given = check_tensor("tokens", tokens, of="a real number")
    if list(given.shape) != [num_samples, 2] or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(
            f"tokens must be integers of shape [{num_samples}, 2], (sample, position) of each column, "
            f"got {given.dtype} of shape {list(given.shape)}"
        )
    return given.to("cpu", torch.int64)


def check_sets(sets: Any, num_samples: int) -> dict[str, slice]:
    """Slices of the columns by name, their bounds plain integers."""
    if sets is None:
        return {}
    plain = {}
    for name, columns in check_mapping("sets", sets).items():
        bounds = [plain_scalar(end) for end in (columns.start, columns.stop)] if isinstance(columns, slice) else []
        whole = len(bounds) == 2 and all(isinstance(end, int) and not isinstance(end, bool) for end in bounds)
        if not whole or columns.step is not None or not 0 <= bounds[0] < bounds[1] <= num_samples:
            raise ValueError(f"sets: {name!r} must be a slice of the {num_samples} columns, got {shown(columns)}")
        start, stop = bounds
        plain[name] = slice(start, stop)
    return plain
