"""`build_kernel` against bare passes, a plain torch loop and devinterp 1.3.2, taking turns on the same draws.

python -m bench.end_to_end [--quick] [--networks mlp cnn] [--checkpoint CNN.pt] [--peer1-python PYTHON]
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

import lossk
from bench import floor as bare
from bench import plain
from bench.jobs import MAKERS, Job
from bench.markdown import seconds, spread, table
from bench.options import Found, Options, run_alone
from bench.peers import Peer
from bench.turns import CLOCKS, Turn, column, quantiles, ratio, take_turns

OURS, FLOOR = "lossk", "bare passes"
ONCE = "lossk, two draws"  # not a contender: what a call costs however few its draws
PLAIN, TUNED, PEER = "plain torch", "plain torch at the floor's settings", "devinterp 1.3.2"
METHOD = "SGLD"  # the default of devinterp's `sample`; SGMCMC.sgld, its other one, was no faster
# Over lossk, at least; of the floor: lossk over it, at most.
TARGETS = {"mlp": {PEER: 1.5, FLOOR: 1.05}, "cnn": {PEER: 3.0, FLOOR: 1.05}}


def ours(job: Job) -> Callable[[], Turn]:
    """`build_kernel` as it is called, nothing left to the tuner."""

    def turn() -> Turn:
        start = CLOCKS[job.clock]()
        kernel = lossk.build_kernel(
            job.model,
            job.probe,
            train=None if job.train is job.probe else job.train,
            loss="token_cross_entropy" if job.per_token else "cross_entropy",
            sampler=job.sampler(),
            num_chains=job.num_chains,
            num_draws=job.num_draws,
            centering="pooled",  # what torch.cov of all draws is
            progress=False,
        )
        taken = CLOCKS[job.clock]() - start
        stages = {f"stage {name}": value for name, value in kernel.meta["timings"].items() if name != "total"}
        return {
            "seconds": taken,
            "mean_loss": float(kernel.mean_loss.mean()),
            "mean_variance": float(kernel.variance.mean()),
            **stages,
        }

    return turn


def with_threads(turn: Callable[[], Turn], threads: int) -> Callable[[], Turn]:
    """Whoever was there before may have set another number."""

    def run() -> Turn:
        torch.set_num_threads(threads)
        return turn()

    return run


def contenders(job: Job, floor: bare.Floor, threads: int) -> dict[str, Callable[[], Turn]]:
    """Those of this process."""
    written = plain.as_written(job, threads)
    return {
        OURS: with_threads(ours(job), threads),
        ONCE: with_threads(ours(two_draws(job)), threads),
        FLOOR: bare.contender(job, floor),
        PLAIN: plain.contender(job, written, written),
        TUNED: plain.contender(job, floor.forward, floor.backward),
    }


def two_draws(job: Job) -> Job:
    """The same, of one chain of two draws: the fewest there can be."""
    return replace(job, num_chains=1, num_draws=2)


def compare(job: Job, options: Options, peers: dict[str, Peer]) -> Found:
    """All turns of one job, their quantiles and ratios."""
    print(f"{job.name}: searching the floor", file=sys.stderr, flush=True)
    floor = bare.search(job, options.threads)
    everyone = contenders(job, floor, options.threads)
    warm_up(job, floor, options.threads)
    with contextlib.ExitStack() as stack:
        entered = {name: stack.enter_context(peer) for name, peer in peers.items()}
        everyone |= {name: peer.turn for name, peer in entered.items()}
        turns = take_turns(everyone, job.rounds)
    torch.set_num_threads(options.threads)
    times = {name: column(found) for name, found in turns.items()}
    return {
        "name": job.name,
        "what": job.what,
        "job": job.spec(),
        "floor": {"forward": asdict(floor.forward), "backward": asdict(floor.backward), "seen": floor.seen},
        "turns": turns,
        "seconds": {name: quantiles(found) for name, found in times.items()},
        "over lossk": {name: ratio(found, times[OURS]) for name, found in times.items() if name not in (OURS, ONCE)},
        "lossk over floor": ratio(times[OURS], times[FLOOR]),
        "versions": {name: peer.versions for name, peer in peers.items()},
    }


def warm_up(job: Job, floor: bare.Floor, threads: int) -> None:
    """Two draws of one chain by everyone: what torch and lossk load on first use is nobody's time."""
    for turn in contenders(two_draws(job), floor, threads).values():
        turn()


