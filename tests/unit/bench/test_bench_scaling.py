"""`bench.scaling`'s page and the model of the study `simulate_scaling`: consistent, and with lossk's dealing."""

from __future__ import annotations

import math
from typing import Any

import pytest
from bench import scaling
from bench.studies import simulate_scaling
from bench.studies.simulate_scaling import CHAINS, DRAWS, NETWORKS, TILE, Device, forecast


def record(seconds: float, losses: str, rows: int, shards: int) -> dict[str, Any]:
    timings = {"anchor": 0.6, "fit": 0.4, "gradient": 4.0, "step": 0.5, "probe": 3.0, "update": 0.5}
    timings |= {"wait": 0.1, "store": 0.1}
    mesh = {"size": rows * shards, "rows": rows, "shards": shards}
    return {"seconds": seconds, "timings": timings, "ranks": mesh, "losses": losses, "cpu_seconds": seconds}


@pytest.mark.parametrize(("digest", "verdict"), [("a", "the same"), ("b", "DIFFERENT")])
def test_the_page_of_scaling(digest: str, verdict: str) -> None:
    found = {}
    for name, mesh in zip(scaling.CASES, [(2, 1), (1, 2)], strict=True):
        found |= {f"{name}|1": [record(10.0, "a", 1, 1)], f"{name}|2": [record(5.0, digest, *mesh)]}
    page = scaling.section(found)
    assert page.count(f"| 2.00 | 10.0 s | 5.0 s | 2.00 | 0.6 / 0.4 / 4.0 / 3.0 / 0.1 / 0.5 / 0.1 | {verdict} |") == 2
    # 10 s, of which 4.5 are shared by rows, 4.5 by ranks, and 1 by nobody
    checked = simulate_scaling.check({"found": found})
    assert "| 5.5 s | 5.0 s | -9% |" in checked
    assert "| 7.8 s | 5.0 s | -35% |" in checked


@pytest.mark.parametrize("num_samples", NETWORKS)
def test_the_model_shares_work(num_samples: int) -> None:
    """Probe, update over all ranks, steps over chains; the largest share is a tile above the fair one at most."""
    one, many = (forecast(num_samples, ranks, Device(), tiles=True) for ranks in (1, 64))
    assert math.isclose(one.probe / many.probe, 64)
    assert math.isclose(one.steps / many.steps, CHAINS)
    assert one.gather == 0
    assert many.gather == pytest.approx(4 * CHAINS * DRAWS * num_samples * 63 / 64 / Device().link)
    assert one.tile_bytes // 64 <= many.tile_bytes <= one.tile_bytes / 64 + 4 * TILE**2
    assert one.update / many.update == pytest.approx(one.tile_bytes / many.tile_bytes)
    assert 2 * num_samples**2 < one.tile_bytes < 2.4 * num_samples**2


def test_the_page_says_what_it_is() -> None:
    page = simulate_scaling.SOURCES + simulate_scaling.section(Device())
    assert "simulation" in page
    assert "nan" not in page
    assert page.count("| 64 |") == len(NETWORKS)
