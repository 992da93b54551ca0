"""Losses at w* on a few fixed samples: what tells a run from one with another loss, or another model of like weights.

A loss is saved by its name and a model by its weights, and neither says all: a closure with another smoothing has the
same name, a network with another activation the same weights. Their losses at w* are not the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lossk.errors import StoreError

WITNESS = "losses_at_start"  # its key in a saved request


def differences(saved: Mapping[str, Any], request: Mapping[str, Any]) -> list[str]:
    """How a saved request differs from this one, for people; nothing where they are the same."""
    changed = [
        f"{key}: saved {saved.get(key)!r}, now {value!r}"
        for key, value in request.items()
        if key != WITNESS and saved.get(key) != value
    ]
    return changed + losses_apart(saved, request)


def losses_apart(saved: Mapping[str, Any], request: Mapping[str, Any]) -> list[str]:
    """`differences` of the losses alone: those that differ by more than rounding."""
    before, now = saved.get(WITNESS), request.get(WITNESS)
    if before is None or now is None:  # saved before losses were
        return []
    allowed = before["allowed"] + now["allowed"]
    found = (
        _difference(name, before["losses"].get(name, []), losses, allowed) for name, losses in now["losses"].items()
    )
    return [text for text in found if text is not None]


def check_start(saved: float | None, mean: float, allowed: float) -> None:
    """Raise StoreError unless the mean training loss at w* is that of the run that is resumed, where it is known."""
    if saved is not None and not abs(saved - mean) <= allowed + 1e-6 * abs(saved):
        raise StoreError(
            f"the run that is resumed had mean training loss {saved!r} at the trained weights, and this one has "
            f"{mean!r}: the loss or the model is another one"
        )


def _difference(name: str, before: list[float], now: list[float], allowed: float) -> str | None:
    if len(before) != len(now):
        return f"losses of {name} at the trained weights: {len(before)} saved, now {len(now)}"
    off = [i for i, (a, b) in enumerate(zip(before, now, strict=True)) if not abs(a - b) <= allowed]
    if not off:
        return None
    return (
        f"losses of {name} at the trained weights: {len(off)} of {len(now)} differ, saved {before[off[0]]!r}, "
        f"now {now[off[0]]!r}: the loss or the model is another one"
    )