def measure(options: Options) -> Found:
    """Every network asked for."""
    found = {}
    for name in options.networks:
        job = MAKERS[name](options)
        peers = {}
        if options.peer1_python:
            spec = {**job.spec(), "threads": options.threads, "method": METHOD}
            peers[PEER] = Peer(options.peer1_python, "bench.peer1", spec, job)
        found[name] = compare(job, options, peers)
    return found


def section(found: Found) -> str:
    """Of the page."""
    parts = ["## The whole kernel against the bare passes, plain torch and devinterp 1.3.2"]
    parts += [one(result, TARGETS.get(name, {})) for name, result in found.items()]
    parts.append(HOW)
    return "\n\n".join(parts)


def one(result: Found, targets: dict[str, float]) -> str:
    """One job's table."""
    job = result["job"]
    head = (
        f"### {result['what']}: {job['num_rows']:,} rows, {job['num_chains']} x {job['num_draws']} draws, "
        f"{job['num_steps_bw_draws']} step(s) of {job['batch_size']} samples a draw, {job['rounds']} rounds"
        + (", processor's time" if job["clock"] == "cpu" else "")
    )
    rows = [[name, *row(result, name, targets)] for name in result["seconds"] if name != ONCE]
    over = f"lossk / bare passes: **{spread(result['lossk over floor'])}**"
    if FLOOR in targets:
        over += f" (target: at most {targets[FLOOR]:g})"
    return "\n\n".join(
        [
            head,
            table(["", "time", "over lossk's", "target", "mean loss", "mean variance"], rows),
            f"{over}. {further(result)}",
            f"The floor's passes: forward {describe(result['floor']['forward'])}, "
            f"backward {describe(result['floor']['backward'])}. "
            f"Of its time, forward passes are {share(result):.0%}.",
        ]
    )


def row(result: Found, name: str, targets: dict[str, float]) -> list[str]:
    turns = result["turns"][name]
    over = "1" if name == OURS else spread(result["over lossk"][name])
    target = f"at least {targets[name]:g}" if name in targets and name != FLOOR else ""
    figures = [f"{turns[-1][key]:.4g}" if key in turns[-1] else "" for key in ("mean_loss", "mean_variance")]
    return [spread(result["seconds"][name], "s"), over, target, *figures]


def further(result: Found) -> str:
    """What lossk costs per call and what per further draw, from the same call with two draws in all."""
    turns, draws = result["turns"], result["job"]["num_chains"] * result["job"]["num_draws"]
    whole, few, floor = (column(turns[name]) for name in (OURS, ONCE, FLOOR))
    more = [(all_of_them - two) / (draws - 2) for all_of_them, two in zip(whole, few, strict=True)]
    over = ratio(more, [each / draws for each in floor])
    return (
        f"The same call with two draws in all takes {seconds(quantiles(few)['median'])}: reading, checking, the losses "
        f"of the training data at w*, pilots, the tiles, diagnostics. A further draw takes {spread(over)} times the "
        "floor's."
    )


def share(result: Found) -> float:
    turns = result["turns"][FLOOR]
    return sum(column(turns, "forward")) / sum(column(turns))


def describe(passes: dict[str, Any]) -> str:
    form = "channels_last" if passes["channels_last"] else "NCHW / contiguous"
    return f"{passes['batch']} samples at a time, {form}, {passes['threads']} thread(s)"


HOW = f"""Times are medians of whole turns, with the 20 and 80 percentiles; ratios are taken within a round, then their
median. Everyone gets the same network, data, number of threads, and number of chains, draws and steps, the same lr,
n_beta, localization and minibatch size; the mean loss and mean variance over all draws show that they sample alike.

- *{OURS}*: `build_kernel` with every setting of SGLD a number, from the call to the finished kernel, pilots included.
  What it does once per call is measured by another call, with two draws, in the same round.
- *{FLOOR}*: as many forward passes over all rows, with their losses, and forward + backward passes of minibatches as
  the draws need; the fastest of a search over memory format, samples per pass and threads, under `inference_mode`,
  minibatches sliced and not gathered. No step, no kernel.
- *{PLAIN}*: an eager loop, in-place updates, losses 1,000 samples at a time, `torch.cov` at the end.
- *{TUNED}*: the same loop with the memory format, samples per pass and threads of the
  floor: what lossk is worth to someone who has done that search.
- *{PEER}*: `sample` with `{METHOD}` and a callback that keeps all losses, 1,000 samples at a time, in a process
  of its own Python which waits for its turn; minibatches sliced, not collated; `init_loss` given; `torch.cov` at the
  end. Start, imports and reading of data are not counted. Its losses are plain float32, in which a small one has no
  digits left; lossk's keep theirs."""


if __name__ == "__main__":
    run_alone(measure, section, __doc__)
