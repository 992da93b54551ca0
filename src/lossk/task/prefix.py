"""The frozen prefix: what a model computes before its first sampled weight, done once instead of at every draw.

The model is cut where its sampled weights begin: by tracing it (torch.fx), or else at the smallest module that holds
all of them, if the model returns what that module returns. Either way the cut is tried on a few samples first, and kept
only if both halves together give exactly what the whole gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lossk.data.data import Samples, few_of
from lossk.task.losses import forward, split_batch


class NoCut(Exception):
    """The model cannot be cut, and why."""


@dataclass(frozen=True)
class Cut:
    """A model in two halves: `suffix(*prefix(inputs))` is what the model gives for these inputs."""

    suffix: nn.Module
    prefix: _Prefix
    how: str  # for people

    def activations(self, inputs: Any) -> tuple[Tensor, ...]:
        """What the suffix reads, for a batch of inputs: tensors [B, ...]."""
        return self.prefix(inputs)


class _Prefix:
    """A batch's inputs to the activations at the cut."""

    def __call__(self, inputs: Any) -> tuple[Tensor, ...]:
        raise NotImplementedError


def find_cut(model: nn.Module, sampled: Sequence[nn.Parameter], samples: Samples, at: str | None = None) -> Cut:
    """Cut a frozen model (eval mode, weights and data in place) before its first sampled weight.

    Args:
        samples: batches (inputs, targets) for one of the named losses.
        at: the name of the module to cut at, whose output must be the model's; None finds the cut.

    Raises:
        NoCut: there is nothing before the sampled weights, or no cut was found that gives the model's outputs.
        ValueError: `at` names no module, or one that does not hold all sampled weights.
    """
    few = split_batch(samples[few_of(samples)])[0]
    if at is not None:
        return _proven(_at_module(model, at, sampled), model, few)
    frozen = {id(p) for p in model.parameters()} - {id(p) for p in sampled}
    if not frozen:
        raise NoCut("all weights are sampled")
    reasons = []
    for attempt in (_by_tracing, _at_smallest_module):
        try:
            return _proven(attempt(model, sampled, few), model, few)
        except NoCut as reason:
            reasons.append(str(reason))
        except Exception as error:  # whatever tracing a stranger's model raises
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])
    raise NoCut("; ".join(dict.fromkeys(reasons)))


def _proven(cut: Cut, model: nn.Module, inputs: Any) -> Cut:
    """The cut, if both halves give the model's own outputs bit for bit, and leave the activations alone."""
    with torch.no_grad():
        whole = forward(model, inputs)
        activations = cut.activations(inputs)
        if not all(isinstance(part, Tensor) and part.ndim > 0 and len(part) == len(whole) for part in activations):
            raise NoCut("what passes the cut is not one tensor row per sample")
        versions = [part._version for part in activations]  # which torch counts up at every change in place
        if not torch.equal(forward(cut.suffix, activations), whole):
            raise NoCut("the halves do not give what the whole model gives")
        if [part._version for part in activations] != versions:
            raise NoCut("the rest of the model changes its inputs in place")
    return cut


# --- by tracing --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TracedPrefix(_Prefix):
    module: fx.GraphModule

    def __call__(self, inputs: Any) -> tuple[Tensor, ...]:
        if isinstance(inputs, Mapping):
            return self.module(**inputs)
        return self.module(*inputs) if isinstance(inputs, tuple | list) else self.module(inputs)


