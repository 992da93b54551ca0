"""What passes take, counted tensor by tensor; batches that fit; planned memory against the peak of a process."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench import memory_plan as bench
from torch import nn

import lossk
from lossk.memory import parse_memory
from lossk.plan.pass_memory import LiveBytes, fit_together, peak_of

Build = Callable[..., lossk.LossKernel]
KB = 1000


def vector(size: int = KB) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8, device="cpu")


def test_live_tensors_are_counted_and_dead_ones_are_not() -> None:
    with LiveBytes() as live:
        a = vector()
        b = a.view(10, 100)[2:]  # no memory of its own
        a.add_(1)
        assert live.now == KB
        c = a + 1
        assert live.now == 2 * KB
        del a, c
        gc.collect()
        assert live.now == KB  # the view holds it
        del b
        gc.collect()
        assert (live.now, live.peak) == (0, 2 * KB)


def test_what_was_there_before_is_not_counted() -> None:
    held = vector()
    assert peak_of(lambda: held.add_(1).view(-1)) == 0
    assert peak_of(lambda: [vector(), vector()]) == 2 * KB
    assert peak_of(lambda: [None for _ in range(5) if vector() is None]) <= 2 * KB


def test_what_autograd_keeps_is_counted() -> None:
    layers = nn.Sequential(*[nn.Linear(8, 8, bias=False, device="cpu", dtype=torch.float32), nn.Tanh()] * 4)
    x = torch.ones(1000, 8, dtype=torch.float32, device="cpu")
    one = x.numel() * 4
    with torch.no_grad():
        assert peak_of(lambda: layers(x)) <= 3 * one
    assert peak_of(lambda: layers(x).sum().backward()) >= 4 * one


WIDE = 4096


def wide() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, WIDE), nn.ReLU(), nn.Linear(WIDE, 3))


def settings(**more: Any) -> dict[str, Any]:
    sampler = lossk.SGLD(lr=1e-6, n_beta=10.0, localization=10.0, num_burnin_steps=1, num_steps_bw_draws=1)
    return {
        "sampler": sampler,
        "num_chains": 1,
        "num_draws": 2,
        "tile": 64,
        "backend": "torch",
        "progress": False,
    } | more


def test_batches_shrink_to_fit_and_the_plan_keeps_to_the_budget() -> None:
    inputs = torch.ones(256, 4, dtype=torch.float32, device="cpu")
    data = (inputs, torch.arange(256, device="cpu") % 3)
    free = lossk.build_kernel(wide(), data, **settings())
    tight = lossk.build_kernel(wide(), data, **settings(memory="15MB"))
    assert free.meta["passes"]["probe_batch"] == 256
    assert tight.meta["passes"]["probe_batch"] < 256
    assert tight.meta["passes"]["gradient_batch"] < 256
    assert any("passes = gradient_batch" in why for why in tight.meta["passes_reasons"])
    assert tight.meta["memory"]["planned_peak_bytes"] <= 15e6 < free.meta["memory"]["planned_peak_bytes"]
    assert torch.allclose(tight.mean_loss, free.mean_loss, rtol=1e-4)


class Much(nn.Module):
    """One weight, and 4 million activations a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.float32, device="cpu"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = x @ self.weight
        return logits + logits.mean(dim=1, keepdim=True).repeat(1, 4_000_000).tanh().mean(dim=1, keepdim=True)


def test_a_sample_that_does_not_fit_is_refused_in_words() -> None:
    data = torch.ones(2, 4, dtype=torch.float32, device="cpu"), torch.zeros(2, dtype=torch.int64, device="cpu")
    taken = "a pass of a single sample takes"
    with pytest.raises(MemoryError, match=rf"{taken} \d+ MB, and .* are left .*memory='\d+MB'"):
        lossk.build_kernel(Much(), data, **settings(memory="24MB"))
    with pytest.raises(MemoryError, match=r"probe_batch=1 of passes= takes \d+ MB, and .* are left .*memory='\d+MB'"):
        lossk.build_kernel(Much(), data, **settings(memory="24MB", passes=lossk.Passes(probe_batch=1)))


def test_vectors_that_do_not_fit_are_refused_before_the_pilot(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lossk.run.choose.run_pilot", "lossk.plan.pass_memory.peak_of"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("it has begun"))
    inputs = torch.ones(8, 4, dtype=torch.float32, device="cpu")
    with pytest.raises(
        MemoryError, match=r"up to 14 vectors of 32771 weights, 2 MB, .* than memory='\d+MB', or .*params="
    ):
        lossk.build_kernel(wide(), (inputs, torch.arange(8, device="cpu") % 3), **settings(memory="1B"))


class TwoRanks:
    """This process as rank 0, beside another whose batches are smaller, or which has no room."""

    def __init__(self, others: list[int], problem: str | None) -> None:
        self.others, self.problem = others, problem

    def together(self, work: Callable[[], Any]) -> Any:
        if self.problem:
            raise MemoryError(f"rank 1: {self.problem}")
        return work()

    def gather_json(self, content: Any) -> list[Any]:
        return [content, self.others]


def test_ranks_run_the_batches_that_fit_on_each_of_them() -> None:
    class Two:
        passes = lossk.Passes(probe_batch=64, gradient_batch=8)

        @classmethod
        def use_passes(cls, passes: lossk.Passes) -> None:
            cls.passes = passes

    found = fit_together(Two, TwoRanks([32, 16], None), lambda: ["why"])
    assert found == ["why"]
    assert (Two.passes.probe_batch, Two.passes.gradient_batch) == (32, 8)
    with pytest.raises(MemoryError, match="rank 1: no room"):
        fit_together(Two, TwoRanks([32, 16], "no room"), list)

    def refuse() -> list[str]:
        raise MemoryError("none here")

    with pytest.raises(MemoryError, match="none here"):
        fit_together(Two, TwoRanks([32, 16], None), refuse)


@pytest.mark.parametrize("only", ["wide MLP, little", "cross_kernel, many", "eigsh of a kernel in tiles"])
def test_a_tiny_bench_stays_below_its_plan(only: str) -> None:
    """In a process of its own, as other tests leave holes in this one's heap."""
    (found,) = bench.measure(bench.argparse.Namespace(scale=0.1, only=only))
    assert found.note == ""
    assert found.plan is not None
    assert found.peak is not None
    assert 0 < found.peak <= found.plan <= (parse_memory(found.budget) or found.plan)
    assert f"| {found.case} | {found.budget or '-'} |" in bench.section([found], 0.1)
