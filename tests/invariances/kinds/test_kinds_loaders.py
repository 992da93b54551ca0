"""Forms of data: each gives the very samples of two tensors, as probe and as training data, and stays as it was."""

from __future__ import annotations

import random
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    get_worker_info,
)

import lossk
from kind_world import bits, describe
from kinds import NUM_STEPS, Kind, assert_kernel_of, descent, losses_at, losses_of_descent, weights_near
from lossk.interop.weights import kernel_from_weights

N, CLASSES = 14, 3


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 6), torch.arange(N) % CLASSES


KIND = Kind(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)), data)


class Items(Dataset[Any]):
    """Samples one by one, in one form or another."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any] = lambda x, y: (x, y)) -> None:
        self.x, self.y = KIND.batch()
        self.form = form

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.form(self.x[index], self.y[index])


class Batched(Items):
    """A dataset whose items are batches already."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.x[4 * index : 4 * index + 4], self.y[4 * index : 4 * index + 4]


class Stream(IterableDataset[Any]):
    """Samples in order, from `start` to `stop`; each worker its consecutive share."""

    def __init__(self, start: int = 0, stop: int = N) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[Any]:
        x, y = KIND.batch()
        worker = get_worker_info()
        rows = range(self.start, self.stop)
        return ((x[i], y[i]) for i in (rows if worker is None else rows[worker.id :: worker.num_workers]))


Pair = namedtuple("Pair", ["inputs", "targets"])
Make = Callable[[], Any]
tensors = KIND.batch


def pairs() -> list[tuple[Tensor, Tensor]]:
    return list(zip(*tensors(), strict=True))


def stacked(samples: list[Any]) -> tuple[Tensor, Tensor]:
    """A collate function of one's own: padding, here nothing but stacking."""
    return torch.stack([x for x, _ in samples]), torch.tensor([int(y) for _, y in samples])


def first_rows(count: int) -> Subset[Any]:
    return Subset(TensorDataset(*tensors()), range(count))


def last_rows(start: int) -> Subset[Any]:
    return Subset(TensorDataset(*tensors()), range(start, N))


