"""How loaders are read: their order, their workers, their errors, how much is read and what is shown meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from loader_items import Flow, Items, N, labels, numbers
from lossk.data.loaders import reader_of
from lossk.data.reading import read_samples
from lossk.timings import Progress


def numbered(length: int = N) -> Items:
    """Sample i holds i."""
    return Items(lambda i: (torch.full((2,), float(i)), i), length)


def rows_of(source: Any, **settings: Any) -> list[int]:
    """Which sample each row is."""
    return read_samples(source, "data", **settings).tree[1].tolist()


# --- order -------------------------------------------------------------------------------------------------------


class Backwards(RandomSampler):
    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self) - 1, -1, -1))


class Doubling(DataLoader[Any]):
    """A loader that does something to its batches."""

    def __iter__(self) -> Any:
        for x, y in super().__iter__():
            yield x, 2 * y


class Halves(TensorDataset):
    def __getitem__(self, i: int) -> Any:
        x, y = super().__getitem__(i)
        return x / 2, y


OWN, SHUFFLES = "data has a sampler of its own.*i-th sample it gives", "data shuffles: its 10 samples.*dataset order"
STRAIGHT = list(range(N))
ORDERS: dict[str, tuple[Callable[[Any], DataLoader[Any]], list[int], str | None]] = {
    "in order": (lambda d: DataLoader(d, batch_size=4), STRAIGHT, None),
    "one by one": (lambda d: DataLoader(d), STRAIGHT, None),
    "dropping": (lambda d: DataLoader(d, batch_size=4, drop_last=True), STRAIGHT, None),
    "sequential": (lambda d: DataLoader(d, 4, sampler=SequentialSampler(d)), STRAIGHT, None),
    "shuffling": (lambda d: DataLoader(d, 4, shuffle=True), STRAIGHT, SHUFFLES),
    "with replacement": (lambda d: DataLoader(d, 4, sampler=RandomSampler(d, replacement=True)), STRAIGHT, SHUFFLES),
    "shuffled part": (lambda d: DataLoader(d, 4, sampler=RandomSampler([0])), [0], OWN),
    "part": (lambda d: DataLoader(d, 4, sampler=SequentialSampler(range(6))), STRAIGHT[:6], OWN),
    "kind of random": (lambda d: DataLoader(d, 4, sampler=Backwards(d)), STRAIGHT[::-1], OWN),
    "subset": (lambda d: DataLoader(d, 4, sampler=SubsetRandomSampler([3])), [3], OWN),
    "duplicates": (lambda d: DataLoader(d, 4, sampler=[5, 5, 1, 5, 5]), [5, 5, 1, 5, 5], OWN),
    "duplicates, dropping": (lambda d: DataLoader(d, 4, sampler=[5, 5, 1, 5, 5], drop_last=True), [5, 5, 1, 5], OWN),
    "batches": (lambda d: DataLoader(d, batch_sampler=[[4, 2], [7]]), [4, 2, 7], OWN),
    "batches of torch": (
        lambda d: DataLoader(d, batch_sampler=BatchSampler(Backwards(d), 4, drop_last=True)), STRAIGHT[:1:-1], OWN,
    ),
    "own iteration": (lambda d: Doubling(d, 4), list(range(0, 2 * N, 2)), "data iterates in a way of its own"),
    "a Subset": (lambda d: DataLoader(Subset(d, [3, 1, 3]), 2), [3, 1, 3], None),
}  # fmt: skip


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("of", ["items", "tensors"])
def test_the_order_of_the_rows(kind: str, of: str) -> None:
    make, expected, warning = ORDERS[kind]
    dataset = numbered() if of == "items" else TensorDataset(numbers(), torch.arange(N))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert rows_of(make(dataset)) == expected
    assert len(caught) == (warning is not None)
    if warning is not None:
        with pytest.warns(UserWarning, match=warning):
            read_samples(make(dataset), "data")


@pytest.mark.parametrize("settings", [{}, {"batch_size": 4}, {"batch_size": 4, "num_workers": 1}])
def test_a_subclass_of_tensor_datasets_gives_its_own_items(settings: dict[str, Any]) -> None:
    dataset = Halves(numbers(), labels())
    for source in (dataset, DataLoader(dataset, **settings)):
        assert torch.equal(read_samples(source).tree[0], numbers() / 2)


def test_items_that_are_batches() -> None:
    """batch_size=None: items one after the other; a single sample is no batch."""
    whole = Items(lambda i: (numbers() + i, labels()), 3)
    samples = read_samples(DataLoader(whole, batch_size=None))
    assert torch.equal(samples.tree[0], torch.cat([numbers(), numbers() + 1, numbers() + 2]))
    with pytest.warns(UserWarning, match=r"shuffles"):
        shuffled = read_samples(DataLoader(whole, batch_size=None, shuffle=True))
    assert shuffled.fingerprint() == samples.fingerprint()
    with pytest.raises(ValueError, match=r"^data: batch 0\[1\] must have the sample as its first dimension"):
        read_samples(DataLoader(TensorDataset(numbers(), labels()), batch_size=None), "data")


def test_a_collation_that_leaves_samples_out_or_makes_more() -> None:
    def some(items: list[Any]) -> Any:
        return default_collate([item for item in items if item[1] % 3])

    def twice(items: list[Any]) -> Any:
        return default_collate(items + items)

    with pytest.warns(UserWarning, match="data makes 6 samples of the 10 in its dataset"):
        assert rows_of(DataLoader(numbered(), 5, collate_fn=some)) == [1, 2, 4, 5, 7, 8]
    with pytest.warns(UserWarning, match="data makes 20 samples of the 10 in its dataset"):
        assert rows_of(DataLoader(numbered(), 5, collate_fn=twice)) == [
            *range(5),
            *range(5),
            *range(5, 10),
            *range(5, 10),
        ]


# --- workers -----------------------------------------------------------------------------------------------------


def first_worker(number: int) -> None:
    torch.utils.data.get_worker_info().dataset.length = N  # type: ignore[union-attr]


def test_what_bears_on_reading_is_kept() -> None:
    context, generator = multiprocessing.get_context("fork"), torch.Generator()
    loader = DataLoader(
        numbered(), 4, num_workers=1, timeout=7, prefetch_factor=3, multiprocessing_context=context,
        generator=generator, worker_init_fn=first_worker, collate_fn=default_collate, persistent_workers=True,
        drop_last=True,
    )  # fmt: skip
    own = DataLoader(
        numbered(), 4, sampler=[1, 2, 3], num_workers=1, timeout=7, prefetch_factor=3, multiprocessing_context=context,
        generator=generator, worker_init_fn=first_worker, persistent_workers=True,
    )  # fmt: skip
    stream = DataLoader(Flow(), 4, num_workers=1, timeout=7, prefetch_factor=3, multiprocessing_context=context,
        generator=generator, worker_init_fn=first_worker, persistent_workers=True, drop_last=True,
    )  # fmt: skip
    for source in (loader, own, stream):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = reader_of(source, "data").loader
        for name in ("dataset", "batch_size", "num_workers", "timeout", "prefetch_factor", "multiprocessing_context",
            "generator", "worker_init_fn", "collate_fn"):  # fmt: skip
            assert getattr(read, name) == getattr(source, name), name
        assert not read.persistent_workers
        assert read.drop_last == (source is stream)


def test_a_pass_of_the_callers_over_persistent_workers_goes_on() -> None:
    loader = DataLoader(numbered(), 2, num_workers=1, persistent_workers=True, sampler=list(range(N)))
    passing = iter(loader)
    next(passing)
    with pytest.warns(UserWarning, match="sampler of its own"):
        assert rows_of(loader) == STRAIGHT
    assert [batch[1].tolist() for batch in passing] == [[2, 3], [4, 5], [6, 7], [8, 9]]
    passing._shutdown_workers()  # type: ignore[attr-defined]


def test_many_small_batches_of_workers_are_not_kept_in_shared_memory() -> None:
    """Each kept tensor would hold a file open: a process may have about a thousand."""
    descriptors: list[int] = []
    stream = DataLoader(Flow(200), batch_size=None, num_workers=1)
    bar = Progress(False)
    bar.update = lambda *_: descriptors.append(len(os.listdir("/proc/self/fd")))  # type: ignore[method-assign]
    assert len(read_samples(stream, bar=bar)) == 200 * N
    assert max(descriptors) < descriptors[0] + 50


@pytest.fixture
def quick_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives a worker 5 seconds to end by itself."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)


def hang(i: int) -> Any:
    if i == 6:
        time.sleep(60)
    return torch.zeros(2), i


@pytest.mark.usefixtures("quick_end")
def test_a_hung_worker_is_named_after_the_timeout() -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^data: reading batch 1 \(samples 4 to 7 .*timed out after 1 second"):
        read_samples(DataLoader(Items(hang), 4, num_workers=1, timeout=1), "data")
    assert time.monotonic() - started < 20
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("quick_end")
def test_an_interrupt_ends_the_workers() -> None:
    """At w*, nothing has begun: the streams and the loader are as they were."""
    loader = DataLoader(Items(hang), 4, num_workers=2, generator=torch.Generator())
    state, own = torch.get_rng_state(), loader.generator.get_state()
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        read_samples(loader)
    timer.join()
    assert not multiprocessing.active_children()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loader.generator.get_state(), own)
    assert loader._iterator is None


# --- errors ------------------------------------------------------------------------------------------------------


def broken(i: int) -> Any:
    if i == 6:
        raise KeyError("no such picture")
    return torch.zeros(2), i


def ragged(i: int) -> Any:
    return torch.zeros(2 + i % 2), i


def ended(i: int) -> Any:
    if i == 6:
        raise StopIteration
    return torch.zeros(2), i


def of_type(i: int) -> Any:
    raise (ValueError, TypeError)[i]("bad item")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_dataset_names_where_it_came(workers: int) -> None:
    settings: dict[str, Any] = {"num_workers": workers}
    cases = [
        (
            DataLoader(Items(broken), 4, **settings),
            RuntimeError,
            r"batch 1 \(samples 4 to 7 .*KeyError.*no such picture",
        ),
        (DataLoader(Items(broken), **settings), RuntimeError, r"sample 6 failed.*KeyError"),
        (DataLoader(Items(ragged), 4, **settings), RuntimeError, r"batch 0 .*RuntimeError: stack expects.*equal size"),
        (DataLoader(Items(of_type, 1), **settings), ValueError, "sample 0 failed: ValueError: bad item"),
        (DataLoader(Items(lambda i: None), 4, **settings), TypeError, "batch 0 .*NoneType"),
    ]
    for loader, kind, fragment in cases:
        with pytest.raises(kind, match=f"(?s)^data: reading {fragment}") as caught:
            read_samples(loader, "data")
        assert caught.value.__cause__ is not None
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_says_stop_does_not_end_the_data(workers: int) -> None:
    """StopIteration out of an item would look like the end."""
    with pytest.raises(ValueError, match="data must not end before its dataset, got 1 of 3 batches"):
        read_samples(DataLoader(Items(ended), 4, num_workers=workers), "data")


class NoLength(Items):
    def __len__(self) -> int:
        raise NotImplementedError


def test_a_dataset_without_a_length() -> None:
    for source in (NoLength(hang), DataLoader(NoLength(hang), 4)):
        with pytest.raises(TypeError, match=r"data: a map-style dataset must have a length.*NoLength"):
            read_samples(source, "data")
