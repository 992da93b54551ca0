"""Tiles updated by the Triton kernel, in every precision, where they lie or visiting a device; and their neighbors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lossk
from lossk.accumulate.host_tiles import HostTiles
from lossk.accumulate.tiles import TileAccumulator
from lossk.ops.rank_update import PRECISIONS

Build = Callable[..., lossk.LossKernel]
CHAINS, DRAWS, N = 2, 7, 37
UNIT = {"fp32": 2.0**-24, "tf32": 2.0**-11, "tf32x3": 2.0**-21, "fp16": 2.0**-11, "bf16": 2.0**-8}


def losses(growth: float = 1.0) -> Tensor:
    """[C, T, N]: correlated, over six orders of magnitude, one dead; the later chain varies `growth` times more."""
    shared = torch.randn(CHAINS, DRAWS, 2) @ torch.randn(2, N)
    traces = (shared + torch.randn(CHAINS, DRAWS, N)) * 10.0 ** torch.linspace(-4, 2, N) + 3.0
    traces = traces * torch.tensor([1.0, growth]).view(-1, 1, 1)
    traces[:, :, 11] = 0.5
    return traces.float()


def fill(accumulator: TileAccumulator, traces: Tensor, panel: int = 3) -> lossk.LossKernel:
    for chain, draws in enumerate(traces):
        for part in draws.split(panel):
            accumulator.update(chain, part)
    blocks, moments = accumulator.finalize()
    return lossk.LossKernel(blocks, moments)


def truth(traces: Tensor, centering: str) -> Tensor:
    wide = traces.double()
    if centering == "chain":
        centered = (wide - wide.mean(dim=1, keepdim=True)).flatten(0, 1)
        return centered.T @ centered / (CHAINS * (DRAWS - 1))
    centered = (wide - wide.mean(dim=(0, 1))).flatten(0, 1)
    return centered.T @ centered / (CHAINS * DRAWS - 1)


def settings(centering: str = "chain", **changes: Any) -> dict[str, Any]:
    return {"num_chains": CHAINS, "num_draws": DRAWS, "centering": centering, **changes}


def assert_near(kernel: lossk.LossKernel, traces: Tensor, centering: str, unit: float) -> None:
    """|error| <= ((D + 12) 2^-24 + 2 unit) sqrt(K_ii K_jj), as in test_streaming, and two roundings of each factor."""
    expected = truth(traces, centering)
    size = expected.diagonal().sqrt()
    bound = ((CHAINS * DRAWS + 12) * 2.0**-24 + 2 * unit) * size.unsqueeze(1) * size + 1e-37
    assert ((kernel[:, :].double() - expected).abs() <= bound).all()


@pytest.mark.parametrize(("precision", "centering"), [*((p, "chain") for p in PRECISIONS), ("fp16", "pooled")])
def test_every_precision_against_float64(triton_device: torch.device, precision: str, centering: str) -> None:
    traces = losses()
    options = settings(centering, backend="triton", precision=precision, device=triton_device)
    kernel = fill(TileAccumulator(N, 16, **options), traces.to(triton_device))
    assert_near(kernel, traces, centering, UNIT[precision])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_samples_that_outgrow_their_scale(triton_device: torch.device, precision: str) -> None:
    """A chain that varies a million times more: in float16 its entries would be infinite at the old scale."""
    traces = losses(growth=1e6)
    options = settings(backend="triton", precision=precision, device=triton_device)
    kernel = fill(TileAccumulator(N, 16, **options), traces.to(triton_device))
    assert_near(kernel, traces, "chain", UNIT[precision])


@pytest.mark.parametrize("waiting", [1, 8, 1000])
@pytest.mark.parametrize("centering", ["chain", "pooled"])
def test_tiles_in_host_memory(waiting: int, centering: str) -> None:
    """However many rows wait for the tiles' visit, and whatever outgrows its scale meanwhile."""
    for growth in (1.0, 1e6):
        traces = losses(growth)
        kernel = fill(HostTiles(N, 16, waiting=waiting, **settings(centering)), traces)
        assert_near(kernel, traces, centering, 0.0)


