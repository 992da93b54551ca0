"""The probe beside the chain's next steps: the same kernel to the bit, and no access that nothing orders.

No GPU is needed. `Recorded` stands in for the streams: it gives each a vector clock, which waiting takes the maximum
of, and a dispatch mode notes who reads and writes which memory when. An access is a race unless the other stream's last
write of that memory (and, of a write, its last read) came before it by the clocks: CUDA promises nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lossk
from lossk.memory import Budget
from lossk.plan.device_plan import Room, choose_overlap, choose_with_device, overlap_bytes
from lossk.plan.layout import Size
from lossk.task.losses import resolve_loss
from lossk.task.task import Task
from small_networks import HEAD_AT, head_only, vectors
from token_problems import TokenModel, text

Build = Callable[..., lossk.LossKernel]
Same = Callable[[lossk.LossKernel, lossk.LossKernel], None]
BESIDE = lossk.Passes(overlap=True, probe_batch=8)
TURNS = lossk.Passes(overlap=False, probe_batch=8)
MAIN, SIDE = 0, 1


class Races(TorchDispatchMode):
    """Notes every access to memory, and those that are not ordered."""

    def __init__(self) -> None:
        super().__init__()
        self.now = MAIN
        self.clock = [[0, 0], [0, 0]]  # of each stream: what it knows of itself and of the other
        self.last: dict[tuple[int, str], list[int]] = {}  # (memory, kind): when each stream did so last
        self.alive: list[Any] = []  # memory that is given back and taken again is ordered by the allocator
        self.found: list[str] = []
        self.launched = [0, 0]

    def wait(self, stream: int, other: int) -> None:
        self.clock[stream] = [max(pair) for pair in zip(self.clock[stream], self.clock[other], strict=True)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.launched[self.now] += 1
        self.clock[self.now][self.now] += 1
        for argument, given in zip(func._schema.arguments, args, strict=False):
            alias = argument.alias_info
            if alias is not None and not alias.is_write:  # a view of it is made, and no memory touched
                continue
            for tensor in tree_leaves(given):
                if isinstance(tensor, Tensor):
                    self._access(tensor, "read" if alias is None else "write", str(func))
        for name, given in (kwargs or {}).items():
            for tensor in tree_leaves(given):
                if isinstance(tensor, Tensor):
                    self._access(tensor, "write" if name == "out" else "read", str(func))
        return out

    def _access(self, tensor: Tensor, kind: str, what: str) -> None:
        storage = tensor.untyped_storage()
        self.alive.append(storage)
        key, other = storage.data_ptr(), 1 - self.now
        for before in ("write",) if kind == "read" else ("write", "read"):
            when = self.last.get((key, before), [0, 0])[other]
            if when > self.clock[self.now][other]:
                self.found.append(f"{what} {kind}s what stream {other} {before}s")
        self.last.setdefault((key, kind), [0, 0])[self.now] = self.clock[self.now][self.now]


class Recorded:
    """`SideStream` for a device that has streams: what is launched inside `after` is noted as the side stream's."""

    races: Races
    joins, waits = True, True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextlib.contextmanager
    def after(self, *inputs: Tensor) -> Iterator[None]:
        if self.waits:
            self.races.wait(SIDE, MAIN)
        self.races.now = SIDE
        try:
            yield
        finally:
            self.races.now = MAIN

    def join(self) -> None:
        if self.joins:
            self.races.wait(MAIN, SIDE)


def races_of(build: Build, monkeypatch: pytest.MonkeyPatch, problem: Any, **changes: Any) -> Races:
    found = Races()
    double = type("Double", (Recorded,), {"races": found, **changes})
    monkeypatch.setattr("lossk.probe.evaluation.SideStream", double)
    with found:
        build(problem.model(), problem.data, passes=BESIDE)
    return found


def test_every_read_waits_for_its_write(build: Build, monkeypatch: pytest.MonkeyPatch, problem: Any) -> None:
    found = races_of(build, monkeypatch, problem)
    assert found.launched[SIDE] > 12 * 3  # a pass of each of 12 draws is on the side
    assert found.launched[MAIN] > found.launched[SIDE]
    assert found.found == []


@pytest.mark.parametrize("without", ["joins", "waits"])
def test_an_order_that_is_left_out_is_seen(
    build: Build, monkeypatch: pytest.MonkeyPatch, problem: Any, without: str
) -> None:
    """Or the test above could not fail: without either wait there are races."""
    assert len(races_of(build, monkeypatch, problem, **{without: False}).found) > 5


def test_a_pass_at_the_weights_themselves_is_seen(build: Build, monkeypatch: pytest.MonkeyPatch, problem: Any) -> None:
    """The copy is what the overlap needs: a pass that reads the chain's own weights races with its steps."""
    monkeypatch.setattr(Task, "reading", lambda *_: contextlib.nullcontext())
    assert any("write" in text for text in races_of(build, monkeypatch, problem).found)


def test_steps_do_not_wait_for_the_pass(build: Build, monkeypatch: pytest.MonkeyPatch, problem: Any) -> None:
    """Between a pass's launch and the next draw's the chain's steps are launched without any wait."""
    order: list[str] = []
    double = type("Double", (Recorded,), {"races": Races(), "join": lambda self: order.append("wait")})
    monkeypatch.setattr("lossk.probe.evaluation.SideStream", double)
    fill, gradient = lossk.probe.probe.Probe.fill, Task.gradient
    monkeypatch.setattr("lossk.probe.probe.Probe.fill", lambda *a: (order.append("probe"), fill(*a))[1])
    monkeypatch.setattr(Task, "gradient", lambda *a: (order.append("step"), gradient(*a))[1])
    build(problem.model(), problem.data, passes=BESIDE, num_chains=1, num_draws=3)
    turn = ["probe", "step", "step", "wait"]
    assert order[order.index("probe") :] == [*turn, *turn, "probe", "wait"]


