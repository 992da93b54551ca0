"""`kernel_from_weights` takes states of weights as people have them, and names what does not fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lossk
from lossk.interop.posteriors import kernel_from_weights

DATA = (torch.randn(12, 3, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 2)


class Scaled(nn.Module):
    """A layer with extra state of its own, as those of float8 libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.history: Any = {"amax": [1.0]}

    def get_extra_state(self) -> Any:
        return self.history

    def set_extra_state(self, state: Any) -> None:
        self.history = state

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Network(nn.Module):
    """Batch norm, extra state, tied weights, and a buffer that holds infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.scaled = nn.Linear(3, 4), nn.BatchNorm1d(4), Scaled()
        self.left, self.right, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        self.right.weight = self.left.weight
        self.register_buffer("mask", torch.tensor([0.0, -float("inf"), 0.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.scaled(self.norm(self.first(x))).tanh()
        return self.head(self.right(self.left(x)) * self.mask.exp())


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Network().eval()


def draws(model: nn.Module, count: int = 4, seed: int = 0) -> list[OrderedDict[str, Any]]:
    """Plain state dicts around the model's, extra state included, tied weights twice."""
    generator, states = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        state = OrderedDict(model.state_dict())
        for name, _ in model.named_parameters():
            state[name] = state[name] + 0.1 * torch.randn(state[name].shape, generator=generator)
        states.append(state | {"right.weight": state["left.weight"]})
    return states


def each(change: Callable[[str, Any], tuple[str, Any]]) -> Callable[[dict[str, Any]], Any]:
    return lambda state: dict(change(name, value) for name, value in state.items())


def numbers(change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], Any]:
    return each(lambda name, value: (name, change(value) if isinstance(value, Tensor) else value))


def inference(state: dict[str, Any]) -> Any:
    with torch.inference_mode():
        return numbers(torch.clone)(state)


