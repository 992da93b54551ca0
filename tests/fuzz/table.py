"""The table of public callables: what there is, found by looking, and a valid call of each, from `table_*.py`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lossk

from .judge import Entry
from .rules import Rule, parameters, rules_of

PACKAGES = ("lossk.analysis", "lossk.interop", "lossk.recipes", "lossk.ops")

# Modules whose names nobody needs from outside: parts of the ones beside them, called with what these have checked.
INTERNAL = {
    "lossk.analysis.inputs": "the checkers of what analyses are given",
    "lossk.analysis.pairs": "how kernels, arrays and features are read in blocks",
    "lossk.analysis.tables": "writes the tables of the command line",
    "lossk.interop.devinterp1_callback": "public by lossk.interop.devinterp",
    "lossk.interop.devinterp1_sgld": "public by lossk.interop.devinterp",
    "lossk.interop.devinterp2_bif": "public by lossk.interop.devinterp",
    "lossk.interop.devinterp2_sample": "public by lossk.interop.devinterp",
    "lossk.interop.devinterp2_tree": "public by lossk.interop.devinterp",
    "lossk.interop.devinterp2_inputs": "the checkers behind `sample`",
    "lossk.interop.devinterp2_chain": "the chain behind `sample`",
    "lossk.interop.devinterp2_loss": "the loss behind `sample`",
    "lossk.interop.devinterp2_settings": "the settings behind `sample`",
    "lossk.interop.weight_states": "how `kernel_from_weights` reads a state",
    "lossk.ops.extension": "loads the compiled extension, which has no arguments",
    "lossk.ops.self_test_numbers": "numbers of the self-tests",
    "lossk.recipes.arguments": "the checkers of what recipes are given",
    "lossk.recipes.arithmetic": "networks of the multitask recipe",
    "lossk.recipes.huggingface": "loads a model for the text recipe",
    "lossk.recipes.idx": "reads files for the fashion recipe",
    "lossk.recipes.networks": "networks of the imagenet recipe",
    "lossk.recipes.photo_cache": "files of the imagenet recipe",
    "lossk.recipes.photos": "files of the imagenet recipe",
    "lossk.recipes.text_data": "sequences of the text recipe",
    "lossk.recipes.transformer": "the network of the text recipe",
    "lossk.recipes.words": "the vocabulary of the text recipe",
}

# Single names of public modules, for the same reason.
PARTS = {
    "lossk.analysis.alignment.range_names",
    "lossk.analysis.baselines.spans_of",
    "lossk.analysis.class_matrix.as_class_matrix",
    "lossk.analysis.gradients.check_module",
    "lossk.analysis.gradients.frozen",
    "lossk.analysis.gradients.gradient_batches",
    "lossk.analysis.gradients.losses_of",
    "lossk.analysis.gradients.read_data",
    "lossk.analysis.hierarchy.pair_sums",
    "lossk.analysis.spectrum.frobenius_squared",
    "lossk.analysis.taxonomy.Taxonomy.of_graph",
    "lossk.interop.weights.WeightLoader",
    "lossk.ops.head_loss.head_loss_reference",
    "lossk.ops.head_loss.self_test",
    "lossk.ops.philox.check_uint32",
    "lossk.ops.rank_update.rank_update_triangle_reference",
    "lossk.ops.rank_update.self_test",
    "lossk.ops.sample_loss.check_targets_and_out",
    "lossk.ops.sample_loss.cross_entropy_reference",
    "lossk.ops.sample_loss.sample_loss_reference",
    "lossk.ops.sample_loss.self_test",
    "lossk.ops.sgld_step.self_test",
    "lossk.ops.sgld_step.sgld_step_reference",
    "lossk.ops.top_correlations.merge_tile_reference",
    "lossk.ops.top_correlations.self_test",
    "lossk.recipes.fashion.epoch_files",
    "lossk.recipes.fashion.read_fashion",
    "lossk.recipes.imagenet.thumbnails",
    "lossk.recipes.imagenet.top1",
    "lossk.recipes.multitask.accuracy",
    "lossk.recipes.multitask.make_network",
    "lossk.recipes.multitask.train",
    "lossk.recipes.text.SequenceLoss",
}

OPERATORS = ("__call__", "__getitem__", "__matmul__")


def public_callables() -> list[str]:
    """Dotted names of everything that a user may call with arguments."""
    found = [*_names_of("lossk", [*lossk.__all__, "open"]), *_names_of("lossk.report", ["write_report"])]
    for package in PACKAGES:
        found += _names_of(package, _own_names(package))
        for info in pkgutil.iter_modules([str(Path(importlib.import_module(package).__file__ or "").parent)]):
            name = f"{package}.{info.name}"
            if name not in INTERNAL and not info.name.startswith("_"):
                found += _names_of(name, _own_names(name))
    return [name for name in found if not any(name == part or name.startswith(f"{part}.") for part in PARTS)]


def _own_names(module_name: str) -> list[str]:
    module = importlib.import_module(module_name)
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = {name: item for name, item in vars(module).items() if getattr(item, "__module__", None) == module_name}
    return [name for name, item in own.items() if not name.startswith("_") and callable(item)]


def _names_of(module_name: str, names: list[str]) -> list[str]:
    module, found = importlib.import_module(module_name), []
    for name in names:
        item = getattr(module, name)
        if inspect.isclass(item):
            found += _of_class(f"{module_name}.{name}", item)
        elif inspect.isroutine(item) and parameters(item):
            found.append(f"{module_name}.{name}")
    return found


def _of_class(name: str, kind: type) -> list[str]:
    """A class that a user makes, and its methods; errors, protocols, aliases and named tuples are Python's own."""
    if issubclass(kind, BaseException | tuple) or getattr(kind, "_is_protocol", False):
        return []
    found = [name] if inspect.signature(kind).parameters else []
    for key, item in vars(kind).items():
        plain = item.__func__ if isinstance(item, classmethod | staticmethod) else item
        if inspect.isfunction(plain) and (key in OPERATORS or not key.startswith("_")):
            takes = [p for p in parameters(plain) if p not in ("self", "cls")]
            found += [f"{name}.{key}"] if takes else []
    return found


class Table:
    """Entries by name, as the `table_*` modules add them."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def add(
        self,
        name: str,
        arguments: Mapping[str, Any] | Callable[[], dict[str, Any]],
        rules: Mapping[str, Rule] | None = None,
        *,
        function: Callable[..., Any] | None = None,
        on: Any = None,
        words: Mapping[str, tuple[str, ...]] | None = None,
        work: tuple[str, ...] = (),
    ) -> None:
        """One callable: a valid call, and the rules that annotations do not give.

        Args:
            on: the object, or a function that makes one, whose method it is.
            function: what to call instead, where the callable itself takes **keywords.
        """
        if function is None:
            function = _found(name) if on is None else getattr(on, name.rpartition(".")[2])
        make = arguments if callable(arguments) else lambda: dict(arguments)
        known = rules_of(function, rules or {})
        self.entries[name] = Entry(name, function, make, known, words or {}, work)


def _found(name: str) -> Callable[..., Any]:
    """The object of a dotted name: the longest importable module, then attributes."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise LookupError(name)