# --- the same kernel -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"panel": 1},
        {"sampler": lossk.SGLD(lr=1e-3, n_beta=30.0, localization=5.0, batch_size=4, preconditioner="rmsprop",
                               num_burnin_steps=1, num_steps_bw_draws=1)},
        {"sampler": lossk.Gaussian(sigma=0.05)},
    ],
    ids=["panels of 3", "panels of 1", "rmsprop", "gaussian"],
)  # fmt: skip
def test_the_same_to_the_bit(build: Build, problem: Any, assert_same_kernel: Same, changes: dict[str, Any]) -> None:
    beside = build(problem.model(), problem.data, passes=BESIDE, **changes)
    assert_same_kernel(beside, build(problem.model(), problem.data, passes=TURNS, **changes))
    assert beside.meta["passes"]["overlap"] is True
    assert build(problem.model(), problem.data, **changes).meta["passes"]["overlap"] is False  # "auto", on a CPU


def test_tokens_convolutions_and_stacks_of_heads(build: Build, assert_same_kernel: Same) -> None:
    images = torch.randn(9, 2, 6, 6), torch.arange(9) % 3

    def network() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

    def language() -> nn.Module:
        torch.manual_seed(4)
        return TokenModel()

    torch.manual_seed(5)
    words, points = text(), vectors()
    heads = {"sampler": lossk.Gaussian(sigma=0.1, params=[f"{HEAD_AT}.*"])}
    for make, data, changes, more in (
        (network, images, {}, {"fold_norms": True}),
        (language, words, {"loss": "token_cross_entropy"}, {}),
        (head_only, points, heads, {"fused_head": True}),
        (head_only, points, {}, {"fused_head": True}),
    ):
        beside, turns = (build(make(), data, passes=replace(p, **more), **changes) for p in (BESIDE, TURNS))
        assert_same_kernel(beside, turns)


def test_resumed_with_and_without(
    build: Build, problem: Any, assert_same_kernel: Same, fail_at: Any, tmp_path: Any
) -> None:
    """It bears on nothing but time: a run may be begun with it and go on without."""
    path, whole = tmp_path / "k.lossk", build(problem.model(), problem.data, loss=fail_at(), passes=TURNS)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        build(problem.model(), problem.data, loss=fail_at(60), out=path, passes=BESIDE)
    again = build(problem.model(), problem.data, loss=fail_at(), out=path, passes=TURNS, resume=True)
    assert_same_kernel(again, whole)


def test_a_draw_that_blows_up_is_named(build: Build, problem: Any) -> None:
    with pytest.raises(lossk.DivergedError, match=r"probe sample \d+ has loss (inf|nan) at draw 0"):
        build(problem.model(), problem.data, sampler=lossk.Gaussian(sigma=1e38), passes=BESIDE)


def test_the_model_is_read_from_the_copy_and_given_back(problem: Any) -> None:
    task = Task(problem.model(), resolve_loss("cross_entropy"))
    with task:
        here = task.losses(problem.data)
        copy = task.flat + 0.1
        with task.reading(copy):
            there = task.losses(problem.data)
        assert torch.equal(task.losses(problem.data), here)
        task.flat.add_(0.1)
        assert torch.equal(task.losses(problem.data), there)
        assert not torch.equal(here, there)
        with pytest.raises(KeyError), task.reading(copy):
            raise KeyError
        assert task.sampled[0].data.data_ptr() == task.flat.data_ptr()


# --- the plan --------------------------------------------------------------------------------------------------------

GB = 10**9
SIZE = Size(50_000, 4096, 200, 4, 200, "float32", 7_000_000)


def chosen(free: int, passes: lossk.Passes, beside: int = GB) -> Any:
    room = Room(free, 4 * GB, beside)
    layout = choose_with_device(SIZE, room, Budget(40 * GB, 0), 0, on_disk=False)
    return layout, choose_overlap(passes, SIZE, layout, room)


def test_it_is_chosen_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles come first; then the copy of the weights and the second pass, if they still fit."""
    monkeypatch.setattr("lossk.memory.psutil.virtual_memory", lambda: type("M", (), {"available": 100 * GB}))
    auto = lossk.Passes()
    layout, (overlap, planned, told) = chosen(60 * GB, auto)
    assert overlap
    assert (
        planned.device_bytes - layout.device_bytes == GB + 4 * SIZE.num_weights == overlap_bytes(SIZE, Room(0, 0, GB))
    )
    assert "overlap = yes" in told
    assert "1.03 GB more" in told
    layout, (overlap, planned, told) = chosen(60 * GB, auto, beside=55 * GB)
    assert (overlap, planned) == (False, layout)
    assert "55.03 GB more are not free" in told
    with pytest.raises(MemoryError, match=r"overlap=True needs 55\.03 GB more of the device"):
        chosen(60 * GB, lossk.Passes(overlap=True), beside=55 * GB)
    assert chosen(60 * GB, lossk.Passes(overlap=False))[1][0] is False
    assert "CUDA graphs" in chosen(60 * GB, lossk.Passes(compile="graphs"))[1][2]


def test_weights_that_wait_together_are_not_copied_again() -> None:
    assert overlap_bytes(replace(SIZE, stack_bytes=512), Room(0, 0, 77)) == 77


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="overlap must be one of"):
        lossk.Passes(overlap="yes")
    with pytest.raises(ValueError, match="exclude one another"):
        lossk.Passes(overlap=True, compile="graphs")
