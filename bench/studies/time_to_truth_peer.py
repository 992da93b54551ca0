"""devinterp's side of `bench.studies.time_to_truth`: its defaults, and the grid of its settings."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.studies.time_to_truth_networks import Network
from bench.studies.time_to_truth_ours import NUM_CHAINS, Law, Reference, Result
from bench.studies.time_to_truth_statistics import Running

# devinterp 1.3.2: `sample()` and `SGLD()`.
DEFAULTS = {"lr": 0.01, "num_chains": 10, "num_draws": 100, "num_steps_bw_draws": 1, "num_burnin_steps": 0}
LR_FACTORS, STEPS = (0.1, 0.3, 1.0, 3.0, 10.0), (1, 5, 20, 50)
DISCARD = 0.2  # of a grid point's steps are burn-in
BATCH = 256  # lossk's default
METHODS = ("SGLD", "SGMCMC.sgld")
MOST_TRACE_BYTES = 2**28
FEWEST_DRAWS = 10


@dataclass(frozen=True)
class Settings:
    """One call of devinterp's `sample`."""

    lr: float
    n_beta: float
    localization: float
    num_chains: int
    num_steps_bw_draws: int
    method: str = "SGLD"  # `sample`'s own default
    fast_loader: bool = False
    init_loss: float | None = None  # None: devinterp measures it
    discard: float = 0.0
    seed: int = 0

    def spec(self, network: Path, num_draws: int, clock: str) -> dict[str, Any]:
        """What bench/peers_devinterp.py reads."""
        return {
            "network": str(network),
            "method": self.method,
            "optimizer_kwargs": {"lr": self.lr, "nbeta": self.n_beta, "localization": self.localization},
            "num_chains": self.num_chains,
            "num_draws": num_draws,
            "num_steps_bw_draws": self.num_steps_bw_draws,
            "batch_size": BATCH,
            "fast_loader": self.fast_loader,
            "init_loss": self.init_loss,
            "seed": self.seed,
            "clock": clock,
        }

    def plain(self) -> dict[str, Any]:
        """For the record."""
        keys = ("lr", "n_beta", "localization", "num_chains", "num_steps_bw_draws", "method", "discard")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class PeerRun:
    """Traces of a run, and when each draw's losses were asked for and there: seconds since the call of `sample`."""

    losses: Tensor  # [C, T, N]
    entry: Tensor  # [C, T] float64
    exit: Tensor  # [C, T] float64
    error: str | None = None

    def seconds(self, draws: int, discarded: int = 0) -> float:
        """Of a run of `draws` draws per chain, the losses of the first `discarded` ones not asked for.

        Chains run one after the other; a chain's time runs from the end of the one before, so that setting up counts.
        """
        starts = torch.cat([torch.zeros(1, dtype=torch.float64), self.exit[:-1, -1]])
        spent = self.exit[:, draws - 1] - starts
        saved = (self.exit - self.entry)[:, :discarded].sum(dim=1)
        return float((spent - saved).sum())


@dataclass(frozen=True)
class Cost:
    """Seconds of devinterp on one network."""

    chain: float  # before a chain's first step
    step: float
    losses: float  # of all samples, at one draw

    def draws(self, settings: Settings, seconds: float) -> int:
        """Draws per chain that fit into `seconds`."""
        each = settings.num_steps_bw_draws * self.step + (1 - settings.discard) * self.losses
        return max(FEWEST_DRAWS, int((seconds / settings.num_chains - self.chain) / each))


