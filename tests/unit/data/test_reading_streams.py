"""Reading moves no random stream of the caller's: global ones, the loader's, the sampler's, the dataset's."""

from __future__ import annotations

import functools
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, Subset

import lossk
from loader_items import Items, N, numbers
from lossk.data.generators import find_generators
from lossk.data.reading import read_samples

AT_MODULE = np.random.default_rng(5)
MAKERS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.Generator().manual_seed(3),
    "pcg": lambda: np.random.default_rng(3),
    "philox": lambda: np.random.Generator(np.random.Philox(3)),
    "mt": lambda: np.random.Generator(np.random.MT19937(3)),
    "legacy": lambda: np.random.RandomState(3),
    "python": lambda: random.Random(3),
}


def draw(generator: Any) -> float:
    """One normal number; of a pair, so that the other one is state too."""
    if isinstance(generator, torch.Generator):
        return float(torch.randn(1, generator=generator, dtype=torch.float32))
    if isinstance(generator, random.Random):
        return generator.gauss(0.0, 1.0)
    return float(generator.standard_normal())


class Noisy(Dataset[Any]):
    """Every item draws from some generators, and from the global streams."""

    def __init__(self, draws: Callable[[], Any], fails: bool = False) -> None:
        self.draws, self.fails = draws, fails

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        np.random.rand(), random.random(), torch.rand(1)  # noqa: NPY002
        noise = float(self.draws())
        if self.fails and i == 7:
            raise ValueError("stopped by the test")
        return numbers()[i] + noise, i


class Drawing:
    """A transform with a generator, at one place or another."""

    shared: Any = None

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __call__(self) -> float:
        return draw(self.generator)


class Slotted:
    __slots__ = ("empty", "generator")

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __call__(self) -> float:
        return draw(self.generator)


def in_class(generator: Any) -> Callable[[], float]:
    kind = type("Shared", (), {"generator": generator, "__call__": lambda self: draw(type(self).generator)})
    return kind()


def in_default(generator: Any) -> Callable[[], float]:
    def call(*, own: Any = generator) -> float:
        return draw(own)

    return call


def in_a_list(generator: Any) -> Callable[[], float]:
    held = SimpleNamespace(parts=[{"augment": deque([(Drawing(generator),)])}])
    return lambda: held.parts[0]["augment"][0][0]()


PLACES: dict[str, Callable[[Any], Callable[[], float]]] = {
    "attribute": Drawing,
    "slot": Slotted,
    "class": in_class,
    "method": lambda generator: Drawing(generator).__call__,
    "closure": lambda generator: lambda: draw(generator),
    "default": in_default,
    "partial": lambda generator: functools.partial(draw, generator),
    "nested": in_a_list,
}


def states(*generators: Any) -> list[list[float]]:
    """What the generators would give next: three numbers, and then the first three of that again."""
    kept = [random.getstate(), np.random.get_state(), torch.get_rng_state()]  # noqa: NPY002
    drawn = [[random.gauss(0, 1), float(np.random.standard_normal()), float(torch.rand(1))]]  # noqa: NPY002
    random.setstate(kept[0]), np.random.set_state(kept[1]), torch.set_rng_state(kept[2])  # noqa: NPY002
    return drawn + [[_state(generator)] for generator in generators]


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    if isinstance(generator, random.Random):
        return generator.getstate()
    bits = (
        generator.get_state(legacy=False)
        if isinstance(generator, np.random.RandomState)
        else generator.bit_generator.state
    )
    return repr(bits)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("place", PLACES)
def test_a_generator_of_the_dataset(kind: str, place: str, fails: bool) -> None:
    generator = MAKERS[kind]()
    draw(generator)
    source = DataLoader(Subset(Noisy(PLACES[place](generator), fails), range(N)), 4)
    before = states(generator)
    if fails:
        with pytest.raises(ValueError, match="stopped by the test"):
            read_samples(source)
        assert states(generator) == before
        return
    first, second = read_samples(source), read_samples(source)
    assert states(generator) == before
    assert first.fingerprint() == second.fingerprint()
    assert not torch.equal(first.tree[0], numbers())


