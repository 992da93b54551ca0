"""A caller's data of every kind are read as they are, whatever the modes of the call."""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lossk
from loader_items import Items, N, batches_of, labels, numbers, quiet
from lossk.data.reading import read_samples
from lossk.data.trees import leaves


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
