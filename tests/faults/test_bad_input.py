"""Every bad input is refused before sampling starts, in a message that names the argument and the value."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lossk
from small_networks import Tally

Build = Callable[..., lossk.LossKernel]
BAD = (ValueError, TypeError)


class Counted(nn.Module):
    """A model that counts its forward passes, so that a test can tell validation from sampling."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.tally = Tally()

    def forward(self, x: Tensor) -> Tensor:
        self.tally.count += 1
        return self.inner(x)


@pytest.fixture
def counted(problem: Any) -> Counted:
    return Counted(problem.model())


@pytest.fixture
def refused(build: Build, counted: Counted, sgld: Any) -> Callable[..., None]:
    """Assert that build_kernel raises `error` with all `fragments` in its message, having looked at the data once."""

    def check(data: Any, *fragments: str, error: Any = BAD, model: Any = None, **arguments: Any) -> None:
        settings = {"sampler": sgld(num_burnin_steps=2000), "num_draws": 6, **arguments}
        with pytest.raises(error) as caught:
            build(counted if model is None else model, data, **settings)
        message = str(caught.value)
        for fragment in fragments:
            assert re.search(fragment, message, re.IGNORECASE), f"{fragment!r} is not in: {message}"
        assert counted.tally.count < 30, "refused only after sampling had begun"

    return check


# --- arguments of build_kernel -----------------------------------------------------------------------------------

ARGUMENTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"num_draws": 1}, ("num_draws", r"\b1\b")),
    ({"num_draws": 0}, ("num_draws", r"\b0\b")),
    ({"num_draws": 2.5}, ("num_draws", r"2\.5")),
    ({"num_chains": 0}, ("num_chains", r"\b0\b")),
    ({"num_chains": -3}, ("num_chains", "-3")),
    ({"num_chains": "4"}, ("num_chains", "4")),
    ({"tile": 100}, ("tile must be a positive multiple of 16", "100")),
    ({"tile": 0}, ("tile", "16", r"\b0\b")),
    ({"tile": -16}, ("tile", "16", "-16")),
    ({"tile": 16.0}, ("tile", r"16\.0")),
    ({"panel": 0}, ("panel", r"\b0\b")),
    ({"panel": -1}, ("panel", "-1")),
    ({"dtype": "float64"}, ("dtype", "float64", "float16", "float32")),
    ({"dtype": "bfloat16"}, ("dtype", "bfloat16")),
    ({"centering": "median"}, ("centering", "median", "chain", "pooled")),
    ({"backend": "abacus"}, ("backend", "abacus", "torch")),
    ({"precision": "int8"}, ("precision", "int8", "bf16")),
    ({"loss": "hinge"}, ("loss", "hinge", "cross_entropy", "mse")),
    ({"loss": 3}, ("loss", "int")),
    ({"seed": -1}, ("seed", "-1")),
    ({"seed": 2**32}, ("seed", str(2**32))),
    ({"seed": 0.5}, ("seed", r"0\.5")),
    ({"sampler": {"lr": 1e-3}}, ("sampler", "SGLD")),
    ({"device": "abacus"}, ("device", "abacus")),
    ({"resume": True}, ("resume", "out")),
]


