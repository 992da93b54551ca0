"""The losses of a few samples as the user's own call of the model gives them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lossk.ambient import usual_modes
from lossk.data.data import Samples, few_of, widen
from lossk.data.stream import Stream
from lossk.data.streams import Streams
from lossk.data.trees import Collated, leaves, map_tensors
from lossk.task.attributes import address
from lossk.task.losses import forward, split_batch
from lossk.task.parameters import is_compiled
from lossk.task.snapshot import in_eval_mode
from lossk.task.task import Task

Arguments = tuple[int, frozenset[str]]  # how many positional ones, and the names of the keywords


@dataclass(frozen=True)
class Called:
    """Losses from the model in its own dtype and on its own device, in eval mode by `eval()`, gradients enabled."""

    name: str  # of the data set, in messages
    index: Tensor  # [k] int64, the samples
    losses: Tensor  # [R] float64, nats: of these samples, or of their unmasked tokens
    mask: Tensor | None  # [k, T] bool, of a loss per token
    mean: float  # of the samples' own losses, or of the sums over their unmasked tokens
    dtype: torch.dtype  # of the model's sampled parameters
    writes: bool  # whether the model, the loss or the transform changes its inputs in place
    arguments: Arguments | None = None  # what the model's forward is given, if always the same
    allowed: float = 0.0  # nats by which rounding may move a loss in another way of running the model
    repeatable: float = 0.0  # the same, of the same way on another day or machine

    def where(self, row: int) -> str:
        """A row, for messages."""
        if self.mask is None:
            return f"{self.name} sample {int(self.index[row])}"
        sample, position = self.mask.nonzero()[row].tolist()
        return f"{self.name} sample {int(self.index[sample])}, position {position}"


def as_called(task: Task, samples: Samples, name: str) -> Called:
    """A few samples' losses as the user's own call gives them; the task is not entered.

    The data are given as they are held and, if the model does not take them so, in the dtype of its weights.

    Raises:
        ValueError: outputs that do not fit the loss, a forward pass that writes weights.
        Exception: what the model or the loss raises, with a note that says where.
    """
    index = few_of(samples)
    with usual_modes(), _streams_put_back(task) as watch, in_eval_mode(task.model, "eval"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the model's own call warns of, its user has seen
        if watch is not None:
            watch.guard(task.model)
        with watch or nullcontext():
            try:
                called = _call(task, samples, name, index, in_own_dtype=False)
            except Exception as error:
                if _fits(task, samples, index):
                    error.add_note(f"raised by the model or the loss, called with samples {index.tolist()} of {name}")
                    raise
                called = _call(task, samples, name, index, in_own_dtype=True)
    return called


def _call(task: Task, samples: Samples, name: str, index: Tensor, *, in_own_dtype: bool) -> Called:
    held = _held(task, samples, index, widened=in_own_dtype)
    held_before = _Contents(held)
    batch = _given(task, samples, held, in_own_dtype=in_own_dtype)
    if task.loss.takes_outputs:
        inputs = split_batch(map_tensors(torch.clone, batch))[0]
        check_data(task, samples, forward(task.model, inputs))
    given_before = _Contents(batch)
    with _listening(task.model) as heard:
        losses, mask = task.loss.evaluate(task.model, batch)
    writes = held_before.changed() or given_before.changed()
    mean = float(task.loss.shares(losses, mask).detach().double().mean())
    rows, mask = task.loss.select(losses, mask)
    arguments = heard[0] if len(set(heard)) == 1 else None
    mask = None if mask is None else mask.detach().cpu()
    return Called(name, index, rows.detach().double().cpu(), mask, mean, task.sampled[0].dtype, writes, arguments)


def check_data(task: Task, samples: Samples, outputs: Tensor | None) -> None:
    """Raise a ValueError for samples that the loss cannot take, given what the model makes of the first."""
    if not task.loss.takes_outputs:  # it has nothing to check
        return
    for start, tree in samples.pieces():
        try:
            task.loss.check(tree, outputs)
        except ValueError as error:
            if start:
                error.add_note(f"counted from sample {start} of the data")
            raise


@contextmanager
def _listening(model: nn.Module) -> Iterator[list[Arguments]]:
    """What the model's forward is given at each call."""
    heard: list[Arguments] = []

    def listen(_model: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        heard.append((len(positional), frozenset(keywords)))

    handle = (
        None if isinstance(model, torch.jit.ScriptModule) else model.register_forward_pre_hook(listen, with_kwargs=True)
    )
    try:
        yield heard
    finally:
        if handle is not None:
            handle.remove()


def _held(task: Task, samples: Samples, index: Tensor, *, widened: bool) -> Any:
    """Copies of the samples as they are held, where the model is."""
    if isinstance(samples, Stream) and not samples.plain:
        return dataclasses.replace(samples, device=task.sampled[0].device)[index]
    parts = map_tensors(lambda t: t.to(task.sampled[0].device), samples.held(index))
    return map_tensors(widen, parts) if widened else parts


def _given(task: Task, samples: Samples, held: Any, *, in_own_dtype: bool) -> Any:
    """What the model and the loss are called with."""
    batch = held if samples.transform is None else (samples.transform(held[0]), held[1])
    if not in_own_dtype or isinstance(batch, Collated):
        return batch
    dtype = task.sampled[0].dtype
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)


