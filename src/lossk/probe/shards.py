"""A probe cut into shards between its forward batches, which are those that a process alone would evaluate."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lossk.probe.probe import Probe, ProbePart
from lossk.task.task import fitting_batch


@dataclass(frozen=True)
class ProbeShard(Probe):
    """A run of whole forward batches of a probe: each batch is the very one that a process alone would evaluate."""

    whole: Probe
    rows: slice  # of the kernel

    def describe(self, row: int) -> str:
        """A row of the shard, for messages."""
        return self.whole.describe(self.rows.start + row)


def cut_probe(probe: Probe, probe_batch: int, shards: int) -> list[ProbeShard]:
    """The probe in `shards` parts, cut between batches, as equal as batches allow; some may be empty."""
    batches = [
        (part, start, min(start + size, len(part.samples)))
        for part in probe.parts
        for size in [fitting_batch(probe_batch, part.positions)]
        for start in range(0, len(part.samples), size)
    ]
    total, done = sum(stop - start for _, start, stop in batches), 0
    dealt: list[list[tuple[ProbePart, int, int]]] = [[] for _ in range(shards)]
    for part, start, stop in batches:
        middle = done + (stop - start) / 2
        shard = dealt[min(math.floor(middle * shards / total), shards - 1)]
        if shard and shard[-1][0] is part and shard[-1][2] == start:
            shard[-1] = (part, shard[-1][1], stop)
        else:
            shard.append((part, start, stop))
        done += stop - start
    found, row = [], 0
    for shard in dealt:
        parts = tuple(_cut_part(part, start, stop) for part, start, stop in shard)
        rows = slice(row, row + sum(len(part) for part in parts))
        found.append(ProbeShard(parts, {}, probe, rows))
        row = rows.stop
    return found


def _cut_part(part: ProbePart, start: int, stop: int) -> ProbePart:
    if (start, stop) == (0, len(part.samples)):
        return part
    changes: dict[str, Any] = {"samples": part.samples.cut(slice(start, stop))}
    if part.tokens is not None:
        inside = (part.tokens[:, 0] >= start) & (part.tokens[:, 0] < stop)
        tokens = part.tokens[inside].clone()
        tokens[:, 0] -= start
        changes |= {"tokens": tokens, "name": f"{part.name}, counted from sample {start},"}
    return dataclasses.replace(part, **changes)
