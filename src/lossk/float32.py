"""What a product of float32 is: float32, or TF32 where that is asked for; the caller's flags come back.

torch has three switches for it, of which one is on by default (`torch.backends.cudnn.allow_tf32`: convolutions on an
A100 or later keep 10 bits), and since 2.9 a second set of names for the same switches, which may not disagree.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from lossk.switch import Switch


def float32_products(*, tf32: bool = False) -> AbstractContextManager[None]:
    """Matrix products and convolutions of float32 in full precision, or in TF32, whatever the caller has set."""
    return PRODUCTS.at(tf32)


def _put(tf32: bool) -> None:
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    # A caller's setting for all of a library outlives the two lines above.
    _name(["tf32" if tf32 else "ieee" if each == "tf32" else each for each in _named()])


def _read() -> tuple[str, bool | None, list[str]]:
    return _matmul(), _convolutions(), _named()


def _back(before: tuple[str, bool | None, list[str]]) -> None:
    matmul, convolutions, named = before
    torch.set_float32_matmul_precision(matmul)
    if convolutions is not None:
        torch.backends.cudnn.allow_tf32 = convolutions
    _name(named)


def _matmul() -> str:
    """The older name's value, which cannot be read where the newer one's contradicts it, but follows from that."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "high"


def _convolutions() -> bool | None:
    """The older name's value; None where the caller has set another by the newer name, which then says it all."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return None


def _places() -> list[Any]:
    """Where the newer names are, if this torch has them."""
    found = (torch.backends.cuda.matmul, *(getattr(torch.backends.cudnn, name, None) for name in ("conv", "rnn")))
    return [place for place in found if hasattr(place, "fp32_precision")]


def _named() -> list[str]:
    return [place.fp32_precision for place in _places()]


def _name(values: list[str]) -> None:
    for place, value in zip(_places(), values, strict=True):
        if place.fp32_precision != value:
            place.fp32_precision = value


PRODUCTS = Switch(_read, _put, _back)