def test_a_generator_at_module_level_and_functions_that_use_it() -> None:
    def within() -> float:
        return float(sum(AT_MODULE.standard_normal() for _ in range(2)))

    for draws in (lambda: draw(AT_MODULE), within, _through):
        before = states(AT_MODULE)
        read_samples(Noisy(draws))
        assert states(AT_MODULE) == before


def _through() -> float:
    return _deeper()


def _deeper() -> float:
    return draw(AT_MODULE)


class Order(Sampler[int]):
    def __init__(self, generator: Any) -> None:
        self.own = generator

    def __iter__(self) -> Iterator[int]:
        return iter(np.argsort([draw(self.own) for _ in range(N)]).tolist())

    def __len__(self) -> int:
        return N


class Batches(Order):
    def __iter__(self) -> Iterator[Any]:
        yield list(super().__iter__())


class Stream(IterableDataset[Any]):
    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        for i in range(N):
            yield self.items[i]


def test_generators_of_loaders_and_samplers() -> None:
    """Their own, and that of their sampler, with and without workers."""
    plain, own, other = Items(lambda i: (numbers()[i], i)), MAKERS["torch"](), MAKERS["pcg"]()
    loaders = [
        DataLoader(plain, 4, shuffle=True, generator=own),
        DataLoader(plain, 4, shuffle=True, generator=own, num_workers=1),
        DataLoader(plain, 4, num_workers=1),
        DataLoader(plain, 4, sampler=RandomSampler(plain, generator=own)),
        DataLoader(plain, 4, sampler=Order(own), generator=MAKERS["torch"]()),
        DataLoader(plain, 4, sampler=Order(other)),
        DataLoader(plain, batch_sampler=Batches(other)),
        DataLoader(Stream(Noisy(Drawing(own))), 4),
        DataLoader(Stream(Noisy(Drawing(own))), 4, num_workers=1),
    ]
    before = states(own, other)
    for number, loader in enumerate(loaders):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, second = read_samples(loader), read_samples(loader)
        assert states(own, other) == before, number
        assert first.fingerprint() == second.fingerprint(), number


def test_every_call_that_reads(problem: Any, sgld: Any) -> None:
    """Several loaders with generators of their own, in one call."""

    def loader(generator: Any) -> DataLoader[Any]:
        items = Noisy(Drawing(generator))
        return DataLoader(_Labelled(items, problem), 4, shuffle=True, generator=MAKERS["torch"]())

    generators = [make() for make in MAKERS.values()]
    loaders = [loader(generator) for generator in generators]
    own = [part.generator for part in loaders]
    before = states(*generators, *own)
    sets = lossk.ProbeSets(a=loaders[0], b=loaders[1], c=loaders[2])
    settings = {"sampler": sgld(), "num_chains": 1, "num_draws": 2, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lossk.sample_losses(problem.model(), sets, train=loaders[3], **settings)
        lossk.cross_kernel(problem.model(), loaders[4], loaders[5], rows=[0, 1], **settings)
        lossk.predicted_labels(problem.model(), loaders[0], progress=False)
    assert states(*generators, *own) == before


class _Labelled(Dataset[Any]):
    def __init__(self, items: Noisy, problem: Any) -> None:
        self.items, self.problem = items, problem

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        noise, _ = self.items[i]
        return self.problem.inputs[i] + noise[0], int(self.problem.targets[i])


class Lazy:
    """A proxy that must not be woken, as some frameworks put into a dataset."""

    __slots__ = ()

    @property
    def __class__(self) -> Any:
        raise AssertionError("was looked into")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError("was looked into")


class LazyDict(dict[str, Any]):
    def values(self) -> Any:
        raise AssertionError("was looked into")


def test_the_search_runs_no_code_of_the_callers_and_ends() -> None:
    generator = random.Random(1)
    endless: list[Any] = [generator]
    endless.append(endless)
    held = SimpleNamespace(
        lazy=Lazy(), mapping=LazyDict(a=1), many=[object()] * 10**6, others=[[i] for i in range(10**5)], end=endless
    )
    assert find_generators(held) == [generator]
    assert find_generators(random.SystemRandom(), np, torch, "text", None) == []