def without_gradient(tree: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return tree[0].requires_grad_(True), tree[1]


FORMS: dict[str, Make] = {
    "tuple-of-tensors": tensors,
    "list-of-tensors": lambda: list(tensors()),
    "tuple-of-arrays": lambda: tuple(t.numpy() for t in tensors()),
    "arrays-with-strides": lambda: (np.asfortranarray(tensors()[0].numpy()), tensors()[1].numpy()),
    "tensors-that-require-grad": lambda: without_gradient(tensors()),
    "tensor-dataset": lambda: TensorDataset(*tensors()),
    "dataset-of-tensors": Items,
    "dataset-of-arrays": lambda: Items(lambda x, y: (x.numpy(), y.numpy())),
    "dataset-of-numbers": lambda: Items(lambda x, y: (x, int(y))),
    "dataset-of-lists": lambda: Items(lambda x, y: [x, y]),
    "dataset-of-named-tuples": lambda: Items(lambda x, y: Pair(x, y)),
    "subset": lambda: Subset(Items(), range(N)),
    "concatenated-datasets": lambda: ConcatDataset([first_rows(5), last_rows(5)]),
    "stacked-datasets": lambda: StackDataset(*tensors()),
    "iterable-dataset": Stream,
    "chained-iterable-datasets": lambda: ChainDataset([Stream(0, 5), Stream(5, N)]),
    "loader-of-a-tensor-dataset": lambda: DataLoader(TensorDataset(*tensors()), batch_size=4),
    "loader-of-a-list": lambda: DataLoader(pairs(), batch_size=4),  # type: ignore[arg-type]
    "loader-of-single-samples": lambda: DataLoader(Items()),
    "loader-of-one-batch": lambda: DataLoader(Items(), batch_size=100),
    "loader-that-drops-its-last-batch": lambda: DataLoader(Items(), batch_size=4, drop_last=True),
    "loader-with-a-collate-function": lambda: DataLoader(pairs(), batch_size=4, collate_fn=stacked),  # type: ignore[arg-type]
    "loader-with-workers": lambda: DataLoader(Items(), batch_size=4, num_workers=2),
    "loader-of-an-iterable-dataset": lambda: DataLoader(Stream(), batch_size=4),
    "loader-of-an-iterable-dataset-with-a-worker": lambda: DataLoader(Stream(), batch_size=4, num_workers=1),
    "loader-with-an-ordered-sampler": lambda: DataLoader(Items(), batch_size=4, sampler=SequentialSampler(range(N))),
}
BATCHED: dict[str, Make] = {
    "loader-without-batches": lambda: DataLoader(
        Items(), batch_size=None, collate_fn=lambda sample: (sample[0][None], sample[1][None])
    ),
    "loader-of-batches": lambda: DataLoader(Batched(), batch_size=None),
}
WARNED: dict[str, tuple[Make, str]] = {
    "shuffled-loader": (lambda: DataLoader(Items(), batch_size=4, shuffle=True), "shuffles"),
    "loader-with-a-random-sampler": (
        lambda: DataLoader(Items(), batch_size=4, sampler=RandomSampler(range(N))),
        "shuffles",
    ),
    "loader-with-a-batch-sampler": (
        lambda: DataLoader(Items(), batch_sampler=BatchSampler(range(N), 4, drop_last=False)),
        "sampler of its own",
    ),
    "loader-with-a-list-as-sampler": (
        lambda: DataLoader(Items(), batch_size=4, sampler=range(N)),
        "sampler of its own",
    ),
}


def show(make: Make) -> None:
    """The kernel of `make()` is the kernel of the two tensors; so are the gradients of a run that trains on it."""
    model, loader = KIND.model(), make()
    states, before = weights_near(model), held(loader)
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    kernel = kernel_from_weights(states, model, loader, progress=False)
    assert_kernel_of(kernel, losses_at(KIND, states), KIND.bound)
    traces = descend(model, tensors(), train=loader)
    assert np.abs(traces.losses[0].double().numpy() - losses_of_descent(KIND)).max() <= 3 * KIND.bound
    assert held(loader) == before
    assert bits(torch.get_rng_state()) == bits(streams[0])
    assert random.getstate() == streams[1]
    assert repr(np.random.get_state()) == repr(streams[2])  # noqa: NPY002


def descend(model: nn.Module, loader: Any, **settings: Any) -> lossk.LossTraces:
    return lossk.sample_losses(
        model, loader, sampler=descent(), num_chains=1, num_draws=NUM_STEPS, progress=False, **settings
    )


def held(loader: Any) -> Any:
    """What a form of data holds, all of its tensors' bits included."""
    if isinstance(loader, DataLoader):
        return (id(loader.sampler), id(loader.batch_sampler), id(loader.collate_fn), held(loader.dataset))
    if isinstance(loader, Subset):
        return (held(loader.dataset), describe(loader.indices, set()))
    return describe(loader, set())


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    show(FORMS[form])


@pytest.mark.parametrize("form", BATCHED)
@pytest.mark.filterwarnings("ignore:.*sampler of its own:UserWarning")
def test_forms_that_batch_by_themselves(form: str) -> None:
    show(BATCHED[form])


@pytest.mark.parametrize("form", WARNED)
def test_forms_with_a_warning(form: str) -> None:
    make, message = WARNED[form]
    with pytest.warns(UserWarning, match=message):
        show(make)


def test_a_sampler_of_its_own_gives_the_rows_in_its_order() -> None:
    """A random subset: row i is the i-th sample that it gave."""
    order = [3, 0, 11, 7]
    loader = DataLoader(Items(), batch_size=3, sampler=order)
    model = KIND.model()
    states = weights_near(model)
    with pytest.warns(UserWarning, match="sampler of its own"):
        kernel = kernel_from_weights(states, model, loader, progress=False)
    assert_kernel_of(kernel, losses_at(KIND, states)[:, order], KIND.bound)
    with pytest.warns(UserWarning, match="sampler of its own"):
        drawn = kernel_from_weights(
            states, model, DataLoader(Items(), sampler=SubsetRandomSampler(order)), progress=False
        )
    # In another order within a batch a sample's loss is rounded otherwise.
    np.testing.assert_allclose(sorted(drawn.mean_loss.tolist()), sorted(kernel.mean_loss.tolist()), atol=KIND.bound)


def test_several_probe_sets() -> None:
    sets = lossk.ProbeSets(first=first_rows(5), last=DataLoader(last_rows(5), batch_size=4))
    traces = descend(KIND.model(), sets, train=tensors())
    assert np.abs(traces.losses[0].double().numpy() - losses_of_descent(KIND)).max() <= 3 * KIND.bound


def test_bytes_with_a_transform() -> None:
    """Images as bytes, made into floats by `transform`, as the user's own loader would have made them."""
    x = torch.randint(0, 256, (N, 6), dtype=torch.uint8)
    y = tensors()[1]

    def scaled(inputs: Tensor) -> Tensor:
        return inputs.float().div(127.5).sub(1.0)

    kind = Kind(KIND.make, lambda: (scaled(x), y))
    traces = descend(kind.model(), (x, y), transform=scaled)
    assert np.abs(traces.losses[0].double().numpy() - losses_of_descent(kind)).max() <= 3 * KIND.bound
    assert x.dtype == torch.uint8
