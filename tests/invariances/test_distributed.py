"""Two ranks (and four, slow) against one process: traces and moments to the bit, tiles within rounding; a dead rank.

The bound on tiles is that of two orders of summation, test_streaming.py's: each is within (D + 12) u sqrt(K_ii K_jj)
of the exact sum, so they are within twice that of each other; in float16 by a rounding of each more.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import distributed_worker as worker
import lossk
import oracles
from lossk.plan.layout import in_store

pytestmark = pytest.mark.long("two processes go through all scenarios once, for all tests")
SCENARIOS = [
    "store",
    "shards",
    "metric",
    "pooled16",
    "tokens",
    "outofcore",
    "factor",
    "factor16",
    "heldfactor",
    "traces",
    "cross",
    "memory",
    "planned",
    "counted",
    "disagree",
    "taken",
    "refused",
    "another",
    "alone",
    "auto",
    "cli",
]
EXACT = ("losses", "mean", "variance", "scale", "chain_mean", "lag1")
WORKER = str(Path(worker.__file__))


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(WORKER).parent), **more}


def torchrun(ranks: int, folder: Path, scenarios: list[str]) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", WORKER, str(folder)]
    found = subprocess.run([*command, *scenarios], env=environment(), capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stderr + found.stdout


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios, by the same two processes."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "said").write_text(torchrun(2, folder, SCENARIOS))
    return folder


def said(folder: Path, scenario: str, ranks: int = 2) -> list[Any]:
    return [json.loads((folder / f"{scenario}-{rank}.json").read_text()) for rank in range(ranks)]


def alone(path: Path | None, **changes: Any) -> lossk.LossKernel:
    return lossk.build_kernel(worker.network(), worker.data(), out=path, **worker.settings(**changes))


def same_store(found: Path, expected: Path) -> None:
    """Traces and moments to the bit, tiles within rounding."""
    same_arrays(found, expected, EXACT)
    close(lossk.open(found), lossk.open(expected))


def same_arrays(found: Path, expected: Path, names: tuple[str, ...]) -> None:
    for name in names:
        a, b = (zarr.open_array(str(path / name), mode="r")[...] for path in (found, expected))
        np.testing.assert_array_equal(a, b, err_msg=name)


def close(a: lossk.LossKernel, b: lossk.LossKernel) -> None:
    sd = b.variance.sqrt().numpy()
    bound = 2 * (b.num_chains * b.num_draws + 12) * oracles.UNIT32 * np.outer(sd, sd)
    if b.dtype == "float16":
        scale = b.contents.moments.scale.numpy()
        bound = bound + 2.0**-10 * np.abs(b.to_numpy()) + 2.0**-24 * np.outer(scale, scale)
    assert a.dtype == b.dtype
    assert np.all(np.abs(a.to_numpy().astype(np.float64) - b.to_numpy()) <= bound)
    assert str(a.diagnostics) == str(b.diagnostics)


@pytest.mark.parametrize(
    ("scenario", "changes", "mesh"),
    [
        ("store", {}, (2, 1)),
        ("shards", {"num_chains": 1}, (1, 2)),
        ("metric", {"sampler": worker.in_a_metric()}, (2, 1)),
        ("pooled16", {"centering": "pooled", "dtype": "float16"}, (2, 1)),
        ("outofcore", {}, (2, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_two_ranks_equal_one(
    two: Path, tmp_path: Path, scenario: str, changes: dict[str, Any], mesh: tuple[int, int]
) -> None:
    """Side by side (a chain each) and shared (half the probe each, cut between batches); every rank has the store."""
    alone(tmp_path / "k.lossk", **changes)
    same_store(two / f"{scenario}.lossk", tmp_path / "k.lossk")
    first, second = said(two, scenario)
    assert first == second
    assert first["ranks"] == {"size": 2, "rows": mesh[0], "shards": mesh[1]}
    assert first["variance"] == lossk.open(tmp_path / "k.lossk").variance.tolist()
    left = [
        file.name for file in (two / f"{scenario}.lossk").iterdir() if "state" in file.name or "tiles-" in file.name
    ]
    assert left == []


def test_tiles_made_in_the_store_are_the_same_to_the_bit(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many make them: each is a product of the logged draws, in the order of chain and draw."""
    monkeypatch.setattr(
        "lossk.run.cost.choose_layout",
        lambda size, _, taken, **__: in_store(size, taken, super_panel=size.draws, stripes=2),
    )
    alone(tmp_path / "k.lossk")
    for file in (tmp_path / "k.lossk" / "tiles" / "c").glob("*/*"):
        found = two / "outofcore.lossk" / file.relative_to(tmp_path / "k.lossk")
        assert found.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("scenario", "changes"),
    [("factor", {}), ("factor16", {"dtype": "float16", "centering": "pooled", "num_chains": 1})],
    ids=["side by side", "shared probe"],
)
def test_the_factor_in_the_store_is_the_same_to_the_bit(
    two: Path, tmp_path: Path, scenario: str, changes: dict[str, Any]
) -> None:
    """Whoever writes which chunk of it: each is made of the logged draws and the moments; every rank has the store."""
    alone(tmp_path / "k.lossk", form="factor", **changes)
    same_arrays(two / f"{scenario}.lossk", tmp_path / "k.lossk", (*EXACT, "factor"))
    first, second = said(two, scenario)
    assert first == second
    assert lossk.open(two / f"{scenario}.lossk").form == "factor"


