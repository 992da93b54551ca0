"""What may be in a caller's data: read as it is, or refused by name before any work."""

from __future__ import annotations

import re
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lossk
from lossk.data import leaves
from lossk.probe_sets import read_sources
from lossk.reading import read_samples

N = 10


def numbers() -> Tensor:
    """[N, 3] float32."""
    return torch.arange(3.0 * N, dtype=torch.float32, device="cpu").reshape(N, 3) / 7


def labels() -> Tensor:
    """[N] int64."""
    return torch.arange(N, dtype=torch.int64, device="cpu") % 3


class Items(Dataset[Any]):
    """A dataset of what a function makes of a sample's number."""

    def __init__(self, item: Callable[[int], Any], length: int = N) -> None:
        self.item, self.length = item, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Any:
        return self.item(i)


def batches_of(*batches: Any) -> DataLoader[Any]:
    """A loader of ready batches."""
    return DataLoader(Items(lambda i: batches[i], len(batches)), batch_size=None, collate_fn=_same)


def _same(batch: Any) -> Any:
    return batch


# --- refused -----------------------------------------------------------------------------------------------------


def quiet(make: Callable[[], Any]) -> Any:
    """Made without torch's word that this kind is young."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


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
        (lambda: iter(DataLoader(Items(_same))), "only once"),
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


# --- read --------------------------------------------------------------------------------------------------------


def inference() -> Tensor:
    with torch.inference_mode():
        return numbers()


def read_only() -> np.ndarray:
    array = numbers().numpy().copy()
    array.flags.writeable = False
    return array


class Image(Tensor):
    """A tensor subclass of the kind torchvision has."""


def ordinary(dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: numbers().to(dtype)


INPUTS: dict[str, Callable[[], Any]] = {
    "requires grad": lambda: numbers().requires_grad_(),
    "with a graph": lambda: numbers().requires_grad_() * 1,
    "parameter": lambda: nn.Parameter(numbers()),
    "buffer": lambda: nn.Buffer(numbers()),
    "inference": inference,
    "subclass": lambda: numbers().as_subclass(Image),
    "transposed": lambda: numbers().t().contiguous().t(),
    "conjugate": lambda: (numbers() + 1j * numbers()).conj(),
    "negative view": lambda: (numbers() + 1j * numbers()).conj().imag,
    "read-only array": read_only,
    "reversed array": lambda: numbers().numpy()[::-1],
    "strided array": lambda: np.repeat(numbers().numpy(), 2, axis=1)[:, ::2],
    "big-endian array": lambda: numbers().numpy().astype(">f4"),
    "matrix": lambda: quiet(lambda: np.matrix(numbers().numpy())),
    "field of records": lambda: np.array([(1, 2.0)] * N, dtype=[("a", "i1"), ("b", "f8")])["b"],
    **{str(d): ordinary(d) for d in (torch.uint16, torch.uint32, torch.float64, torch.bfloat16, torch.complex64)},
}


def expected_of(given: Any) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
    return torch.from_numpy(np.array(given, dtype=given.dtype.newbyteorder("=")))


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("place", ["tuple", "tensor dataset", "batch"])
def test_every_kind_of_tensor_and_array(kind: str, place: str) -> None:
    given = INPUTS[kind]()
    if place == "tensor dataset" and not isinstance(given, Tensor):
        given = expected_of(given)
    expected = expected_of(given).clone()
    source: Any = {
        "tuple": lambda: (given, labels()),
        "tensor dataset": lambda: TensorDataset(given, labels()),
        "batch": lambda: batches_of((given, labels())),
    }[place]()
    samples = read_samples(source)
    inputs = samples.tree[0]
    assert type(inputs) is Tensor
    assert not inputs.is_inference()
    assert not inputs.requires_grad
    assert inputs.dtype == expected.dtype
    assert inputs.tolist() == expected.tolist()
    assert samples.fingerprint() == read_samples((expected, labels())).fingerprint()
    assert torch.equal(expected_of(given), expected)  # the caller's is as it was


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_a_mapped_file_is_read_and_never_written(tmp_path: Path, mode: str) -> None:
    np.save(tmp_path / "x.npy", numbers().numpy())
    before = (tmp_path / "x.npy").read_bytes()
    mapped = np.load(tmp_path / "x.npy", mmap_mode=mode)
    samples = read_samples((mapped, labels()))
    assert torch.equal(samples.tree[0], numbers())
    if mode == "r":  # a model that works in place must not crash on it
        samples.tree[0].zero_()
    assert (tmp_path / "x.npy").read_bytes() == before


Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    ("item", "form"),
    [
        (lambda i: (numbers()[i], int(i % 3)), "tuple"),
        (lambda i: [numbers()[i].numpy(), np.int64(i % 3)], "tuple"),
        (lambda i: {"x": numbers()[i], "y": labels()[i]}, "mapping"),
        (lambda i: Pair(numbers()[i], i % 3), "named"),
        (lambda i: (numbers()[i], {"y": i % 3}), "nested"),
    ],
)
def test_items_of_a_dataset(item: Callable[[int], Any], form: str) -> None:
    """The form is that of the loader's own batches."""
    for source in (Items(item), DataLoader(Items(item), batch_size=4), DataLoader(Items(item))):
        samples = read_samples(source)
        x, y = leaves(samples.tree)
        assert torch.equal(x, numbers())
        assert torch.equal(y, labels())
        few = samples[:3]
        assert isinstance(few, {"mapping": dict, "named": Pair}.get(form, tuple))
        if form == "named":
            assert torch.equal(few.y, labels()[:3])