@pytest.mark.parametrize(("arguments", "fragments"), ARGUMENTS, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_arguments(
    refused: Callable[..., None], problem: Any, arguments: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    refused(problem.data, *fragments, **arguments)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_cannot_run_says_why(
    refused: Callable[..., None], problem: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: the backend may run")
    importlib.import_module("triton.language")  # reads the variable as it defines its own functions: other tests' too
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(problem.data, backend, "torch", error=lossk.errors.BackendError, backend=backend)


def test_an_existing_store_is_refused_and_kept(refused: Callable[..., None], problem: Any, tmp_path: Path) -> None:
    store = tmp_path / "k.lossk"
    store.mkdir()
    (store / "precious.txt").write_text("mine")
    refused(problem.data, r"k\.lossk", "exist", error=(ValueError, OSError, lossk.errors.StoreError), out=store)
    assert (store / "precious.txt").read_text() == "mine"


def test_unknown_arguments_are_refused(refused: Callable[..., None], problem: Any) -> None:
    refused(problem.data, "num_chain", error=TypeError, num_chain=3)


# --- arguments of SGLD -------------------------------------------------------------------------------------------

SGLD_ARGUMENTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"lr": 0.0}, ("lr", r"\b0")),
    ({"lr": -1e-3}, ("lr", r"-0\.001")),
    ({"lr": float("nan")}, ("lr", "nan")),
    ({"lr": float("inf")}, ("lr", "inf")),
    ({"lr": "small"}, ("lr", "small", "auto")),
    ({"n_beta": 0.0}, ("n_beta", r"\b0")),
    ({"n_beta": -5.0}, ("n_beta", "-5")),
    ({"n_beta": float("nan")}, ("n_beta", "nan")),
    ({"n_beta": "auto"}, ("n_beta", "auto")),
    ({"localization": -1.0}, ("localization", "-1")),
    ({"localization": float("inf")}, ("localization", "inf")),
    ({"batch_size": 0}, ("batch_size", r"\b0\b")),
    ({"batch_size": -4}, ("batch_size", "-4")),
    ({"batch_size": 2.5}, ("batch_size", r"2\.5")),
    ({"num_burnin_steps": -1}, ("num_burnin_steps", "-1")),
    ({"num_steps_bw_draws": 0}, ("num_steps_bw_draws", r"\b0\b")),
    ({"preconditioner": "adam"}, ("preconditioner", "adam", "rmsprop")),
    ({"params": "head.*"}, ("params", r"head\.\*")),
    ({"params": [3]}, ("params", "3")),
]


