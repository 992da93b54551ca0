"""All entries, over one world in a folder."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from lossk.errors import MissingPackageError

from . import commands, table_analysis, table_baselines, table_core, table_interop, table_ops, table_recipes
from .judge import Entry, Outcome, Reached, call, streams, try_value
from .table import Table, public_callables
from .values import VALUES
from .world import World


def catalog(folder: Path) -> dict[str, Entry]:
    """The entries of every group, by name; the objects they share lie in `folder`."""
    table, world = Table(), World(folder)
    for part in (table_core, table_analysis, table_baselines, table_interop, table_recipes, table_ops):
        part.add_to(table, world)
    lines = [*commands.options(world), *commands.keys(world)]
    return table.entries | {entry.name: entry for entry in lines}


def unknown(entries: Mapping[str, Entry]) -> tuple[list[str], list[str]]:
    """(public callables without an entry, entries of what is not public any more)."""
    found = public_callables()
    return sorted(set(found) - set(entries)), sorted(name for name in set(entries) - set(found) if "." in name)


def broken(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Entries whose valid call fails, or moves a global random stream, and how."""
    failed = {}
    for name, entry in entries.items():
        arguments = entry.arguments()
        before = streams()
        try:
            with contextlib.suppress(Reached):
                call(entry, arguments)
        except MissingPackageError:
            continue  # an extra that is not installed: what is refused before it is still seen
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
        else:
            if streams() != before and name not in MOVE_STREAMS:
                failed[name] = "moved a global state"
    return failed


# Draws the key of its noise from torch's global generator, which devinterp has seeded: documented.
MOVE_STREAMS = {"lossk.interop.devinterp.LangevinOptimizer.step"}


def everything(entries: Mapping[str, Entry]) -> Iterator[Outcome]:
    """Every parameter of every callable with every value; then every option and key of the command line."""
    for entry in entries.values():
        for parameter in entry.rules:
            for text in entry.texts:
                yield try_value(entry, parameter, given=text)
            for value in () if entry.texts else VALUES:
                yield try_value(entry, parameter, value)


def seed_streams() -> None:
    """Global streams of the fuzz's own, so that what moves them is seen."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - it is the global stream that is looked at
    torch.manual_seed(0)


__all__ = ["broken", "catalog", "commands", "everything", "seed_streams", "unknown"]