def test_numbers_of_a_dataset_have_the_dtypes_of_the_default_collation() -> None:
    samples = read_samples(Items(lambda i: (np.float32(i), float(i), i, i > 3)))
    assert [t.dtype for t in samples.tree] == [torch.float32, torch.float64, torch.int64, torch.bool]


def test_batches_whose_keys_come_in_another_order() -> None:
    samples = read_samples(batches_of({"x": numbers(), "z": -numbers()}, {"z": -numbers(), "x": numbers()}))
    assert torch.equal(samples.tree["x"], torch.cat([numbers(), numbers()]))
    assert torch.equal(samples.tree["z"], -samples.tree["x"])


def test_reading_holds_nothing_of_a_batch() -> None:
    """A loader that fills one tensor again and again, as some do, gives every sample its own numbers."""
    kept = numbers()

    def again(i: int) -> Any:
        kept.fill_(i)
        return kept, labels()

    samples = read_samples(DataLoader(Items(again, 3), batch_size=None))
    assert samples.tree[0][:, 0].tolist() == [0.0] * N + [1.0] * N + [2.0] * N


# --- in the caller's modes ---------------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


class Made(Dataset[Any]):
    """Its items are made, by a product and a derivative, as they are asked for."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> Any:
        x = self.inputs[i : i + 1].clone().requires_grad_()
        (slope,) = torch.autograd.grad((x @ x.T).sum(), x)
        return slope[0].numpy(), 0.1 * i, i


class Flow(IterableDataset[Any]):
    def __init__(self, items: Dataset[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        for i in range(N):
            yield self.items[i]


SOURCES: dict[str, Callable[[Tensor], Any]] = {
    "tensors": lambda x: (x, x[:, 0]),
    "array": lambda x: (x.numpy(), x[:, 0].numpy()),
    "dataset": lambda x: Made(x),
    "loader": lambda x: DataLoader(Made(x), batch_size=4, generator=torch.Generator()),
    "stream": lambda x: Flow(Made(x)),
    "workers": lambda x: DataLoader(Made(x), batch_size=4, num_workers=1),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_same_samples_in_every_mode_of_the_caller(kind: str) -> None:
    source = SOURCES[kind](numbers())
    reference = read_samples(source)
    for mode, enter in MODES.items():
        with ExitStack() as stack:
            stack.enter_context(enter())
            before = _modes()
            samples = read_samples(source)
            assert _modes() == before
        assert samples.fingerprint() == reference.fingerprint(), mode
        assert not any(t.is_inference() or t.requires_grad for t in leaves(samples.tree)), mode


def _modes() -> tuple[Any, ...]:
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )


def test_inference_tensors_and_graphs_reach_a_kernel(problem: Any, build: Callable[..., lossk.LossKernel]) -> None:
    reference = build(problem.model(), problem.data).to_numpy()
    with torch.inference_mode():
        made = problem.inputs.clone()
    for inputs in (made, problem.inputs.clone().requires_grad_(), problem.inputs.numpy()[::-1][::-1]):
        np.testing.assert_array_equal(build(problem.model(), (inputs, problem.targets)).to_numpy(), reference)
    assert re.search("requires_grad", repr(problem.inputs)) is None
