"""What frozen modules give, kept by sample: the model is cut at the boundaries of its modules, without tracing it.

A module that holds no sampled weight, called with what depends on no sampled weight, gives the same at every draw
(`lossk.task.frozen_calls` finds such calls). Within the caller's own forward and loss each of these calls then gives
what it gave for the same samples, and the module does not run. Outputs that only other such calls read are not kept:
NaN stands for them, so that whatever else reads them comes out as NaN.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lossk.data.trees import leaves
from lossk.task.losses import Loss
from lossk.task.prefix import NoCut

Key = tuple[int, int]  # a module's id, and which of its calls in a pass
Handle = Callable[[Key, Callable[..., Any], Any], Any]  # (call, how to run the module, its arguments) -> its output
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)
HOLE = object()  # where a tensor was


@dataclass(frozen=True)
class Part:
    """A tensor of a call's output.

    Attributes:
        like: what it was for a batch of a few samples.
        dim: where samples are; None of a tensor that is the same for every batch.
        each: rows of a sample, where samples are in dimension 0.
        live: whether anything but other kept calls reads it.
    """

    like: Tensor
    dim: int | None
    each: int = 1
    live: bool = True

    @property
    def kept(self) -> bool:
        """Whether it is held, a row for each sample."""
        return self.live and self.dim is not None

    def rows(self, output: Tensor) -> Tensor:
        """[B, ...]: a batch's output with the sample first."""
        assert self.dim is not None
        return output.movedim(self.dim, 0) if self.each == 1 else output.unflatten(0, (-1, self.each))

    def output(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        assert self.dim is not None
        return rows.movedim(0, self.dim) if self.each == 1 else rows.flatten(0, 1)

    def stands_for(self, size: int) -> Tensor:
        """NaN in the form of the output for so many samples."""
        shape = list(self.like.shape)
        if self.dim is not None:
            shape[self.dim] = size * self.each
        return torch.full((), torch.nan, dtype=self.like.dtype, device=self.like.device).expand(shape)


@dataclass(frozen=True)
class Call:
    """One call of a frozen module in a pass."""

    name: str
    module: nn.Module
    tree: Any  # its output, with holes for tensors
    parts: tuple[Part, ...]


class Frozen:
    """The calls of frozen modules that a pass does without, and what they give for the batches that are told of.

    Args:
        calls: in the order of a pass.
    """

    def __init__(self, calls: dict[Key, Call]) -> None:
        self.calls = calls
        self._told: Any = WeakIdKeyDictionary()  # by the first tensor of a batch

    def tell(self, batch: Any, kept: tuple[Tensor, ...]) -> None:
        """Say what the calls give for the samples of a batch: [B, ...] of each part that is kept."""
        self._told[leaves(batch)[0]] = kept

    def of(self, evaluate: Callable[[], Any]) -> tuple[Tensor, ...]:
        """What is kept for a batch, [B, ...] each, found by running the modules.

        Args:
            evaluate: the loss of the batch; stopped once all calls are made.
        """
        outputs: dict[Key, Any] = {}

        def note(key: Key, run: Callable[..., Any], _arguments: Any) -> Any:
            output = run(alone=key in self.calls)
            if key in self.calls:
                outputs[key] = output
            if len(outputs) == len(self.calls):
                raise _Enough
            return output

        with suppress(_Enough), instead(self._modules(), note):
            evaluate()
        if outputs.keys() != self.calls.keys():
            raise NoCut("modules are not called alike in every batch")
        kept = []
        for key, call in self.calls.items():
            for part, tensor in zip(call.parts, tensors_of(outputs[key]), strict=True):
                if part.kept:
                    kept.append(part.rows(tensor))
                elif part.live and not torch.equal(tensor, part.like):
                    raise NoCut(f"what {call.name} gives is not the same for every batch")
        return tuple(kept)

    def loss(self, loss: Loss) -> Loss:
        """A loss that does without the calls."""
        ways = {name: getattr(loss, name) for name in ("evaluate", "quick_mean", "quick_slopes", "quick_rows")}
        changed: dict[str, Any] = {name: self.armed(each, 1) for name, each in ways.items() if each is not None}
        return replace(loss, **changed)

    def armed(self, function: Callable[..., Any], position: int) -> Callable[..., Any]:
        """A function that does without the calls where its argument at that position is a batch that it was told of."""

        def run(*arguments: Any) -> Any:
            batch = arguments[position]
            kept = self._told.get(leaves(batch)[0])
            if kept is None:
                return function(*arguments)
            with instead(self._modules(), self.playing(len(leaves(batch)[0]), kept)):
                return function(*arguments)

        return run

    def playing(self, size: int, kept: Iterable[Tensor]) -> Handle:
        """What gives the calls' outputs for a batch of so many samples."""
        rest = iter(kept)
        outputs = {
            key: filled(call.tree, [_given(part, rest, size) for part in call.parts])
            for key, call in self.calls.items()
        }

        def play(key: Key, run: Callable[..., Any], _arguments: Any) -> Any:
            return outputs[key] if key in outputs else run(alone=False)

        return play

    def _modules(self) -> set[nn.Module]:
        return {call.module for call in self.calls.values()}


def _given(part: Part, rest: Iterator[Tensor], size: int) -> Tensor:
    if part.kept:
        return part.output(next(rest))
    return part.like if part.live else part.stands_for(size)


class _Enough(BaseException):
    """All calls are made. No Exception, which a model may catch."""


@contextmanager
def instead(modules: Iterable[nn.Module], handle: Handle) -> Iterator[None]:
    """Have `handle` decide what calls of these modules give.

    It runs a module by `run(alone=)`: `alone` hides the calls of other modules inside, which are not counted then.
    """
    counts: dict[int, int] = {}
    hidden = False

    def replaced(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal hidden
            if hidden:
                return forward(*args, **kwargs)
            count = counts.get(id(module), 0)
            counts[id(module)] = count + 1

            def run(*, alone: bool) -> Any:
                nonlocal hidden
                hidden = alone
                try:
                    return forward(*args, **kwargs)
                finally:
                    hidden = False

            return handle((id(module), count), run, (args, kwargs))

        return call

    modules = list(modules)
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.__dict__["forward"] = replaced(module)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


# --- outputs of any form -----------------------------------------------------------------------------------------


def emptied(output: Any) -> Any:
    """An output with holes for its tensors.

    Raises:
        NoCut: it holds something that cannot be kept.
    """
    return _changed(output, lambda _: HOLE)


def filled(tree: Any, tensors: Iterable[Tensor]) -> Any:
    """The inverse of `emptied`."""
    rest = iter(tensors)
    return _changed(tree, lambda _: next(rest))


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of an output, in the order of `filled`."""
    found: list[Tensor] = []
    _changed(output, lambda tensor: found.append(tensor))
    return found


def _changed(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A tree of the same types with other tensors."""
    if isinstance(tree, Tensor) or tree is HOLE:
        return change(tree)
    if isinstance(tree, PLAIN):
        return tree
    if isinstance(tree, tuple | list):
        parts = [_changed(part, change) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if isinstance(tree, Mapping):
        made: Any = copy.copy(tree)
        for key in list(tree):
            made[key] = _changed(tree[key], change)
        return made
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        made = copy.copy(tree)
        for field in dataclasses.fields(tree):
            object.__setattr__(made, field.name, _changed(getattr(tree, field.name), change))
        return made
    raise NoCut(f"a module gives a {type(tree).__name__}")