@pytest.mark.parametrize(
    ("arguments", "fragments"), SGLD_ARGUMENTS, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
def test_sgld_arguments(arguments: dict[str, Any], fragments: tuple[str, ...]) -> None:
    with pytest.raises(BAD) as caught:
        lossk.SGLD(**arguments)
    for fragment in fragments:
        assert re.search(fragment, str(caught.value)), f"{fragment!r} is not in: {caught.value}"


@pytest.mark.parametrize("n_burnin", [0, 1])
def test_allowed_extremes(build: Build, problem: Any, sgld: Any, n_burnin: int) -> None:
    sampler = sgld(localization=0.0, num_burnin_steps=n_burnin, num_steps_bw_draws=1, batch_size=1)
    kernel = build(problem.model(), problem.data, sampler=sampler, num_chains=1, num_draws=2, seed=2**32 - 1)
    assert np.isfinite(kernel.to_numpy()).all()


def test_patterns_that_match_nothing(refused: Callable[..., None], problem: Any, sgld: Any) -> None:
    refused(problem.data, "params", r"layer9\.\*", sampler=sgld(params=["layer9.*"]))


def test_one_pattern_of_two_matches_nothing(refused: Callable[..., None], problem: Any, sgld: Any) -> None:
    """A misspelt layer is not silently left out."""
    refused(problem.data, "params", "lyer2", sampler=sgld(params=["inner.0.*", "lyer2"]))


# --- the model ---------------------------------------------------------------------------------------------------


def test_not_a_module(refused: Callable[..., None], problem: Any) -> None:
    refused(problem.data, "model", "function|lambda", model=lambda x: x)


def test_nothing_to_train(refused: Callable[..., None], problem: Any, counted: Counted) -> None:
    refused(problem.data, "parameter", model=nn.Tanh())
    counted.requires_grad_(False)
    refused(problem.data, "parameter", "grad")


def test_non_finite_weights(refused: Callable[..., None], problem: Any, counted: Counted) -> None:
    with torch.no_grad():
        counted.inner[0].weight[1, 2] = float("nan")  # type: ignore[index,union-attr,operator]
    refused(problem.data, "nan|finite", r"inner\.0\.weight|loss")


# --- the data ----------------------------------------------------------------------------------------------------


def relabelled(problem: Any, value: int) -> tuple[Tensor, Tensor]:
    targets = problem.targets.clone()
    targets[-2] = value
    return problem.inputs, targets


@pytest.mark.parametrize("value", [3, 1000, -1, -100])
def test_labels_out_of_range(refused: Callable[..., None], problem: Any, value: int) -> None:
    """The value, and how many classes the model has; -100 is no special label here."""
    refused(relabelled(problem, value), "label|target", rf"{value}\b", r"\b[23]\b")


@pytest.mark.parametrize("value", [7, -1])
def test_labels_out_of_range_in_the_training_data(refused: Callable[..., None], problem: Any, value: int) -> None:
    refused(problem.data, "label|target", rf"{value}\b", train=relabelled(problem, value))


def test_float_and_soft_labels(refused: Callable[..., None], problem: Any) -> None:
    refused((problem.inputs, problem.targets.float()), "label|target|class", "float32")
    soft = nn.functional.one_hot(problem.targets, 3).float()
    refused((problem.inputs, soft), "label|target|class", r"float32|\(21, 3\)|\[21, 3\]|\[3\]|\(3,?\)")


def test_integer_labels_of_any_width_are_fine(build: Build, problem: Any) -> None:
    reference = build(problem.model(), problem.data).to_numpy()
    for dtype in (torch.int32, torch.uint8):
        kernel = build(problem.model(), (problem.inputs, problem.targets.to(dtype)))
        np.testing.assert_array_equal(kernel.to_numpy(), reference)


def test_targets_do_not_broadcast(refused: Callable[..., None], problem: Any) -> None:
    """[B] against [B, 1] or [B, 2] would silently give a B x B, or a wrong, table of differences."""
    refused((problem.inputs, torch.randn(21, 2)), "shape", "2", model=nn.Linear(4, 1), loss="mse")
    refused(
        (problem.inputs, torch.randn(21, 1)), "shape", model=nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), loss="mse"
    )
    refused((problem.inputs, torch.randn(21)), "shape", "2", model=nn.Linear(4, 2), loss="mse")


def test_a_column_of_outputs_fits_flat_targets(problem: Any, sgld: Any) -> None:
    """[B, 1] against [B] is one output per sample: the squared error of each, not B x B of them."""
    model, targets = nn.Linear(4, 1), torch.randn(21)
    still = {"loss": "mse", "sampler": sgld(lr=1e-30), "num_chains": 1, "num_draws": 2, "progress": False}
    losses = lossk.sample_losses(model, (problem.inputs, targets), **still).losses
    with torch.no_grad():
        expected = (model(problem.inputs).squeeze(1) - targets).square()
    np.testing.assert_allclose(losses[0, 0], expected, rtol=1e-5)
    column = lossk.sample_losses(model, (problem.inputs, targets[:, None]), **still).losses
    np.testing.assert_array_equal(column, losses)


def test_cross_entropy_wants_one_row_of_logits_per_sample(refused: Callable[..., None], problem: Any) -> None:
    refused(problem.data, "logits|outputs", "shape|class", model=nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)))
    refused(problem.data, "logits|outputs", "shape", model=nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2))))
    refused((problem.inputs, problem.targets[:, None].expand(-1, 2)), "label|target", "shape")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["probe", "train"])
def test_non_finite_inputs(refused: Callable[..., None], problem: Any, value: float, where: str) -> None:
    inputs = problem.inputs.clone()
    inputs[-1, 2] = value
    bad = (inputs, problem.targets)
    if where == "probe":
        refused(bad, "input|loader", "finite|nan|inf", r"\b20\b", train=problem.data)
    else:
        refused(problem.data, "train", "finite|nan|inf", r"\b20\b", train=bad)


