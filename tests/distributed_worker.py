"""One rank of the runs that test_distributed.py starts: `distributed_worker.py FOLDER SCENARIO...`, in this order."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

import lossk
import lossk.run.cost
import lossk.run.run
import lossk.run.work
from lossk.cli.main import main
from lossk.plan.layout import Layout, Size, in_store
from lossk.plan.pass_memory import pass_bytes
from lossk.recipes import RecipeTask

N, CHAINS, DRAWS = 150, 2, 6
NUM_TRAIN = 4000  # of `counted`: four parts of a full gradient, 125 batches


def data(num_samples: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(num_samples, 4, generator=generator), torch.arange(num_samples) % 3


def network() -> nn.Module:
    generator = torch.Generator().manual_seed(8)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def settings(**changes: Any) -> dict[str, Any]:
    """Batches of 32 of 150 samples: shards of 2 and 3 batches, the last one ragged; momenta, which must be resumed."""
    sampler = lossk.BAOAB(
        n_beta=30.0, localization=5.0, step_size=0.01, friction=20.0, num_burnin_steps=2, num_steps_bw_draws=2,
        batch_size=16,
    )  # fmt: skip
    found: dict[str, Any] = {
        "sampler": sampler,
        "num_chains": CHAINS,
        "num_draws": DRAWS,
        "tile": 64,
        "panel": 2,
        "backend": "torch",
        "passes": lossk.Passes(probe_batch=32),
        "progress": False,
    }
    return {**found, **changes}


def in_a_metric() -> lossk.SGLD:
    """Scales that rank 0 measures."""
    return lossk.SGLD(
        lr=1e-3,
        n_beta=30.0,
        localization=50.0,
        metric="fisher",
        num_burnin_steps=2,
        num_steps_bw_draws=2,
        batch_size=16,
    )


def tokens() -> tuple[nn.Module, Any, Any]:
    """A loss per token, some of them masked: rows are cut with their samples."""
    generator = torch.Generator().manual_seed(9)
    inputs, targets = torch.randn(70, 3, 4, generator=generator), torch.arange(210).reshape(70, 3) % 3
    targets[::4, 1] = -100
    return network(), (inputs, targets), "token_cross_entropy"


class KillAt:
    """Cross entropy whose process is gone at call number `at`."""

    def __init__(self, at: int | None) -> None:
        self.at, self.calls = at, 0
        self.__name__ = self.__qualname__ = "KillAt"
        self.__module__ = "distributed_worker"  # not __main__, as a rank: the loss is known again by its name

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Counted:
    """Cross entropy that counts the samples it is asked for, and takes a tenth of a millisecond for each."""

    def __init__(self) -> None:
        self.samples = 0
        self.__name__ = self.__qualname__ = "Counted"
        self.__module__ = "distributed_worker"

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.samples += len(batch[1])
        time.sleep(1e-4 * len(batch[1]))
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def counted() -> dict[str, Any]:
    """Few draws around many training samples: most passes are those over all of these, at w*."""
    loss = Counted()
    kernel = lossk.build_kernel(network(), data(), train=data(NUM_TRAIN), loss=loss, **settings())
    mean = kernel.meta["mean_loss_trace"]
    return {"samples": loss.samples, "timings": kernel.meta["timings"], "losses": [mean, kernel.variance.tolist()]}


def too_long_a_step(*_: Any, **__: Any) -> tuple[lossk.SGLD, None, list[str]]:
    """Chosen at lr localization / 2 = 2.5, where 2 is the limit: chains leave within a dozen steps, no two alike."""
    sampler = lossk.SGLD(
        lr=1.0, n_beta=30.0, localization=5.0, batch_size=16, num_burnin_steps=2, num_steps_bw_draws=3,
        integrator="euler", control_variate=False, noise_correction=False,
    )  # fmt: skip
    return sampler, None, ["lr = 1: made up"]


def restarted(folder: Path | None) -> dict[str, Any]:
    """Runs whose chosen step makes their chains explode: in a store (and in memory without one), and as traces."""
    choose, lossk.run.run.choose = lossk.run.run.choose, too_long_a_step
    try:
        out = None if folder is None else folder / "restart.lossk"
        kernel = lossk.build_kernel(network(), data(), out=out, **settings(sampler=lossk.SGLD()))
        asked = {key: value for key, value in settings(sampler=lossk.SGLD()).items() if key not in ("tile", "panel")}
        traces = lossk.sample_losses(network(), data(), **asked)
    finally:
        lossk.run.run.choose = choose
    return {
        "variance": kernel.variance.tolist(),
        "losses": traces.losses.tolist(),
        "reasons": [kernel.meta["reasons"], traces.meta["reasons"]],
        "sampler": kernel.meta["sampler"],
    }


def planned() -> dict[str, Any]:
    """Wide layers, whose passes take most of the memory: what a rank plans of them, and the batches that it runs."""
    chosen, seen = lossk.run.work.plan, []

    def noted(run: Any, *rest: Any) -> Any:
        planned = chosen(run, *rest)
        layout = planned.layout
        passes = pass_bytes(run.task, run.probe.parts[0].samples, run.train, 16)
        seen.extend([layout.weight_bytes, 4 * run.task.num_weights + passes, layout.reached_bytes, passes])
        return planned

    wide = nn.Sequential(nn.Linear(4, 2048), nn.Tanh(), nn.Linear(2048, 3))
    for number, parameter in enumerate(wide.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    lossk.run.work.plan = noted
    try:
        kernel = lossk.build_kernel(wide, data(1000), memory="60MB", **settings(passes=None))
    finally:
        lossk.run.work.plan = chosen
    return {"seen": seen, "passes": kernel.meta["passes"], "variance": float(kernel.variance.sum())}


def recipe() -> RecipeTask:
    x, y = data()
    return RecipeTask(model=network(), samples=(x, y), train=None, notes=f"by rank {os.environ.get('RANK')}")


def numbers(kernel: lossk.LossKernel) -> dict[str, Any]:
    return {"variance": kernel.variance.tolist(), "llc": kernel.diagnostics.llc, "ranks": kernel.meta["ranks"]}


def run(scenario: str, folder: Path, rank: int) -> Any:
    build = lossk.build_kernel
    if scenario in ("store", "shards", "pooled16", "metric"):
        changes = {"store": {}, "shards": {"num_chains": 1}, "pooled16": {"centering": "pooled", "dtype": "float16"},
                   "metric": {"sampler": in_a_metric()}}  # fmt: skip
        return numbers(build(network(), data(), out=folder / f"{scenario}.lossk", **settings(**changes[scenario])))
    if scenario == "tokens":
        model, samples, loss = tokens()
        changes = {"num_chains": 1, "tile": 4096}
        return numbers(build(model, samples, loss=loss, out=folder / "tokens.lossk", **settings(**changes)))
    if scenario == "outofcore":
        chosen = lossk.run.cost.choose_layout

        def in_the_store(size: Size, *_: Any, **__: Any) -> Layout:
            return in_store(size, 0, super_panel=size.draws, stripes=1)

        lossk.run.cost.choose_layout = in_the_store
        try:
            return numbers(build(network(), data(), out=folder / "outofcore.lossk", **settings()))
        finally:
            lossk.run.cost.choose_layout = chosen
    if scenario == "planned":
        return planned()
    if scenario in ("factor", "factor16"):  # in the store
        changes = {"dtype": "float16", "centering": "pooled", "num_chains": 1} if scenario == "factor16" else {}
        path = folder / f"{scenario}.lossk"
        return numbers(build(network(), data(), out=path, form="factor", **settings(**changes)))
    if scenario == "heldfactor":  # on every rank
        kernel = build(network(), data(), form="factor", **settings())
        torch.save(kernel.contents.blocks.factor, folder / f"heldfactor-{rank}.pt")
        return numbers(kernel)
    if scenario == "traces":
        asked = {key: value for key, value in settings().items() if key not in ("tile", "panel")}
        traces = lossk.sample_losses(network(), data(), **asked)
        torch.save([traces.losses, traces.excess], folder / f"traces-{rank}.pt")
        return {"n_beta": traces.n_beta, "ranks": traces.meta["ranks"], "config": sorted(traces.meta["config"])}
    if scenario == "cross":
        asked = {key: value for key, value in settings().items() if key not in ("tile", "panel")}
        cross = lossk.cross_kernel(network(), data(), data(20), **asked)
        return cross[:, :].tolist()
    if scenario == "memory":
        kernel = build(network(), data(), **settings())
        try:
            entries = kernel[:, :]
        except lossk.DistributedError as error:
            return {**numbers(kernel), "error": str(error)}
        torch.save(entries, folder / "memory.pt")
        return numbers(kernel)
    if scenario == "counted":
        return counted()
    if scenario == "restart":
        return restarted(folder)
    if scenario == "disagree":
        try:
            build(network(), data(N - rank), **settings())
        except lossk.DistributedError as error:
            return str(error)
    if scenario == "taken":
        try:
            build(network(), data(), out=folder / "store.lossk", **settings())
        except (lossk.DistributedError, FileExistsError) as error:
            return f"{type(error).__name__}: {error}"
    if scenario == "refused":
        try:
            build(network(), data(), memory="1kB", **settings())
        except (lossk.DistributedError, MemoryError) as error:
            return f"{type(error).__name__}: {error}"
    if scenario == "another":  # a finished store of other settings
        try:
            build(network(), data(), out=folder / "store.lossk", resume=True, **settings(num_draws=7))
        except (lossk.DistributedError, lossk.StoreError) as error:
            return f"{type(error).__name__}: {error}"
    if scenario == "alone":
        return build(network(), data(), distributed=False, **settings()).meta.get("ranks")
    if scenario == "auto":
        kernel = build(network(), data(), num_chains=2, num_draws=4, backend="torch", progress=False)
        return {**numbers(kernel), "sampler": kernel.meta["sampler"], "passes": kernel.meta["passes"]}
    if scenario == "cli":
        config = folder / "config.yaml"
        plain = {key: value for key, value in settings().items() if key in ("num_chains", "num_draws", "tile", "panel")}
        sampler = {"kind": "baoab", **settings()["sampler"].to_dict()}
        if rank == 0:
            build_section = {**plain, "backend": "torch"}
            content = {"task": "distributed_worker:recipe", "build": build_section, "sampler": sampler}
            config.write_text(
                yaml.safe_dump({**content, "passes": {"probe_batch": 32}, "out": str(folder / "cli.lossk")})
            )
        dist.barrier()
        first = main(["run", str(config)])
        dist.barrier()
        second = main(["run", str(config)])
        dist.barrier()
        return [first, second, main(["run", str(config), "--overwrite"]), torch.get_num_threads()]
    if scenario == "die":
        build(network(), data(), loss=KillAt(70 if rank == 1 else None), out=folder / "die.lossk", **settings())
    if scenario in ("finish", "whole"):
        path = folder / f"{scenario}.lossk"
        return numbers(build(network(), data(), loss=KillAt(None), out=path, resume=True, **settings()))
    raise ValueError(scenario)


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    if sys.argv[2:] != ["die"]:
        dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        (folder / f"{name}-{rank}.json").write_text(json.dumps(run(name, folder, rank)))
    if dist.is_initialized():
        dist.destroy_process_group()