def test_a_factor_in_memory_is_on_every_rank(two: Path) -> None:
    expected, (first, second) = alone(None, form="factor"), said(two, "heldfactor")
    assert first == second
    assert first["variance"] == expected.variance.tolist()
    for rank in (0, 1):
        assert torch.equal(
            torch.load(two / f"heldfactor-{rank}.pt", weights_only=True), expected.contents.blocks.factor
        )


def test_traces_are_on_every_rank(two: Path) -> None:
    """`sample_losses`, of which every rank has all draws, to the bit those of one process; and what is made of them."""
    asked = {key: value for key, value in worker.settings().items() if key not in ("tile", "panel")}
    expected = lossk.sample_losses(worker.network(), worker.data(), **asked)
    for rank, told in enumerate(said(two, "traces")):
        losses, excess = torch.load(two / f"traces-{rank}.pt", weights_only=True)
        assert torch.equal(losses, expected.losses)
        assert torch.equal(excess, expected.excess)
        assert told == {
            "n_beta": expected.n_beta,
            "ranks": {"size": 2, "rows": 2, "shards": 1},
            "config": sorted(expected.meta["config"]),
        }
    cross = lossk.cross_kernel(worker.network(), worker.data(), worker.data(20), **asked)
    assert said(two, "cross") == [cross[:, :].tolist()] * 2


def test_tokens(two: Path, tmp_path: Path) -> None:
    """Shards of unmasked tokens, unequal in number, and a tile that only one rank has."""
    model, samples, loss = worker.tokens()
    settings = worker.settings(num_chains=1, tile=4096)
    lossk.build_kernel(model, samples, loss=loss, out=tmp_path / "k.lossk", **settings)
    same_store(two / "tokens.lossk", tmp_path / "k.lossk")
    assert torch.equal(lossk.open(two / "tokens.lossk").tokens, lossk.open(tmp_path / "k.lossk").tokens)


def test_in_memory(two: Path) -> None:
    """Without a store rank 0 has the kernel; the other knows the moments, and says where the entries are."""
    expected, (first, second) = alone(None), said(two, "memory")
    assert first["variance"] == second["variance"] == expected.variance.tolist()
    assert first["llc"] == second["llc"] == expected.diagnostics.llc
    assert "error" not in first
    assert "rank 0" in second["error"]
    sd = expected.variance.sqrt().numpy()
    found = torch.load(two / "memory.pt", weights_only=True).double().numpy()
    bound = 2 * (worker.CHAINS * worker.DRAWS + 12) * oracles.UNIT32 * np.outer(sd, sd)
    assert np.all(np.abs(found - expected.to_numpy()) <= bound)