def test_tiles_in_host_memory_by_the_kernel(triton_device: torch.device) -> None:
    traces = losses()
    options = settings("pooled", backend="triton", precision="bf16", device=triton_device)
    kernel = fill(HostTiles(N, 16, waiting=6, **options), traces)
    assert_near(kernel, traces, "pooled", UNIT["bf16"])
    assert kernel.contents.blocks.device.type == "cpu"


def test_with_all_rows_waiting_tiles_make_one_journey(monkeypatch: pytest.MonkeyPatch) -> None:
    journeys = []
    monkeypatch.setattr("lossk.accumulate.host_tiles.add_rows", lambda tile, key, *rest, **_: journeys.append(key))
    rows = CHAINS * DRAWS + CHAINS * 3
    fill(HostTiles(N, 16, waiting=rows, **settings()), losses())
    assert sorted(journeys) == [(i, j) for i in range(3) for j in range(i, 3)]


def test_a_build_says_how_it_updated(build: Build, problem: Any, triton_device: torch.device) -> None:
    """With fp32 products the kernel is the reference within rounding; with bf16 ones it is off, as bf16 allows."""
    short = {"sampler": lossk.Gaussian(sigma=0.1), "num_draws": 4}
    data = problem.data
    reference = build(problem.model(), data, **short)
    variance = reference.variance.double().sqrt()
    size = variance.unsqueeze(1) * variance
    for precision, least, most in (("fp32", 0.0, 5e-4), ("bf16", 1e-4, 2.0**-6)):
        passes = lossk.Passes(update_precision=precision, fused_head=False)
        kernel = build(problem.model().to(triton_device), data, backend="triton", passes=passes, **short)
        worst = float(((kernel[:, :] - reference[:, :]).double().abs() / size).amax())
        assert least <= worst <= most
        assert kernel.meta["passes"]["update_precision"] == precision
        assert set(kernel.meta["ops"].values()) == {"triton"}
    assert set(reference.meta["ops"].values()) == {"torch"}


def test_update_precision_is_one_of_the_ops() -> None:
    with pytest.raises(ValueError, match=r"update_precision must be one of .* got 'fp8'"):
        lossk.Passes(update_precision="fp8")  # type: ignore[arg-type]


# --- neighbors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tiles", "float16", "factor", "stored"])
def test_neighbors_by_the_kernel_are_the_same_within_a_rounding(form: str, tmp_path: Path) -> None:
    traces = losses()
    if form == "factor":
        kernel = lossk.LossKernel.from_traces(lossk.LossTraces(traces))
    else:
        dtype = "float16" if form == "float16" else "float32"
        kernel = fill(TileAccumulator(N, 16, **settings(dtype=dtype)), traces)
    if form == "stored":
        kernel.save(tmp_path / "k.lossk")
        kernel = lossk.open(tmp_path / "k.lossk")
    expected, found = kernel.neighbors(5), kernel.neighbors(5, backend="triton")
    assert torch.equal(found.index, expected.index)  # no two correlations here are a rounding apart
    # Two products in the other order of the factors: each is off by half a unit in the last place of at most 1.
    assert ((found.correlation - expected.correlation).abs() <= 2.0**-23).all()
    assert torch.equal(found.noise_floor, expected.noise_floor)
    assert (found.index[11] == -1).all()
    assert not (found.index == 11).any()


def test_neighbors_backend_is_checked() -> None:
    kernel = fill(TileAccumulator(N, 16, **settings()), losses())
    with pytest.raises(ValueError, match="backend must be one of"):
        kernel.neighbors(5, backend="cpp")
    with pytest.raises(ValueError, match="rows must be None with backend='triton'"):
        kernel.neighbors(5, rows=[1, 2], backend="triton")
    wide = lossk.LossKernel.from_traces(lossk.LossTraces(torch.rand(2, 3, 80)))
    with pytest.raises(ValueError, match="k must be at most 64 with backend='triton', got 70"):
        wide.neighbors(70, backend="triton")


def test_neighbors_by_the_kernel_refuse_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    kernel = fill(TileAccumulator(N, 16, **settings()), losses())
    with pytest.raises(lossk.BackendError, match="need a CUDA device"):
        kernel.neighbors(5, backend="triton")
