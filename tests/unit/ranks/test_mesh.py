"""How work is dealt over ranks: chains, panels, tiles, batches, probe shards; and how their time is counted."""

from __future__ import annotations

import time

import pytest
import torch

from lossk.probe.probe import Probe, ProbePart
from lossk.probe.shards import cut_probe
from lossk.ranks.mesh import Mesh, choose_mesh, deal_batches, deal_chains, deal_tiles, schedule, tile_shapes
from lossk.timings import Timings


def test_the_mesh_is_the_quickest() -> None:
    """Chains side by side first; ranks beyond them share a chain; between the two, steps are weighed against passes."""
    even = [50] * 4
    assert choose_mesh(1, even, 1.0, 1.0) == Mesh(1, 1)
    assert choose_mesh(2, even, 1.0, 1.0) == Mesh(2, 1)
    assert choose_mesh(8, even, 1.0, 1.0) == Mesh(4, 2)
    assert choose_mesh(64, even, 1.0, 10.0) == Mesh(4, 16)
    assert choose_mesh(3, even, 10.0, 1.0) == Mesh(3, 1)
    assert choose_mesh(3, even, 1.0, 10.0) == Mesh(1, 3)
    assert choose_mesh(4, [50], 1.0, 1.0) == Mesh(1, 4)
    assert choose_mesh(2, [], 1.0, 1.0) == Mesh(1, 2)


def test_chains_and_panels_are_dealt_once() -> None:
    dealt = deal_chains([0, 2, 3, 4], Mesh(2, 2))
    assert dealt == [[0, 3], [2, 4]]
    items = [item for row in schedule(dealt, {0: 4, 2: 0, 3: 9}, 4, 10) for item in row]
    made = sorted((item.chain, item.first_draw + i) for item in items for i in range(item.count))
    assert made == [(c, d) for c, first in ((0, 4), (2, 0), (3, 9), (4, 0)) for d in range(first, 10)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(("n", "side"), [(5, 16), (150, 64), (1031, 100)])
def test_tiles_are_dealt_by_area(ranks: int, n: int, side: int) -> None:
    shapes = tile_shapes([slice(start, min(start + side, n)) for start in range(0, n, side)])
    dealt = deal_tiles(shapes, ranks)
    assert [key for keys in dealt for key in keys] == list(shapes)
    areas = [sum(shapes[key][0] * shapes[key][1] for key in keys) for keys in dealt]
    largest = max(a * b for a, b in shapes.values())
    assert all(abs(area - sum(areas) / ranks) <= largest for area in areas)


@pytest.mark.parametrize(("samples", "batch", "shares"), [(150, 32, 2), (150, 32, 9), (7, 8, 3), (4097, 1024, 4)])
def test_batches_are_dealt_evenly(samples: int, batch: int, shares: int) -> None:
    spans = deal_batches(samples, batch, shares)
    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(samples))
    assert len(spans) == shares
    assert spans[0].stop > 0
    assert all(span.start % batch == 0 for span in spans if span.start < span.stop)
    sizes = [-(-(span.stop - span.start) // batch) for span in spans]
    assert max(sizes) - min(sizes) <= 1


def test_a_stage_within_another_counts_once() -> None:
    timings = Timings()
    with timings.measure("outer"):
        with timings.measure("inner"):
            time.sleep(0.05)
        with timings.measure("inner"), timings.measure("innermost"):
            time.sleep(0.02)
    with timings.measure("outer"):
        time.sleep(0.01)
    assert timings.seconds["inner"] >= 0.05
    assert timings.seconds["innermost"] >= 0.02
    assert 0.01 <= timings.seconds["outer"] < 0.05


@pytest.mark.parametrize("shards", [1, 2, 3, 9])
def test_shards_are_whole_batches(shards: int) -> None:
    """Two sets, one shorter than a batch: every batch is one of those that a process alone would evaluate."""
    from lossk.data.data import Samples

    parts = tuple(ProbePart(f"set {n}", Samples((torch.arange(n),), n)) for n in (150, 10))
    probe = Probe(parts, {})
    cut = cut_probe(probe, 32, shards)
    assert [span for shard in cut for span in range(*shard.rows.indices(160))] == list(range(160))
    whole = [batch[0].tolist() for part in parts for _, batch in part.samples.batches(32)]
    found = [batch[0].tolist() for shard in cut for part in shard.parts for _, batch in part.samples.batches(32)]
    assert found == whole
    for shard in cut:
        assert all(shard.describe(row) == probe.describe(shard.rows.start + row) for row in range(len(shard)))


# --- four ranks ------------------------------------------------------------------------------------------------------