def test_passes_over_the_training_samples_are_shared(two: Path) -> None:
    """The losses and the gradient at w*: each rank has half of them, to within a part of 1,024, to the same bits."""
    expected, found = worker.counted(), said(two, "counted")
    for rank in found:
        assert rank["losses"] == expected["losses"]
        assert rank["samples"] <= expected["samples"] / 2 + 1024
    assert sum(rank["samples"] for rank in found) <= expected["samples"] + 1024
    for told in (expected, *found):
        *stages, total = told["timings"].values()
        assert 0.9 * total <= sum(stages) <= total + 0.01
        assert all(seconds >= 0 for seconds in stages)
    assert {"start", "wait"} <= set(found[1]["timings"])


def test_what_rank_0_chooses_holds_for_all(two: Path) -> None:
    first, second = said(two, "auto")
    assert first["sampler"] == second["sampler"]
    assert first["passes"] == second["passes"]
    assert first["variance"] == second["variance"]


def test_ranks_plan_as_one_process_does(two: Path) -> None:
    """Batches that fit, the same on all; the plan counts passes and the pilot."""
    first, second = said(two, "planned")
    assert first["passes"] == second["passes"]
    assert 0 < first["passes"]["probe_batch"] < 1000
    planned, least, reached, passes = first["seen"]
    assert planned >= least
    assert reached > passes > 0
    assert passes < 60e6 / 4
    assert second["seen"] == []
    assert first["variance"] == second["variance"] > 0


def test_refusals_reach_every_rank(two: Path) -> None:
    for text in said(two, "disagree"):
        assert "rank 1 has another 'num_samples' (149, rank 0 150)" in text
    first, second = said(two, "taken")
    assert first.startswith("FileExistsError: ")
    assert second.startswith("DistributedError: rank 0 stopped: ")
    assert "store.lossk" in first
    assert "store.lossk" in second
    first, second = said(two, "refused")
    assert first.startswith("MemoryError: a rank of 2 needs ")
    assert second.startswith("DistributedError: rank 0 stopped: a rank of 2 needs ")
    first, second = said(two, "another")
    assert first.startswith("StoreError: ")
    assert "num_draws: saved 6, now 7" in first
    assert "num_draws: saved 6, now 7" in second


def test_distributed_false(two: Path) -> None:
    assert said(two, "alone") == [None, None]


def test_command_line(two: Path, tmp_path: Path) -> None:
    """`lossk run` by both ranks: one story, one store; the second time a refusal that names the rank."""
    assert [found[:3] for found in said(two, "cli")] == [[0, 2, 0], [0, 2, 0]]  # the third time it overwrites
    text = (two / "said").read_text()
    assert text.count("wrote ") == 2
    assert text.count("LossKernel(") == 2
    assert not list(two.glob(".cli.lossk*"))
    assert "by rank 0" in text
    assert "by rank 1" not in text
    assert "lossk: rank 1: rank 0 stopped" in text
    alone(tmp_path / "k.lossk")
    same_store(two / "cli.lossk", tmp_path / "k.lossk")
    assert (two / "cli.yaml").exists()


def test_insisting_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="distributed=True needs the processes of torchrun"):
        alone(None, distributed=True)