class ArrayLike:
    """As of another library: no tensor, but NumPy can read it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.numpy()

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.value if dtype is None else self.value.astype(dtype)


FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "without extra state": lambda state: {k: v for k, v in state.items() if "extra" not in k},
    "other extra state": lambda state: state | {"scaled._extra_state": b"anything"},
    "arrays": numbers(lambda t: t.numpy()),
    "array-likes": numbers(ArrayLike),
    "lists": numbers(lambda t: t.tolist()),
    "float64": numbers(lambda t: t.double()),
    "sparse": numbers(lambda t: t.to_sparse() if t.ndim == 2 else t),
    "parameters": numbers(lambda t: nn.Parameter(t) if t.is_floating_point() else t),
    "inference tensors": inference,
    "strided otherwise": numbers(lambda t: t.T.contiguous().T if t.ndim == 2 else t),
    "DDP": each(lambda name, value: (f"module.{name}", value)),
    "compiled": each(lambda name, value: (f"_orig_mod.{name}", value)),
    "compiled within DDP": each(lambda name, value: (f"module._orig_mod.{name}", value)),
    "a compiled part": each(lambda name, value: (name.replace("first.", "first._orig_mod."), value)),
    "tied once": lambda state: {k: v for k, v in state.items() if k != "right.weight"},
    "tied by the other name": lambda state: {k: v for k, v in state.items() if k != "left.weight"},
    "without buffers": lambda state: {k: v for k, v in state.items() if "running" not in k and k != "mask"},
    "flat array": lambda state: np.concatenate(
        [state[name].numpy().ravel() for name, _ in Network().named_parameters()]
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_a_state_is_the_same_weights(form: str, model: nn.Module) -> None:
    plain = draws(model)
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    wanted = kernel_from_weights(plain, model, DATA, progress=False)
    found = kernel_from_weights([FORMS[form](state) for state in plain], model, DATA, progress=False)
    np.testing.assert_array_equal(found.to_numpy(), wanted.to_numpy())
    assert float(wanted.variance.min()) > 0
    assert model.scaled.history == {"amax": [1.0]}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)


def test_the_kernel_is_that_of_the_losses(model: nn.Module) -> None:
    rows = []
    for state in draws(model):
        other = Network().eval()
        other.load_state_dict(state)
        with torch.no_grad():
            rows.append(nn.functional.cross_entropy(other(DATA[0]), DATA[1], reduction="none"))
    wanted = lossk.LossKernel.from_traces(lossk.LossTraces(torch.stack(rows).unsqueeze(0)))
    found = kernel_from_weights(draws(model), model, DATA, progress=False)
    torch.testing.assert_close(found[:], wanted[:], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_model_takes_plain_states(wrap: Any, model: nn.Module) -> None:
    plain = draws(model)
    own = wrap(model, backend="eager") if wrap is torch.compile else wrap(model)
    found = kernel_from_weights(plain, own, DATA, progress=False)
    np.testing.assert_array_equal(found.to_numpy(), kernel_from_weights(plain, model, DATA, progress=False).to_numpy())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_modes_change_nothing(mode: Any, model: nn.Module) -> None:
    wanted = kernel_from_weights(draws(model), model, DATA, progress=False)
    plain = draws(model)
    with mode():
        found = kernel_from_weights(iter(plain), model, DATA, progress=False)
    np.testing.assert_array_equal(found.to_numpy(), wanted.to_numpy())


Z = torch.zeros
BAD: list[tuple[dict[Any, Any], type[Exception], str]] = [
    (
        {"a": Z(1), "b": Z(1), "head.bias": Z(2)},
        ValueError,
        "no parameter or buffer 'a', 'b'; it has 'first.weight', .*more",
    ),
    (
        {"head.bias": Z(3), "head.weight": Z(4, 2)},
        ValueError,
        r"'head.bias' must have shape \[2\].*'head.weight' must have",
    ),
    (
        {"state_dict": {"head.bias": Z(2)}, "epoch": 3},
        ValueError,
        r"its entry 'state_dict': pass checkpoint\['state_dict'\]",
    ),
    ({"model_state_dict": {}, "optimizer": {}}, ValueError, r"pass checkpoint\['model_state_dict'\]"),
    ({"head.bias": None}, TypeError, "'head.bias' must be a tensor or an array, got NoneType"),
    ({"head.bias": "zeros"}, TypeError, "'head.bias' must be a tensor or an array, got str"),
    ({"head.bias": [[1.0], [1.0, 2.0]]}, TypeError, "'head.bias' must be a tensor or an array, got list"),
    ({"head.bias": Z(2, dtype=torch.complex64)}, ValueError, "'head.bias' must be torch.float32, got torch.complex64"),
    ({"head.bias": Z(2, dtype=torch.int8)}, ValueError, "'head.bias' must hold floating-point numbers, got torch.int8"),
    ({"head.bias": Z(2, device="meta")}, TypeError, "'head.bias' must hold plain numbers, got a tensor on the meta"),
    (
        {"head.bias": torch.tensor([0.0, 1e300]).double() + torch.tensor([0.0, 1e300]).double()},
        ValueError,
        "finite, entry",
    ),
    ({"head.bias": torch.tensor([0.0, float("inf")])}, ValueError, r"'head.bias' must be finite, entry \[1\] is inf"),
    ({"norm.running_var": torch.tensor([1.0, float("nan"), 1, 1])}, ValueError, "'norm.running_var' must be finite"),
    ({"norm.num_batches_tracked": torch.tensor(1.5)}, ValueError, "not whole numbers"),
    (
        {"left.weight": Z(4, 4), "right.weight": torch.ones(4, 4)},
        ValueError,
        "'left.weight' and 'right.weight' are one tensor",
    ),
    ({3: Z(2)}, TypeError, "names of a state must be strings, got 3"),
]


@pytest.mark.parametrize(("state", "error", "message"), BAD)
def test_what_does_not_fit_is_named(state: Any, error: type[Exception], message: str, model: nn.Module) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(error, match=f"chain 0, draw 1: .*{message}"):
        kernel_from_weights([{}, state], model, DATA, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def ends_early(model: nn.Module, count: int) -> Iterator[Any]:
    yield from draws(model, count)


CHAINS: list[tuple[Callable[[nn.Module], Any], type[Exception], str]] = [
    (lambda m: [], ValueError, r"at least 2 draws per chain and as many in each, got \[0\]"),
    (lambda m: [[], []], ValueError, r"got \[0, 0\]"),
    (lambda m: iter([]), ValueError, r"got \[0\]"),
    (lambda m: [draws(m, 3), draws(m, 4)], ValueError, r"got \[3, 4\]"),
    (lambda m: [ends_early(m, 3), ends_early(m, 2)], ValueError, r"got \[3, 2\]"),
    (lambda m: [iter(draws(m, 4))] * 2, ValueError, "chain 1 is the same iterator as one before it"),
    (lambda m: "weights.pt", TypeError, "weights must be an iterable of weight states, got one str"),
    (lambda m: ["a.pt", "b.pt"], TypeError, "draw 0: a state must be .* got str; load files with torch.load"),
    (lambda m: [m, m], TypeError, r"draw 0: a state must be .* got Network; pass its state_dict\(\)"),
    (lambda m: [nn.Sequential(m)] * 2, TypeError, r"got Sequential; pass its state_dict\(\)"),
    (lambda m: m, TypeError, "got one Network"),
    (lambda m: 3, TypeError, "got one int"),
    (lambda m: None, TypeError, "got one NoneType"),
    (lambda m: [draws(m, 2), {}], TypeError, "chain 1 must be an iterable of weight states, got dict"),
    (lambda m: [np.zeros(3)] * 2, ValueError, r"a flat state must have shape \[\d+\], got \[3\]"),
    (lambda m: (draws(m, 2) for _ in range(2)), TypeError, "draw 0: a state must be .* got list"),
]


@pytest.mark.parametrize(("make", "error", "message"), CHAINS)
def test_what_is_no_set_of_chains_is_said(make: Any, error: type[Exception], message: str, model: nn.Module) -> None:
    with pytest.raises(error, match=message):
        kernel_from_weights(make(model), model, DATA, progress=False)


def test_flat_states_are_checked(model: nn.Module) -> None:
    size = sum(p.numel() for p in model.parameters())
    for value, message in ((Z(size) + float("nan"), "entry 0 is nan"), (Z(size).long(), "floating-point")):
        with pytest.raises(ValueError, match=message):
            kernel_from_weights([value] * 2, model, DATA, progress=False)