def test_non_finite_regression_targets(refused: Callable[..., None], problem: Any) -> None:
    targets = torch.zeros(21, 1)
    targets[4] = float("nan")
    refused((problem.inputs, targets), "target|loader", "finite|nan", r"\b4\b", model=nn.Linear(4, 1), loss="mse")


class Nothing(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_empty_data(refused: Callable[..., None], problem: Any) -> None:
    empty = (problem.inputs[:0], problem.targets[:0])
    for data in (
        empty,
        DataLoader(TensorDataset(*empty), batch_size=4),
        DataLoader(Nothing(), batch_size=4),
        Nothing(),
    ):
        refused(data, "loader", "empty|at least (one|two|1|2)")
    refused(problem.data, "train", "empty|at least (one|1)", train=empty)


def test_one_sample(refused: Callable[..., None], problem: Any) -> None:
    refused((problem.inputs[:1], problem.targets[:1]), "sample", r"\b1\b")


def test_two_samples_are_enough(build: Build, problem: Any) -> None:
    assert build(problem.model(), (problem.inputs[:2], problem.targets[:2])).to_numpy().shape == (2, 2)


def test_inputs_and_targets_of_different_length(refused: Callable[..., None], problem: Any) -> None:
    refused((problem.inputs, problem.targets[:-1]), r"\b21\b", r"\b20\b")


@pytest.mark.parametrize(
    "data", [None, 5, "data", torch.zeros(4, 4), {"inputs": 1}, ()], ids=lambda v: type(v).__name__
)
def test_no_data_at_all(refused: Callable[..., None], data: Any) -> None:
    refused(data, "loader", "got")


# --- a callable loss ---------------------------------------------------------------------------------------------


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets, reduction="none")


@pytest.mark.parametrize(
    ("wrong", "fragment"),
    [
        (lambda losses: losses.mean(), r"shape|scalar|\(\)|\[\]"),
        (lambda losses: losses[:-1], r"20|shape"),
        (lambda losses: losses[:, None], r"shape|1"),
        (lambda losses: losses.tolist(), "list"),
        (lambda losses: (losses, None), "tuple"),
        (lambda losses: losses.detach(), "grad|differentia"),
        (lambda losses: losses.long(), "int64|float"),
    ],
    ids=["scalar", "one short", "a column", "a list", "a tuple", "no graph", "integers"],
)
def test_what_a_callable_returns(refused: Callable[..., None], problem: Any, wrong: Any, fragment: str) -> None:
    refused(problem.data, "loss", fragment, loss=lambda model, batch: wrong(losses_of(model, batch)))


def test_a_loss_that_is_not_finite_at_the_start(refused: Callable[..., None], problem: Any) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = losses_of(model, batch)
        return torch.where(batch[1] == 2, losses * float("nan"), losses)

    refused(problem.data, "loss", "finite|nan", loss=loss, error=(ValueError, lossk.DivergedError))


# --- traces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "fragment"),
    [
        (np.zeros((3, 4), np.float32), r"shape|dimension"),
        (np.zeros((2, 1, 4), np.float32), "draw"),
        (np.zeros((2, 3, 0), np.float32), "sample"),
        (np.zeros((0, 3, 4), np.float32), "chain"),
        (np.full((2, 3, 4), np.nan, np.float32), "finite|nan"),
        (np.full((2, 3, 4), np.inf, np.float32), "finite|inf"),
        ("losses", "str"),
    ],
    ids=["two axes", "one draw", "no samples", "no chains", "nan", "inf", "a string"],
)
def test_traces(losses: Any, fragment: str) -> None:
    with pytest.raises(BAD) as caught:
        lossk.LossTraces(losses)
    assert re.search(fragment, str(caught.value), re.IGNORECASE), str(caught.value)


def test_centering_of_traces() -> None:
    traces = lossk.LossTraces(np.random.default_rng(0).random((2, 3, 4), np.float32))
    with pytest.raises(ValueError, match=r"centering.*median"):
        lossk.LossKernel.from_traces(traces, centering="median")