def start_ranks(folder: Path, ranks: int, scenario: str) -> list[subprocess.Popen[str]]:
    """Ranks without torchrun, which would end the others before they have said why."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    return [
        subprocess.Popen(
            [sys.executable, WORKER, str(folder), scenario],
            env=environment(**where, RANK=str(rank)),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]


@pytest.fixture(scope="module")
def bereaved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """A store whose rank 1 was killed in the middle of its chain, what rank 0 said, and its exit status."""
    folder = tmp_path_factory.mktemp("bereaved")
    first, second = start_ranks(folder, 2, "die")
    error = first.communicate(timeout=120)[1]
    killed = second.communicate(timeout=120)[1]
    assert second.returncode == -9, killed
    return folder / "die.lossk", error, first.returncode


def test_a_dead_rank_ends_the_others_by_name(bereaved: tuple[Path, str, int]) -> None:
    _, error, status = bereaved
    assert status == 1
    assert "DistributedError: rank 1 (process " in error
    assert "has stopped" in error
    assert "resume=True" in error


def test_one_process_goes_on_where_two_stopped(bereaved: tuple[Path, str, int], tmp_path: Path) -> None:
    """Two chains side by side, neither finished: both go on from their own states, to the bitwise same traces."""
    path = tmp_path / "k.lossk"
    shutil.copytree(bereaved[0], path)
    with pytest.raises(lossk.StoreError, match=r"unfinished: [48] of 12 draws"):
        lossk.open(path)
    loss = worker.KillAt(None)
    lossk.build_kernel(worker.network(), worker.data(), loss=loss, out=path, resume=True, **worker.settings())
    lossk.build_kernel(worker.network(), worker.data(), loss=loss, out=tmp_path / "whole.lossk", **worker.settings())
    same_store(path, tmp_path / "whole.lossk")


def test_lines_of_one_commit_count_together(bereaved: tuple[Path, str, int], tmp_path: Path) -> None:
    """A kill can leave the first line of two: the panels of both ranks are made again."""
    path = tmp_path / "k.lossk"
    shutil.copytree(bereaved[0], path)
    lines = (path / "commits.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) % 2 == 0
    (path / "commits.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    with pytest.raises(lossk.StoreError, match=f"{2 * (len(lines) - 2)} of 12 draws|no draws"):
        lossk.open(path)


# --- how work is dealt -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_ranks_equal_one(tmp_path: Path, bereaved: tuple[Path, str, int]) -> None:
    """Two chains, each shared by two ranks; one chain shared by four; and four ranks that finish what two began."""
    shutil.copytree(bereaved[0], tmp_path / "finish.lossk")
    torchrun(4, tmp_path, ["store", "shards", "outofcore", "factor", "finish"])
    for scenario, changes in (("store", {}), ("shards", {"num_chains": 1}), ("outofcore", {})):
        alone(tmp_path / "alone" / f"{scenario}.lossk", **changes)
        same_store(tmp_path / f"{scenario}.lossk", tmp_path / "alone" / f"{scenario}.lossk")
    alone(tmp_path / "alone" / "factor.lossk", form="factor")
    same_arrays(tmp_path / "factor.lossk", tmp_path / "alone" / "factor.lossk", (*EXACT, "factor"))
    assert said(tmp_path, "store", 4)[3]["ranks"] == {"size": 4, "rows": 2, "shards": 2}
    assert said(tmp_path, "shards", 4)[3]["ranks"] == {"size": 4, "rows": 1, "shards": 4}
    loss = worker.KillAt(None)
    whole = tmp_path / "alone" / "whole.lossk"
    lossk.build_kernel(worker.network(), worker.data(), loss=loss, out=whole, **worker.settings())
    same_store(tmp_path / "finish.lossk", whole)


@pytest.mark.slow
def test_two_ranks_go_on_where_two_stopped(tmp_path: Path, bereaved: tuple[Path, str, int]) -> None:
    """With as many ranks as before, the tiles too are those of two ranks left alone, to the bit."""
    shutil.copytree(bereaved[0], tmp_path / "finish.lossk")
    torchrun(2, tmp_path, ["finish", "whole"])
    files = [file.relative_to(tmp_path / "whole.lossk") for file in (tmp_path / "whole.lossk").glob("*/c/**/*")]
    assert len(files) > 10
    for file in files:
        if (tmp_path / "whole.lossk" / file).is_file():
            assert (tmp_path / "finish.lossk" / file).read_bytes() == (tmp_path / "whole.lossk" / file).read_bytes()
