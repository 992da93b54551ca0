"""Data that cannot be read are refused by name, before any work."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lossk
from loader_items import Items, N, batches_of, labels, numbers, quiet, same
from lossk.data.probe_sets import read_sources
from lossk.data.reading import read_samples


def ragged() -> list[Tensor]:
    return [torch.ones(2), torch.ones(3)]


class Wrapped(Tensor):
    """A tensor subclass without memory of its own, as DTensor is."""

    @staticmethod
    def __new__(cls) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, (N, 3), dtype=torch.float32)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


class DataFrame:
    """Stands for the one of pandas, which is not installed everywhere."""

    __module__ = "pandas.core.frame"


PARTS: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: numbers().to_sparse(), "dense.*sparse_coo.*to_dense"),
    "csr": (lambda: quiet(lambda: numbers().to_sparse_csr()), "dense.*sparse_csr"),
    "jagged": (lambda: quiet(lambda: torch.nested.nested_tensor(ragged(), layout=torch.jagged)), "nested.*pad"),
    "nested": (lambda: quiet(lambda: torch.nested.nested_tensor(ragged())), "nested.*pad"),
    "quantized": (lambda: quiet(lambda: torch.quantize_per_tensor(numbers(), 0.1, 0, torch.qint8)), "quantized"),
    "half complex": (lambda: quiet(lambda: numbers().to(torch.complex32)), "dtype.*complex32"),
    "meta": (lambda: torch.zeros(N, 3, device="meta"), "meta"),
    "wrapped": (Wrapped, "plain tensor.*Wrapped"),
    "float8": (lambda: numbers().to(torch.float8_e4m3fn), "dtype.*float8_e4m3fn"),
    "objects": (lambda: np.array([[1], [2, 3]] * 5, dtype=object), "numbers.*object"),
    "texts": (lambda: np.array(["a"] * N), "numbers.*<U1"),
    "dates": (lambda: np.zeros(N, "datetime64[s]"), "numbers.*datetime64"),
    "masked": (lambda: np.ma.masked_less(numbers().numpy(), 1.0), "masked.*filled"),
    "long double": (lambda: np.zeros(N, np.longdouble), "dtype"),
    "list of numbers": (lambda: list(range(N)), "list with int"),
    "ragged lists": (lambda: [[1.0, 2.0], [3.0]] * 5, "list with float"),
    "list of texts": (lambda: ["a"] * N, "list with str"),
    "text": (lambda: "text", "str"),
    "number": (lambda: 3.0, "float"),
    "NumPy scalar": (lambda: np.float32(3.0), "float32"),
    "None": (lambda: None, "NoneType"),
    "pandas": (DataFrame, r"DataFrame.*to_numpy\(\)"),
    "object": (lambda: SimpleNamespace(x=numbers()), "SimpleNamespace"),
    "set": (lambda: {1, 2}, "set"),
}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("place", ["tuple", "mapping", "batch"])
def test_a_part_that_is_no_tensor_is_named(kind: str, place: str) -> None:
    make, fragment = PARTS[kind]
    source: Any = {
        "tuple": lambda: (make(), labels()),
        "mapping": lambda: {"x": make(), "y": labels()},
        "batch": lambda: batches_of((numbers(), labels()), (make(), labels())),
    }[place]()
    where = {"tuple": r"data(\[0\]| must)", "mapping": r"data\['x'\]", "batch": r"data: batch 1(\[0\]| must)"}[place]
    with pytest.raises(TypeError, match=f"^{where}.*{fragment}"):
        read_samples(source, "data")


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: iter([1]), "list_iterator.*only once.*DataLoader"),
        (lambda: (batch for batch in ()), "generator.*only once"),
        (lambda: iter(DataLoader(Items(same))), "only once"),
        (lambda: [(numbers(), labels())] * 2, "list of tuples.*DataLoader"),
        (lambda: [{"x": numbers()}] * 3, "list of dicts.*DataLoader"),
        (numbers, "got Tensor"),
        (lambda: numbers().numpy(), "got ndarray"),
        (DataFrame, "got DataFrame"),
        (lambda: lossk.ProbeSets(a=(numbers(), labels())), "got ProbeSets"),
        (lambda: nn.Linear(2, 2), "got Linear"),
        (list, "got list"),
        (lambda: None, "got NoneType"),
    ],
)
def test_what_is_no_data_at_all(make: Callable[[], Any], fragment: str) -> None:
    with pytest.raises(TypeError, match=f"^data must be a DataLoader, a Dataset or a tuple.*{fragment}"):
        read_samples(make(), "data")


@pytest.mark.parametrize("which", ["loader", "train", "set"])
def test_bad_data_is_refused_before_other_data_are_read(which: str) -> None:
    def unread(i: int) -> Any:
        raise AssertionError("was read")

    good, bad = Items(unread), iter([1])
    arguments: Any = {
        "loader": (bad, good),
        "train": (good, bad),
        "set": (lossk.ProbeSets(a=good, b=bad), good),
    }[which]
    with pytest.raises(TypeError, match="loader set 'b' must" if which == "set" else f"^{which} must"):
        read_sources(*arguments)
    with pytest.raises(TypeError, match="transform must be callable or None, got int"):
        read_sources(good, None, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        ((torch.tensor(1.0), torch.tensor(2)), "0-d"),
        ((np.array(1.0), np.array(2)), "0-d"),
        (([torch.tensor(1.0)] * 2, labels()), "0-d"),
        ((numbers(), labels()[:4]), "same number of samples.*4, 10"),
        (batches_of((numbers(), torch.tensor(3))), r"batch 0\[1\].*0-d"),
        (batches_of((numbers(), labels()), (numbers(), labels()[:4])), "batch 1: .*same number of samples.*4, 10"),
        (
            batches_of((numbers(), labels()), (numbers()[:, :2], labels())),
            r"one shape.*\[2\].*1\[0\].*\[3\].*pad",
        ),
        (batches_of((numbers(), labels()), (numbers().double(), labels())), r"one dtype.*float64.*1\[0\].*float32"),
        (batches_of({"x": numbers()}, {"y": numbers()}), r"same structure, got \['y'\] in batch 1 after \['x'\]"),
        (batches_of((numbers(), labels()), numbers()), "same structure, got a tensor in batch 1"),
        (batches_of(()), "batch 0 must hold at least one tensor"),
        (batches_of(), "at least one sample"),
        (TensorDataset(numbers()[:0]), "at least one sample"),
        (DataLoader(TensorDataset(numbers()[:0])), "at least one sample"),
        ((numbers(), (numbers() + 0j) / 0), "finite.*sample 0"),
    ],
)
def test_forms_that_do_not_fit(source: Any, fragment: str) -> None:
    with pytest.raises(ValueError, match=f"^data.*{fragment}"):
        read_samples(source, "data")
