"""float32 is float32 within a call, whatever the caller has set for TF32, and the caller's flags come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.conftest import Classification, sgld
from tests.cuda_standin import StandIn
from torch import Tensor, nn

import lossk
from lossk.float32 import float32_products

NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def flags() -> dict[str, Any]:
    """Every switch by every name it has; a name that may not be read says so."""
    found: dict[str, Any] = {}
    older = {"matmul": torch.get_float32_matmul_precision, "cudnn": lambda: torch.backends.cudnn.allow_tf32}
    for name, read in older.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "set by its other name"
    if NEWER:
        places = {"mm": torch.backends.cuda.matmul, "conv": torch.backends.cudnn.conv, "rnn": torch.backends.cudnn.rnn}
        found |= {name: place.fp32_precision for name, place in places.items()}
    return found


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = flags()
    yield
    if NEWER:
        torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision(before["matmul"])
    torch.backends.cudnn.allow_tf32 = before["cudnn"]


def as_torch_begins() -> None: ...


def older_names() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True


def older_names_off() -> None:
    torch.backends.cudnn.allow_tf32 = False


def newer_names() -> None:
    if NEWER:
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"


def newer_names_off() -> None:
    if NEWER:
        torch.backends.cudnn.conv.fp32_precision = "ieee"


def newer_name_of_all() -> None:
    if NEWER:
        torch.backends.fp32_precision = "tf32"


CALLERS = [as_torch_begins, older_names, older_names_off, newer_names, newer_names_off, newer_name_of_all]


def tf32_of(seen: dict[str, Any]) -> set[bool]:
    """Whether any of the switches allows TF32."""
    allowed = {seen["cudnn"]} | {seen["matmul"] in ("high", "medium")}
    return allowed | {seen[name] == "tf32" for name in ("mm", "conv", "rnn") if name in seen}


@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.__name__)
@pytest.mark.parametrize("tf32", [False, True])
def test_the_switches_agree_within_and_come_back(caller: Callable[[], None], tf32: bool) -> None:
    caller()
    before = flags()

    def call() -> None:
        with float32_products(tf32=tf32):
            assert tf32_of(flags()) == {tf32}
            with float32_products():
                assert tf32_of(flags()) == {False}
            assert tf32_of(flags()) == {tf32}
            raise KeyError

    with pytest.raises(KeyError):
        call()
    assert flags() == before


@pytest.mark.parametrize(
    "caller", [as_torch_begins, older_names, newer_name_of_all], ids=lambda caller: caller.__name__
)
@pytest.mark.parametrize("precision", [None, "bf16", "tf32"])
def test_passes_of_a_run(problem: Classification, caller: Callable[[], None], precision: str | None) -> None:
    """At every call of the loss: after the user's own call, which is left as it is."""
    seen: list[dict[str, Any]] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(flags())
        if len(seen) == 30:
            raise RuntimeError("stopped by the test")
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    caller()
    before = flags()
    model = problem.model()
    settings = {"sampler": sgld(), "num_chains": 1, "num_draws": 4, "backend": "torch", "progress": False}
    with StandIn(), pytest.raises(RuntimeError, match="stopped by the test"):
        lossk.build_kernel(model, problem.data, loss=loss, device="cuda", precision=precision, **settings)
    ways = {frozenset(tf32_of(each)) for each in seen[-15:]}  # curvature is measured in full precision always
    assert frozenset({precision == "tf32"}) in ways
    assert ways <= {frozenset({False}), frozenset({precision == "tf32"})}
    assert flags() == before