class Peer:
    """devinterp on one network, a process for every run."""

    def __init__(self, python: str, network: Network, folder: Path, clock: str = "wall") -> None:
        self.python, self.folder, self.network, self.clock = python, folder, network, clock
        self.saved = folder / f"{network.name}.pt"
        network.save(self.saved)
        self.versions: dict[str, str] = {}
        self.costs = {method: self._cost(method) for method in METHODS}
        self.method = min(METHODS, key=lambda method: self.costs[method].step)

    def run(self, settings: Settings, num_draws: int) -> PeerRun:
        """Run `settings`; RuntimeError with what the process said when it fails other than by diverging."""
        spec, out = self.folder / "spec.json", self.folder / "out.pt"
        out.unlink(missing_ok=True)
        spec.write_text(json.dumps(settings.spec(self.saved, num_draws, self.clock)))
        script = Path(__file__).parents[1] / "peers_devinterp.py"
        done = subprocess.run([self.python, str(script), str(spec), str(out)], capture_output=True, text=True)
        if done.returncode or not out.exists():
            raise RuntimeError(f"{self.python} {script.name} failed: {done.stderr.strip()[-2000:]}")
        saved = torch.load(out, weights_only=True)
        self.versions = saved["versions"]
        return PeerRun(saved["losses"], saved["entry"], saved["exit"], saved["error"])

    def _cost(self, method: str) -> Cost:
        settings = Settings(1e-12, 1.0, 0.0, 1, 1, method=method, fast_loader=True, init_loss=1.0)
        run = self.run(settings, 30)
        losses = float((run.exit - run.entry).median())
        step = float((run.entry[0, 1:] - run.exit[0, :-1]).median())
        return Cost(float(run.entry[0, 0]) - step, step, losses)

    def measure(
        self, name: str, settings: Settings, reference: Reference, *, level: float, seconds: float, least_draws: int = 0
    ) -> Result:
        """Run for about `seconds`; seconds until the likeness reaches `level`, the better centering at every draw."""
        most = max(FEWEST_DRAWS, MOST_TRACE_BYTES // (4 * settings.num_chains * len(self.network.probe[1])))
        fitting = self.costs[settings.method].draws(settings, seconds)
        run = self.run(settings, min(max(fitting, least_draws), most))
        result = Result(name, settings.plain())
        if run.error is not None:
            result.note = f"diverged: {run.error}"
            return result
        running = Running(run.losses, reference.entries, discard=settings.discard, centerings=("chain", "pooled"))
        result.read(running, level, lambda draws: run.seconds(draws, running.kept_from(draws)))
        rise = run.losses[:, -1].double().mean() - run.losses[:, 0].double().mean()
        result.note = f"mean loss {float(rise):+.3g} nats from first draw to last"
        if fitting > most:
            result.note += f"; its draws limited to {most} by memory"
        return result


def at_defaults(n_beta: float, localization: float) -> Settings:
    """Everything devinterp's default, but the law."""
    chains, steps = int(DEFAULTS["num_chains"]), int(DEFAULTS["num_steps_bw_draws"])
    return Settings(DEFAULTS["lr"], n_beta, localization, chains, steps)


def wholly_default() -> Settings:
    """The law too: devinterp's `default_nbeta` takes the batch's size for n, and nothing localizes."""
    return at_defaults(BATCH / math.log(BATCH), 0.0)


def grid(law: Law, method: str) -> list[Settings]:
    """Twenty points: five steps about lossk's own, four spacings; burn-in a fifth, as many chains as lossk."""
    return [
        Settings(
            lr=float(law.sgld.lr) * factor,
            n_beta=law.n_beta,
            localization=law.localization,
            num_chains=NUM_CHAINS,
            num_steps_bw_draws=steps,
            method=method,
            fast_loader=True,
            init_loss=1.0,
            discard=DISCARD,
        )
        for factor, steps in itertools.product(LR_FACTORS, STEPS)
    ]


def measure_grid(
    peer: Peer,
    points: list[Settings],
    reference: Reference,
    *,
    level: float,
    short: float,
    long: float,
    again: int = 3,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Every point for `short` seconds; if none gets there, the `again` likest ones for `long` seconds."""

    def one(settings: Settings, seconds: float) -> Result:
        name = f"lr {settings.lr:.2g}, {settings.num_steps_bw_draws} steps"
        found = peer.measure(name, settings, reference, level=level, seconds=seconds)
        say(f"  {name}: {outcome(found)}")
        return found

    results = [one(settings, short) for settings in points]
    if not any(result.seconds["R"] is not None for result in results):
        order = sorted(range(len(points)), key=lambda i: results[i].likeness.get("R", -1.0), reverse=True)
        for i in order[:again]:
            results[i] = one(points[i], long)
    return results


def outcome(result: Result) -> str:
    """ "12 s (210 draws)", "> 80 s (reached 0.83)" or why there is nothing."""
    if not result.likeness:
        return result.note
    seconds = result.seconds["R"]
    if seconds is None:
        return f"> {result.ran:.3g} s (reached {result.likeness['R']:.3f})"
    return f"{seconds:.3g} s ({result.draws['R']} draws per chain)"
