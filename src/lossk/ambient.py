"""What the caller's surroundings may not change: numbers are the same in autocast, inference mode and TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from lossk.float32 import float32_products
from lossk.switch import Switch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Products of float32 are float32: under a caller's autocast torch would take them in half precision.

    An autocast within (a model's own, say) casts weights anew: torch would keep those of the first cast until the
    outermost autocast ends, while the weights move.
    """
    with (
        torch.autocast("cpu", enabled=False, cache_enabled=False),
        torch.autocast("cuda", enabled=False, cache_enabled=False),
    ):
        yield


def without_trials() -> AbstractContextManager[Any]:
    """Where the caller has asked torch for deterministic algorithms, cuDNN does not choose among them by the clock."""
    return TRIALS.at(False) if torch.are_deterministic_algorithms_enabled() else nullcontext()


def _set_trials(wanted: bool) -> None:
    torch.backends.cudnn.benchmark = wanted


TRIALS = Switch(lambda: torch.backends.cudnn.benchmark, _set_trials, _set_trials)


@contextmanager
def usual_modes() -> Iterator[None]:
    """No autocast, no TF32, and gradients can be taken, within a caller's `no_grad` or `inference_mode` too."""
    with without_autocast(), float32_products(), without_trials(), torch.inference_mode(False), torch.enable_grad():
        yield
