"""A process alone is a world of one: whatever a run asks of several ranks, it answers with what it was given."""

from __future__ import annotations

import inspect
import os

import pytest
import torch

from lossk.ranks.distributed import Ranks, gather_tiles, joined
from lossk.ranks.world import World
from lossk.timings import Timings

ONLY_OF_SEVERAL = {"broadcast_json", "leave_device", "watched"}  # what their collectives consist of


def methods(of: type) -> dict[str, inspect.Signature]:
    found = inspect.getmembers(of, inspect.isfunction)
    return {name: inspect.signature(function) for name, function in found if not name.startswith("_")}


def test_both_worlds_are_asked_the_same() -> None:
    alone, several = methods(World), methods(Ranks)
    assert several.keys() - alone.keys() == ONLY_OF_SEVERAL
    assert {name: several[name] for name in alone} == alone
    assert all(name in vars(Ranks) for name in alone)  # none is inherited, to do nothing among several


def test_a_collective_of_one_returns_what_it_is_given() -> None:
    made, tensor = object(), torch.arange(3.0)
    with joined(False) as world:
        assert (world.rank, world.size, world.local_size, world.first) == (0, 1, 1, True)
        assert world.decide(lambda: made) is made
        assert world.first_makes(lambda: made) is made
        assert world.together(lambda: made) is made
        assert world.gather_json({"a": 1}) == [{"a": 1}]
        assert world.broadcast(tensor, 0) is tensor
        assert world.own_device("cuda") == "cuda"
        assert world.begin(Timings(), 3.0) == 3.0
        world.exchange_spans(tensor, [slice(0, 3)])
        assert tensor.tolist() == [0.0, 1.0, 2.0]
        tiles = {(0, 0): tensor}
        assert gather_tiles(world, tiles, {(0, 0): (1, 3)}, [[(0, 0)]], torch.float32) is tiles
        with pytest.raises(MemoryError, match="none left"):
            world.together(refuse)


def refuse() -> None:
    raise MemoryError("none left")


def test_a_process_that_nobody_launched_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delitem(os.environ, name, raising=False)
    with joined(None) as world:
        assert type(world) is World
