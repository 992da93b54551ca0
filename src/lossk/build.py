"""`build_kernel` and `sample_losses`: compose the stages. No numerics here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lossk.accumulate.runlog import RunLog
from lossk.ambient import usual_modes
from lossk.data.data import Transform
from lossk.data.room import Room
from lossk.disk.files import full_disk_named
from lossk.forms.names import read_names
from lossk.kernel.from_store import open_kernel
from lossk.kernel.kernel import LossKernel
from lossk.kernel.traces import LossTraces
from lossk.memory import Budget
from lossk.optional import check_run
from lossk.plan.layout import log_columns
from lossk.ranks.distributed import joined
from lossk.ranks.world import World
from lossk.run import record
from lossk.run.allocation import shortage_named
from lossk.run.cost import Planned
from lossk.run.making import make_kernel
from lossk.run.prepare import prepare
from lossk.run.restart import until_it_lasts
from lossk.run.run import Run
from lossk.run.work import Work, chosen_by, chosen_by_first, meta, rounds, usual_panel
from lossk.samplers.samplers import Sampler, check_sampler
from lossk.settings import check_settings
from lossk.store.store import open_finished, saved_panel
from lossk.task.losses import LossFunction
from lossk.task.passes import Passes, check_passes
from lossk.timings import Progress

NO_TILES = {"tile": 4096, "dtype": "float32", "centering": "chain", "form": "traces"}  # of traces: no tile is made


@usual_modes()
def build_kernel(
    model: nn.Module,
    loader: Any,
    *,
    train: Any = None,
    loss: str | LossFunction = "cross_entropy",
    transform: Transform | None = None,
    sampler: Sampler | None = None,
    params: Sequence[str] | None = None,
    num_chains: int = 4,
    num_draws: int = 200,
    tile: int = 4096,
    panel: int | None = None,
    dtype: str = "float32",
    centering: str = "chain",
    form: str = "tiles",
    memory: int | str | None = None,
    data: str = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    backend: str = "auto",
    device: str | torch.device | None = None,
    precision: str | None = None,
    passes: Passes | None = None,
    seed: int = 0,
    progress: bool = True,
    distributed: bool | None = None,
    ids: Any = None,
    labels: Any = None,
) -> LossKernel:
    """Build the loss kernel K_ij = Cov(loss_i, loss_j) of a trained model (arXiv 2509.26537).

    Args:
        model: the trained network; used in eval mode and given back bit-identical, whatever happens.
        loader: the N probe samples: a DataLoader, a Dataset or a tuple (inputs, targets) of tensors. Row i of the
            kernel is sample i in dataset order. Or several sets in one `ProbeSets`, one after the other
            (`kernel.sets`). Read once; random streams are then put back where they were (docs/data.md).
        train: the data that defines the training loss L_n, in the same forms; None is the probe data, which `ProbeSets`
            cannot be.
        loss: "cross_entropy" (class-index targets), "token_cross_entropy" (logits [B, T, C], class indices [B, T], -100
            where a token does not count), "mse"; one of torch's criteria, `nn.CrossEntropyLoss(...)`, `F.mse_loss` or a
            `functools.partial` of one, taken per sample as `lossk.task.criteria` says; or a callable (model, batch) ->
            losses [B], or per token (losses [B, T], mask [B, T] bool), the mask a function of the data alone. The
            kernel's rows are then the unmasked tokens (`kernel.tokens`), L_n is the mean over the unmasked training
            tokens, and n in n_beta = n / ln n their number; minibatches stay samples, L_B the sum over their unmasked
            tokens divided by their number of samples times the mean number of tokens per training sample.
        transform: what to do with the inputs of a batch before the model is given them, on the device: turning uint8
            images into normalised floats, say, so that the data stay in memory as they are. Deterministic, and sample
            by sample. Half-precision inputs are kept as they are too, and widened to float32 batch by batch.
        sampler: SGLD settings; None is `SGLD()`, which chooses everything by a pilot and says why. Or, as a control,
            `Gaussian(sigma=)`: independent draws without gradients.
        params: name patterns of the weights that are sampled, `["layer4.*", "fc.*"]`; None is the sampler's own, or
            all. Short for the sampler's `params=`.
        num_chains: independent chains from the trained weights.
        num_draws: draws per chain, at least 2.
        tile: side of a kernel tile in samples, a multiple of 16.
        panel: draws per rank-k update; None chooses by memory. Does not change the result beyond rounding.
        dtype: of the finished tiles, or factor, "float32" or "float16"; sums are float32 either way.
        centering: "chain" (each chain about its own mean) or "pooled" (adds the between-chain term).
        form: of the kernel: "tiles", N^2 / 2 entries whatever the number of draws; or "factor", the centered draws
            themselves, N entries a draw, for N large and draws few. The same methods and, within rounding, the same
            numbers. With `out` the factor is made there, from the log, in chunks of `tile` samples.
        memory: what the call may use beyond what the process holds when it begins: bytes, or text such as "8GB"; None
            is what is free. The plan is printed before work starts. Tiles are held in memory if they fit; if not, and
            `out` is given, they are made in that store at the end, from the log of the draws, within rounding the same.
        data: where the samples of a DataLoader or Dataset are kept: in "memory"; in a "spool", unnamed mapped files
            beside `out` or in a temporary folder, which are gone after the call; "auto" spools what would take more
            than half of `memory`. Or nowhere: a "stream" reads a map-style dataset again at every pass, which must then
            give the same samples, in batches of any form if the loss is a callable. The numbers are the same.
        out: path of a `.lossk` store to write; None keeps the kernel in memory only.
        resume: continue an interrupted run in `out`, to the result of a run that was not (bitwise, or as `seed` says).
        backend: of the ops: "torch", "cpp" (CPU), "triton" (CUDA), each explicit one or an error; "auto" takes what
            passes its self-test here: on a CUDA device the Triton kernels, on a CPU the C++ ones. `meta["ops"]` says.
        device: where to run; None is the model's own. The model is back on its own device afterwards.
        precision: of the forward pass: None (float32, whatever torch's flags allow), "bf16", "fp16" or (CUDA) "tf32".
            Weights stay float32.
        passes: how forward and backward passes are run; None has a pilot choose (it is printed, and kept in `meta`), or
            in a run of some seconds takes `Passes()`.
        seed: of noise and minibatches, from 0 to 2^32 - 1. The same seed and passes give the same kernel bitwise
            (on a CUDA device within rounding, unless torch's deterministic algorithms are on; `meta["repeats"]` says).
        progress: print choices and cost, and show a progress bar, on stderr.
        distributed: None spreads the run over the processes of torchrun, or of a process group that is there: every one
            of them must then make this call, with the same arguments. False keeps to this process; True insists.
        ids: [N] integers or texts, each another, what the rows are called: kept with the kernel and in its store, and
            shown in tables, pictures and reports. A store that is complete keeps its own.
        labels: [N] classes of the rows, integers from 0 or texts; likewise.

    Returns:
        A LossKernel, in nats^2. Of a distributed run: with `out`, or as a factor, on every rank; tiles without `out` on
        rank 0, while the others get one that knows its moments and diagnostics only.

    Raises:
        ValueError, TypeError: a bad argument, before sampling starts.
        MemoryError: the data or the kernel would not fit, before sampling starts; the message says what would. Or the
            system refused memory later: what was planned, and what is free.
        RuntimeError: the dataset's own code failed; the message says at which samples, and its error is the cause.
        DivergedError: a chain left the neighborhood of the trained weights.
        BackendError: an explicit backend cannot run here.
        DistributedError: ranks disagree on the call, or one of them has stopped; it is named.
        StoreError, FileExistsError: `out` is taken, damaged, holds another run, or does not fit on its disk.
    """
    plain = check_settings(
        num_chains=num_chains,
        num_draws=num_draws,
        tile=tile,
        panel=panel,
        dtype=dtype,
        centering=centering,
        form=form,
        backend=backend,
        precision=precision,
        seed=seed,
        memory=memory,
        data=data,
        transform=transform,
        device=device,
        out=out,
        resume=resume,
        progress=progress,
        distributed=distributed,
    )
    num_chains, num_draws, tile, panel = (plain[key] for key in ("num_chains", "num_draws", "tile", "panel"))
    dtype, centering, form, backend = (plain[key] for key in ("dtype", "centering", "form", "backend"))
    precision, seed, path, resume = (plain[key] for key in ("precision", "seed", "out", "resume"))
    progress, distributed = plain["progress"], plain["distributed"]
    passes, sampler = check_passes(passes), check_sampler(sampler, num_draws, params)
    names = read_names(ids, labels)
    check_run(stored=path is not None)
    budget = Budget.now(plain["memory"])
    if resume and out is None:
        raise ValueError("resume=True needs out=, the store to continue, got None")
    with (
        joined(distributed) as world,
        full_disk_named(path),
        shortage_named(budget),
        Progress(progress and world.first) as bar,
    ):
        saved = world.decide(lambda: _look(path, resume))
        prepared = prepare(
            model, loader, train, loss, sampler, num_chains, num_draws, backend, device, precision, seed, transform,
            bar, Room(budget, plain["data"], path), world,
        )  # fmt: skip
        names.check(len(prepared.probe))
        settings = {"tile": tile, "dtype": dtype, "centering": centering, "form": None if form == "tiles" else form}
        panel = panel or saved or usual_panel(world, prepared, budget)
        request = {**record.request(prepared), **settings, "panel": panel}
        asked = {"passes": None if passes is None else passes.to_dict(), "out": str(path), "resume": resume}
        world.agree({**request, **asked})
        if path is not None and world.decide(lambda: path.exists() and open_finished(path, request) is not None):
            bar.say(f"{path} is already complete")
            return open_kernel(path)
        # A new store is made only once the pilot and the memory plan have passed: a refused run leaves nothing behind.
        log: RunLog | None = None
        try:
            log = world.first_makes(lambda: None if path is None else _open_log(path, request))
            with chosen_by_first(world, prepared, request, passes, path, log, budget, bar) as (run, planned):
                world.use_device(run.task.device)
                if path is not None:
                    log = _log_of_all(world, run, path, log, request, planned)

                def attempt(run: Run) -> LossKernel:
                    return make_kernel(Work(world, run, request, planned, budget, bar, log, names))

                def forget(run: Run) -> None:
                    nonlocal log
                    if log is not None and path is not None:
                        log = _restart(world, log, path, request, chosen_by(run, planned))

                return until_it_lasts(run, bar, attempt, forget)
        finally:
            if log is not None:
                log.close()


def _look(path: Path | None, resume: bool) -> int | None:
    """Refuse a taken path; the panel of a run to go on with."""
    if path is not None and path.exists() and not resume:
        raise FileExistsError(f"out={str(path)!r} exists; pass resume=True to continue it, or another path")
    return saved_panel(path)


def _open_log(path: Path, request: dict[str, Any]) -> RunLog | None:
    return RunLog.open(path, request) if path.exists() else None


def _log_of_all(
    world: World, run: Run, path: Path, log: RunLog | None, request: dict[str, Any], planned: Planned
) -> RunLog:
    """The log of the run on every rank; rank 0 makes it where it has not been opened."""
    if world.first and log is None:
        columns = log_columns(len(run.probe), request["tile"]) if planned.layout.place.of_log else None
        with run.timings.measure("store"):
            log = RunLog.create(path, request, chosen_by(run, planned), columns)
    world.barrier()
    with run.timings.measure("store"):
        found = log or RunLog.open(path, request, lock=False)
    assert found is not None
    return found


def _restart(world: World, log: RunLog, path: Path, request: dict[str, Any], chosen: dict[str, Any]) -> RunLog:
    """The log without draws, for other settings: rank 0 forgets them, the others read that they are gone."""
    if world.first:
        log.restart(request, chosen)
    world.barrier()
    again = log if world.first else RunLog.open(path, request, lock=False)
    assert again is not None
    return again


@usual_modes()
def sample_losses(
    model: nn.Module,
    loader: Any,
    *,
    train: Any = None,
    loss: str | LossFunction = "cross_entropy",
    transform: Transform | None = None,
    sampler: Sampler | None = None,
    params: Sequence[str] | None = None,
    num_chains: int = 4,
    num_draws: int = 200,
    backend: str = "auto",
    device: str | torch.device | None = None,
    precision: str | None = None,
    passes: Passes | None = None,
    data: str = "auto",
    seed: int = 0,
    progress: bool = True,
    distributed: bool | None = None,
) -> LossTraces:
    """The loss traces themselves, [chain, draw, sample]: for N large and draws few. Arguments as in `build_kernel`.

    On many ranks, which must all make this call, every rank gets all traces.
    """
    plain = check_settings(
        num_chains=num_chains,
        num_draws=num_draws,
        backend=backend,
        precision=precision,
        seed=seed,
        data=data,
        transform=transform,
        device=device,
        progress=progress,
        distributed=distributed,
    )
    num_chains, num_draws, backend = (plain[key] for key in ("num_chains", "num_draws", "backend"))
    precision, seed, progress = (plain[key] for key in ("precision", "seed", "progress"))
    distributed = plain["distributed"]
    passes, sampler = check_passes(passes), check_sampler(sampler, num_draws, params)
    budget = Budget.now(None)
    with joined(distributed) as world, shortage_named(budget), Progress(progress and world.first) as bar:
        prepared = prepare(
            model, loader, train, loss, sampler, num_chains, num_draws, backend, device, precision, seed, transform,
            bar, Room(budget, plain["data"]), world,
        )  # fmt: skip
        config = record.request(prepared)
        request = {**config, **NO_TILES, "panel": usual_panel(world, prepared, budget)}
        world.agree({**request, "passes": None if passes is None else passes.to_dict()})
        with chosen_by_first(world, prepared, request, passes, None, None, budget, bar) as (run, planned):
            world.use_device(run.task.device)

            def attempt(run: Run) -> LossTraces:
                work = Work(world, run, request, planned, budget, bar, None)
                losses = record.losses(run, (part.on_host() for received, _ in rounds(work) for part in received))
                return record.traces(run, losses, {**meta(work), "config": config})

            return until_it_lasts(run, bar, attempt)
