"""How models are put together: containers, shared and tied parts, raw parameters, buffers, caches, own state."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinds import Kind, check

N, CLASSES = 12, 3


def vectors() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 6), torch.arange(N) % CLASSES


def pairs() -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Two inputs of a model, [N, 6] each, as positional arguments."""
    return (torch.randn(N, 6), torch.randn(N, 6)), torch.arange(N) % CLASSES


class Lists(nn.Module):
    """ModuleList, ModuleDict, ParameterList and ParameterDict, one parameter in two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.heads = nn.ModuleDict({"main": nn.Linear(6, CLASSES), "spare": nn.Linear(6, CLASSES)})
        self.gains = nn.ParameterList([nn.Parameter(torch.ones(6)), nn.Parameter(torch.full((6,), 0.5))])
        self.shifts = nn.ParameterDict({"first": nn.Parameter(torch.zeros(6)), "again": self.gains[0]})

    def forward(self, x: Tensor) -> Tensor:
        for layer, gain in zip(self.layers, self.gains, strict=True):
            x = torch.tanh(layer(x)) * gain + self.shifts["first"]
        return self.heads["main"](x * self.shifts["again"])


class CalledTwice(nn.Module):
    """One submodule under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.same, self.head = self.body, nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.same(self.body(x)))


class TiedBackwards(nn.Module):
    """A decoder that is its encoder's weight transposed, and a head that is tied to another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.first, self.head = nn.Linear(6, 4, bias=False), nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)
        self.head.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.tanh(self.encoder(x)) @ self.encoder.weight
        return self.head(inner) + 0.5 * self.first(x)


class Raw(nn.Module):
    """Parameters of its own and functions of torch, no layer; one of them zero-dimensional, one transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6).t())
        self.head = nn.Parameter(torch.randn(CLASSES, 8))
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * F.linear(torch.tanh(x @ self.weight), self.head)


class Spectrum(nn.Module):
    """Complex and integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("wave", torch.exp(1j * torch.arange(4.0)))
        self.register_buffer("order", torch.tensor([3, 1, 0, 2]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.fft.rfft(x)[:, self.order] * self.wave.to(torch.complex64)
        return self.head(torch.view_as_real(found).flatten(1).to(self.head.weight.dtype))


class ExtraState(nn.Linear):
    """What is not a tensor goes into `state_dict` as extra state."""

    version = 3

    def get_extra_state(self) -> dict[str, int]:
        return {"version": self.version}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.version = state["version"]


class Experts(nn.Module):
    """A router that sends each sample to one of its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList([nn.Linear(6, CLASSES) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        gate = self.router(x).softmax(dim=1)
        return torch.stack([expert(x) for expert in self.experts], dim=1).mul(gate[..., None]).sum(dim=1)


class Bilinear(nn.Module):
    """Two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Bilinear(6, 6, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.both(left, right)


def lazy() -> nn.Module:
    """Lazy layers after their first forward pass."""
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(CLASSES))
    model(torch.randn(4, 6))
    return model


def frozen_body() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def without_modes() -> nn.Module:
    """Part of it is in eval mode already."""
    norm = nn.BatchNorm1d(8)
    norm.train = lambda mode=True: norm  # type: ignore[method-assign,assignment]
    norm.training = False
    return nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Linear(8, CLASSES))


MODULES = {
    "module-and-parameter-lists": Kind(Lists, vectors),
    "submodule-called-twice": Kind(CalledTwice, vectors),
    "tied-weights": Kind(TiedBackwards, vectors),
    "raw-parameters": Kind(Raw, vectors),
    "complex-and-integer-buffers": Kind(Spectrum, vectors, exact=torch.float32),
    "extra-state": Kind(lambda: nn.Sequential(ExtraState(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)), vectors),
    "mixture-of-experts": Kind(Experts, vectors),
    "two-inputs": Kind(Bilinear, pairs),
    "lazy-layers-after-a-pass": Kind(lazy, vectors),
    "partly-frozen": Kind(frozen_body, vectors),
    "norm-that-refuses-train": Kind(without_modes, vectors),
}


@pytest.mark.parametrize("kind", MODULES)
def test_modules(kind: str) -> None:
    check(MODULES[kind])


@dataclass
class Output:
    """What transformers' models return, in short: logits and what belongs to them."""

    logits: Tensor
    hidden: Tensor | None = None


Named = namedtuple("Named", ["logits", "hidden"])


class Returns(nn.Module):
    """A network whose outputs come in some wrapping."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.body, self.head = form, nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.body(x))
        logits = self.head(hidden)
        wrap = {
            "tuple": lambda: (logits, hidden),
            "dict": lambda: {"logits": logits, "hidden": hidden},
            "object": lambda: Output(logits, hidden),
            "named": lambda: Named(logits, hidden),
        }
        return wrap[self.form]()


def of_first(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0])[0], batch[1], reduction="none")


def of_key(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0])["logits"], batch[1], reduction="none")


RETURNS = {
    "returns-a-tuple": Kind(lambda: Returns("tuple"), vectors, of_first, of_first),
    "returns-a-dictionary": Kind(lambda: Returns("dict"), vectors, of_key, of_key),
    "returns-an-object-with-logits": Kind(lambda: Returns("object"), vectors),
    "returns-a-named-tuple": Kind(lambda: Returns("named"), vectors),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_returns(kind: str) -> None:
    check(RETURNS[kind])
