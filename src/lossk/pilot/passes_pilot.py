"""The pilot of the passes: batch sizes, memory format, threads and compilation, measured on the task."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lossk.data.data import Samples
from lossk.device import free_bytes, peak_bytes, settle
from lossk.plan.device_plan import most_samples
from lossk.samplers.samplers import Sampler
from lossk.settings import SteppingSettings, minibatch_of
from lossk.task.passes import Passes
from lossk.task.task import Task, fitting_batch

WORTH = 4.0  # seconds of passes in a run below which measuring does not pay
SHARE, MOST = 0.03, 30.0  # of the run, and in seconds, that measuring may take
COMPILE_WORTH = 900.0  # seconds of passes below which compiling, about a minute, is not tried
FASTER = 0.96  # a change must take at most this share of the time, or the timer's noise would choose
REPEATS = 3
HOPELESS = 1.3  # times the best so far: measured once, and not again
BACKWARD = 3  # a gradient's worth in forward passes
USUAL_STEPS = 8  # of a draw, where a pilot has yet to say
BATCHES = (512, 1024, 2048, 128, 64, 32, 256)  # the likeliest first: time may run out

Seconds = tuple[float, float]  # per sample of a probe pass and of a gradient


@dataclass(frozen=True)
class Load:
    """What a run asks of the passes."""

    num_draws: int  # of all chains
    num_steps: int  # gradients of all chains
    minibatch: int

    def forward_passes(self, num_probe: int) -> float:
        """All of it in forward passes of one sample."""
        return self.num_draws * num_probe + BACKWARD * self.num_steps * self.minibatch


def load_of(sampler: Sampler, num_chains: int, num_draws: int, num_train: int) -> Load:
    """Of a run's chains, as far as the sampler's settings say it yet."""
    draws, steps = num_chains * num_draws, 0
    if isinstance(sampler, SteppingSettings):
        unknown = "auto" in (sampler.num_burnin_steps, sampler.num_steps_bw_draws)
        steps = USUAL_STEPS * draws if unknown else num_chains * sampler.steps(num_draws)
    return Load(draws, steps, minibatch_of(getattr(sampler, "batch_size", None), num_train))


def choose_passes(task: Task, probe: Samples, train: Samples, load: Load) -> tuple[Passes, list[str]]:
    """The quickest settings found within a few percent of the run's time, and why; the task is not entered yet.

    Args:
        probe, train: the data where the passes want it (`Task.place`).
    """
    bench = _Bench(task, probe, train, load)
    try:
        return bench.search()
    finally:
        task.use_passes(bench.before)


class _Bench:
    """Candidates measured so far: seconds per sample of a probe pass and of a gradient."""

    def __init__(self, task: Task, probe: Samples, train: Samples, load: Load) -> None:
        self.task, self.load = task, load
        self.before = task.passes
        self.probe, self.train = probe, train
        self.weights = (load.num_draws * len(probe), load.num_steps * load.minibatch)  # samples of either pass
        self.failed: list[str] = []  # why candidates were not measured
        self.deadline = float("inf")
        self.first = (0.0, 0.0)  # of the default
        self.limits = _limits(self.before)  # samples of either pass that fit the memory

    def search(self) -> tuple[Passes, list[str]]:
        start, best = time.perf_counter(), self.before
        total = self.total(self.measure(best, once=True))
        if total < WORTH:
            return best, [f"passes = default: about {total:.2g} s of them, too few for measuring to pay"]
        seconds = self.first = self.measure(best)
        self.deadline = start + min(SHARE * self.total(seconds), MOST)
        for candidates in (self.threads, self.formats, self.folding):
            for candidate in candidates(best):
                best, seconds = self.better(best, seconds, candidate)
        for name, part in (("probe_batch", 0), ("gradient_batch", 1)):
            for candidate in self.batches(best, name):
                best, seconds = self.better(best, seconds, candidate, part)
        if self.task.rewritable and self.total(seconds) > COMPILE_WORTH:
            best, seconds = self.try_compiling(best, seconds)
        if best == self.before:
            return best, [f"passes = default: {best}; nothing else measured was clearly quicker", *self.failed]
        gain = self.total(self.first) / self.total(seconds)
        return best, [f"passes = measured: {best}; {gain:.2f} times as fast as the default", *self.failed]

    def total(self, seconds: Seconds) -> float:
        return sum(weight * each for weight, each in zip(self.weights, seconds, strict=True))

    def better(
        self, best: Passes, seconds: Seconds, candidate: Passes, part: int | None = None
    ) -> tuple[Passes, Seconds]:
        """The candidate if it is quicker, twice; `part` names the only pass it concerns."""
        if candidate == best or time.perf_counter() + self.price(candidate, seconds, part) > self.deadline:
            return best, seconds
        try:
            found = self.measure(candidate, part, seconds)
        except Exception as error:  # a rewriting that fails where the model as it is runs, whatever it raises
            if part is not None:
                raise
            self.failed.append(f"passes = without {_change(best, candidate)}: {error}".splitlines()[0])
            return best, seconds
        if self.total(_merge(seconds, found, part)) > FASTER * self.total(seconds):
            return best, seconds
        # On a machine that others use too, a lucky or an unlucky moment would choose: both again, and the best of each.
        seconds = _quicker(seconds, _merge(seconds, self.measure(best, part), part))
        if best == self.before:
            self.first = seconds
        found = _quicker(_merge(seconds, found, part), _merge(seconds, self.measure(candidate, part), part))
        if self.total(found) > FASTER * self.total(seconds):
            return best, seconds
        return candidate, found

    def price(self, candidate: Passes, seconds: Seconds, part: int | None) -> float:
        """Seconds that measuring a candidate no slower than the best would take."""
        forward = 0.0 if part == 1 else seconds[0] * self._probe_count(candidate, self.probe)
        backward = 0.0 if part == 0 else seconds[1] * min(self.load.minibatch, len(self.train))
        return (1 + REPEATS) * (forward + backward)

    def threads(self, best: Passes) -> Iterator[Passes]:
        if best.num_threads is None and self.task.device.type == "cpu" and torch.get_num_threads() > 1:
            yield dataclasses.replace(best, num_threads=1)

    def formats(self, best: Passes) -> Iterator[Passes]:
        if self.task.channels_last:
            yield dataclasses.replace(best, memory_format="contiguous")

    def folding(self, best: Passes) -> Iterator[Passes]:
        if self.task.rewritable and any(isinstance(module, nn.BatchNorm2d) for module in self.task.network.modules()):
            yield dataclasses.replace(best, fold_norms=True)

    def batches(self, best: Passes, name: str) -> Iterator[Passes]:
        most = len(self.probe) if name == "probe_batch" else min(self.load.minibatch, len(self.train))
        fitting = self.limits[0 if name == "probe_batch" else 1]
        for batch in BATCHES:
            if batch < most and batch <= fitting:
                yield dataclasses.replace(best, **{name: batch})  # type: ignore[arg-type]

    def try_compiling(self, best: Passes, seconds: Seconds) -> tuple[Passes, Seconds]:
        graphs: tuple[Any, ...] = ("graphs",) if self.task.device.type == "cuda" else ()
        for how in (True, *graphs):
            best, seconds = self.better(best, seconds, dataclasses.replace(best, compile=how))
        return best, seconds

    def measure(
        self, passes: Passes, part: int | None = None, best: Seconds = (math.inf, math.inf), *, once: bool = False
    ) -> Seconds:
        """Seconds per sample of a probe pass and of a gradient; 0 for one that is not asked for.

        Args:
            best: so far; what is far from it is not measured again.
            once: a first call alone, which says no more than the order of magnitude.
        """
        self.task.use_passes(passes)
        timer = seconds_of if once else quickest
        forward = backward = 0.0
        with self.task:
            if part != 1:
                probe = self.task.place(self._some(self.probe))
                count = self._probe_count(passes, probe)
                few = probe[:count]
                show = partial(self.task.rows, few)
                self._note_limit(0, show, count)
                forward = timer(show, HOPELESS * best[0] * count, self.task.device) / count
            if part != 0 and self.weights[1] > 0:
                train = self.task.place(self._some(self.train))
                index = torch.arange(min(self.load.minibatch, len(train)), device="cpu")
                work = partial(self.task.gradient, train, index)
                self._note_limit(1, work, min(passes.gradient_batch, len(index)))
                backward = timer(work, HOPELESS * best[1] * len(index), self.task.device) / len(index)
        return forward, backward

    def _probe_count(self, passes: Passes, probe: Samples) -> int:
        """Samples of a pass of the probe."""
        return min(fitting_batch(passes.probe_batch, self.task.loss.positions), len(probe))

    def _some(self, samples: Samples) -> Samples:
        count = min(len(samples), 2 * max(*BATCHES, self.load.minibatch))
        return samples.cut(slice(0, count))

    def _note_limit(self, part: int, work: Callable[[], Any], batch: int) -> None:
        """From what a pass takes of a CUDA device, how many samples one can have."""
        device = self.task.device
        if device.type == "cuda":
            self.limits[part] = most_samples(free_bytes(device), peak_bytes(device, work) / batch)


def _limits(before: Passes) -> list[int]:
    """Where memory has made batches smaller than usual, no larger ones are tried."""
    usual = Passes()
    pairs = ((before.probe_batch, usual.probe_batch), (before.gradient_batch, usual.gradient_batch))
    return [batch if batch < most else 10**9 for batch, most in pairs]


def quickest(work: Callable[[], Any], hopeless: float, device: torch.device) -> float:
    """Seconds of the quickest of a few calls, after one that does not count; of the first beyond `hopeless` already."""
    work()
    best = math.inf
    for _ in range(REPEATS):
        best = min(best, seconds_of(work, hopeless, device))
        if best > hopeless:
            break
    return best


def seconds_of(work: Callable[[], Any], _: float, device: torch.device) -> float:
    """Seconds of one call."""
    settle(device)
    start = time.perf_counter()
    work()
    settle(device)
    return time.perf_counter() - start


def _change(old: Passes, new: Passes) -> str:
    """The settings of `new` that are others than in `old`."""
    before, after = old.to_dict(), new.to_dict()
    return ", ".join(f"{name}={value!r}" for name, value in after.items() if value != before[name])


def _merge(old: Seconds, new: Seconds, part: int | None) -> Seconds:
    """The new times of what was measured, the old ones of the rest."""
    return (old[0] if part == 1 else new[0], old[1] if part == 0 else new[1])


def _quicker(a: Seconds, b: Seconds) -> Seconds:
    return min(a[0], b[0]), min(a[1], b[1])
