"""Where the tiles of a run live, or what it holds instead of them: one value a place, with what follows from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One place.

    Attributes:
        name: as a store's config has it.
        makes: what the run ends in: "tiles", "traces" or a "factor".
        where: the place of these, in words.
        of_log: they are made at the end, from the draws read back from the log.
        stage: of a run, whose time counts their making.
    """

    name: str
    makes: str
    where: str
    of_log: bool = False
    stage: str = "update"

    @property
    def has_tiles(self) -> bool:
        """Whether the run ends in tiles, and not in traces or their factor."""
        return self.makes == "tiles"

    def __str__(self) -> str:
        return f"{self.makes} in {self.where}"


MEMORY = Place("memory", "tiles", "memory")
DEVICE = Place("device", "tiles", "the device's memory")
STORE = Place("store", "tiles", "the store", of_log=True, stage="tiles")
TRACES = Place("traces", "traces", "memory")  # held, and a factor in their place at the end
FACTOR = Place("factor", "factor", "the store", of_log=True, stage="store")
BY_NAME = {place.name: place for place in (MEMORY, DEVICE, STORE, TRACES, FACTOR)}