def _fits(task: Task, samples: Samples, index: Tensor) -> bool:
    """Whether the model was called in the dtype of its weights already."""
    batch = _given(task, samples, _held(task, samples, index, widened=False), in_own_dtype=False)
    return all(t.dtype == task.sampled[0].dtype for t in leaves(batch) if t.is_floating_point())


class _Contents:
    """A batch as it is: its tensors, what is in them, and that they are all there."""

    def __init__(self, batch: Any) -> None:
        self.batch, self.tensors = batch, leaves(batch)
        self.copies = [tensor.detach().clone() for tensor in self.tensors]

    def changed(self) -> bool:
        """Whether a call has written into it, or taken something out of it or put something in (`batch.pop(...)`)."""
        now = leaves(self.batch)
        if len(now) != len(self.tensors) or any(a is not b for a, b in zip(now, self.tensors, strict=True)):
            return True
        pairs = zip(self.tensors, self.copies, strict=True)
        return not all(torch.equal(tensor.detach().nan_to_num(), copy.nan_to_num()) for tensor, copy in pairs)


@contextmanager
def _streams_put_back(task: Task) -> Iterator[_Watch | None]:
    """What watches the block's operations, if anything can; global random streams that the block moves are put back.

    Only these: another thread may be drawing from them, and would then draw the same numbers again.
    """
    streams = Streams()
    watch = None if is_compiled(task.model) else _Watch()
    try:
        yield watch
    finally:
        if watch is None or watch.drew or streams.reseeded():
            streams.put_back()
            task.draws = True


class _Watch(TorchDispatchMode):
    """Refuses an operation that writes into a parameter, before it does; notes draws from a global random stream."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No compiler is to be kept out (a compiled model is not watched), and importing it to do so takes seconds."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.drew = False
        self._names: dict[int, str] = {}

    def guard(self, model: nn.Module) -> None:
        """Refuse writes into this model's parameters, where they lie now."""
        self._names = {address(p): name for name, p in model.named_parameters() if p.numel()}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in function.tags and kwargs.get("generator") is None:
            self.drew = True
        if function._schema.is_mutable:
            for number, argument in enumerate(function._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._refuse(function, args[number] if number < len(args) else kwargs.get(argument.name))
        return function(*args, **kwargs)

    def _refuse(self, function: Any, written: Any) -> None:
        for tensor in written if isinstance(written, list | tuple) else [written]:
            name = self._names.get(address(tensor)) if isinstance(tensor, Tensor) else None
            if name is not None:
                raise ValueError(
                    "model must not change its weights in a forward pass in eval mode, but "
                    f"{function} writes into parameter {name!r}"
                )