def _by_tracing(model: nn.Module, sampled: Sequence[nn.Parameter], inputs: Any) -> Cut:
    graph = fx.Tracer().trace(model, absent_arguments(model, inputs))
    moved = _nodes_that_move(graph, model, {id(p) for p in sampled})
    if not moved:
        raise NoCut("the sampled weights do not reach the output")
    frozen = [node for node in graph.nodes if node not in moved]
    crossing = [node for node in frozen if node.op != "get_attr" and any(user in moved for user in node.users)]
    worked = [
        node for node in frozen if node.op == "call_module" and any(True for _ in _module(model, node).parameters())
    ]
    if not worked:
        raise NoCut("no layer lies before the sampled weights")
    first = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in frozen:
        if node.op != "output":
            copies[node] = first.node_copy(node, lambda n: copies[n])
    first.output(tuple(copies[node] for node in crossing))
    last = fx.Graph()
    copies = {node: last.placeholder(f"activation_{i}") for i, node in enumerate(crossing)}
    for node in graph.nodes:
        if node in moved or (node.op == "get_attr" and any(user in moved for user in node.users)):
            copies[node] = last.node_copy(node, lambda n: copies[n])
    prefix = _TracedPrefix(fx.GraphModule(model, first))
    how = f"{len(worked)} layers before the first sampled weight run once"
    return Cut(fx.GraphModule(model, last), prefix, how)


def absent_arguments(model: nn.Module, inputs: Any) -> dict[str, Any] | None:
    """Arguments of a forward that a batch's inputs do not give: to be traced as their defaults."""
    if isinstance(inputs, Mapping):
        return defaults_of(model, 0, frozenset(inputs))
    return defaults_of(model, len(inputs) if isinstance(inputs, tuple | list) else 1, frozenset())


def defaults_of(model: nn.Module, positional: int, keywords: frozenset[str]) -> dict[str, Any] | None:
    """The defaults of a forward's arguments that a call does not give.

    Args:
        positional: how many arguments it gives by position.
        keywords: the names of those it gives by name.
    """
    left = list(inspect.signature(model.forward).parameters.values())[positional:]
    named = {p.name: p.default for p in left if p.name not in keywords and p.default is not p.empty}
    return named or None


def _nodes_that_move(graph: fx.Graph, model: nn.Module, sampled: set[int]) -> set[fx.Node]:
    """The nodes whose value depends on a sampled weight."""
    moved: set[fx.Node] = set()
    for node in graph.nodes:
        own = False
        if node.op == "call_module":
            own = any(id(p) in sampled for p in _module(model, node).parameters())
        elif node.op == "get_attr":
            own = id(_attribute(model, str(node.target))) in sampled
        if own or any(source in moved for source in node.all_input_nodes):
            moved.add(node)
    return moved


def _module(model: nn.Module, node: fx.Node) -> nn.Module:
    return model.get_submodule(str(node.target))


def _attribute(model: nn.Module, name: str) -> Any:
    owner, _, last = name.rpartition(".")
    return getattr(model.get_submodule(owner), last)


# --- at a module -------------------------------------------------------------------------------------------------


class _Reached(Exception):
    """Carries a module's inputs out of the model's forward pass."""


@dataclass(frozen=True)
class ModuleInputs(_Prefix):
    """The positional inputs of one module, whatever lies before it; the model runs that far."""

    model: nn.Module
    module: nn.Module

    def __call__(self, inputs: Any) -> tuple[Tensor, ...]:
        def stop(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if keywords:
                raise NoCut(f"the module is called with keywords ({', '.join(keywords)})")
            raise _Reached(arguments)

        handle = self.module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            forward(self.model, inputs)
        except _Reached as reached:
            return reached.args[0]
        finally:
            handle.remove()
        raise NoCut("the module is not called")


def _at_smallest_module(model: nn.Module, sampled: Sequence[nn.Parameter], inputs: Any) -> Cut:
    """At the smallest module that holds all sampled weights; the whole model is no cut."""
    wanted = {id(p) for p in sampled}
    holders = [
        name for name, module in model.named_modules() if name and wanted <= {id(p) for p in module.parameters()}
    ]
    if not holders:
        raise NoCut("no module but the model itself holds all sampled weights")
    return _at_module(model, max(holders, key=lambda name: name.count(".")), sampled)


def _at_module(model: nn.Module, name: str, sampled: Sequence[nn.Parameter]) -> Cut:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"frozen_prefix must be a bool or the name of a module, got {name!r}: {error}") from error
    if not {id(p) for p in sampled} <= {id(p) for p in module.parameters()}:
        raise ValueError(f"frozen_prefix: module {name!r} must hold all sampled parameters (see params=)")
    return Cut(module, ModuleInputs(model, module), f"everything before module {name!r} runs once")
