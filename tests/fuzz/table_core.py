"""Valid calls of `lossk` itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import lossk
from lossk.data.probe_sets import read_sources

from . import rules as r
from .table import Table
from .world import CHAINS, DRAWS, SETS, N, World

CENTERING, STORED = r.choice("chain", "pooled"), r.choice("float32", "float16")
PRECISION = r.choice(None, "bf16", "fp16", "tf32")
BACKEND = r.choice("auto", "torch", "cpp", "triton", "cuda")
SEED = r.integer(0, 2**32 - 1)
WORDS = {"key": ("index", "indices", "rows", "columns", "mask", "slice")}
AUTO, METHOD = r.choice("auto"), r.choice("auto", "lag1", "products", "chains")
SPANS = r.mapping_of(r.text, r.instance(slice))
EXCESS = r.optional(r.array(2))
TOKENS = r.optional(r.array(2, kinds="iu"))
META = r.optional(r.instance(dict))
LOSS = r.either(r.function, r.choice("cross_entropy", "mse", "token_cross_entropy"))


def source(value: Any) -> bool:
    """Samples in a form that is read: a loader, a data set, or a tree of tensors."""
    if isinstance(value, DataLoader | Dataset | lossk.ProbeSets):
        return True
    return isinstance(value, tuple | list | dict) and len(value) > 0 and all(
        isinstance(part, torch.Tensor) for part in (value.values() if isinstance(value, dict) else value)
    )  # fmt: skip


def names_of_rows(value: Any) -> bool:
    """Nothing, or an entry for each row: integers or texts."""
    return value is None or r.array(1, kinds="iu")(value) or r.sequence_of(r.text, least=1)(value)


RUN: dict[str, r.Rule] = {
    "train": r.optional(source),
    "query": source,
    "loader": source,
    "loss": LOSS,
    "num_chains": r.integer(1),
    "num_draws": r.integer(2),
    "centering": CENTERING,
    "backend": BACKEND,
    "precision": PRECISION,
    "seed": SEED,
    "sampler": r.optional(r.instance(lossk.SGLD, lossk.BAOAB, lossk.HMC, lossk.Laplace, lossk.Gaussian)),
    "params": r.optional(r.sequence_of(r.text, least=1)),
    "passes": r.optional(r.instance(lossk.Passes)),
    "rows": r.optional(r.rows),
    "distributed": r.optional(r.flag),
    "tile": r.integer(16),
    "panel": r.optional(r.integer(1)),
    "dtype": STORED,
    "form": r.choice("tiles", "factor"),
    "memory": r.optional(r.either(r.integer(1), r.number(above=0.0), r.text)),
    "data": r.choice("auto", "memory", "spool", "stream"),
    "out": r.optional(r.path),
    "ids": names_of_rows,
    "labels": names_of_rows,
}


def add_to(table: Table, w: World) -> None:
    """Every entry of the package."""
    _runs(table, w)
    _samplers(table)
    _traces(table, w)
    _kernel(table, w)
    _cross(table, w)


def _runs(table: Table, w: World) -> None:
    data, model = w.data, w.model
    short = w.short_run
    table.add("lossk.build_kernel", {"model": model, "loader": data, "tile": 16, **short}, RUN)
    table.add("lossk.sample_losses", {"model": model, "loader": data, **short}, RUN)
    query = (w.random(3, 3), torch.arange(3))
    table.add("lossk.cross_kernel", {"model": model, "train": data, "query": query, **short}, {**RUN, "train": source})
    table.add("lossk.predicted_labels", {"model": model, "loader": data}, RUN)
    table.add("lossk.ProbeSets", {"samples": data}, {"samples": source},
              function=_one_set(w), words={"samples": ("probe",)})  # fmt: skip


def _one_set(w: World) -> Any:
    """A set is looked into when it is read."""
    return lambda samples: read_sources(lossk.ProbeSets(probe=samples), w.data)


def _samplers(table: Table) -> None:
    positive, auto = r.number(above=0.0), r.either(AUTO, r.number(above=0.0))
    names = r.optional(r.sequence_of(r.text, least=1))
    steps: dict[str, r.Rule] = {
        "params": names,
        "n_beta": r.optional(positive),
        "localization": r.either(AUTO, r.number(least=0.0)),
        "metric": r.choice(None, "fisher"),
        "pilot_budget": r.optional(positive),
        "batch_size": r.optional(r.integer(1)),
        "num_burnin_steps": r.either(AUTO, r.integer(0)),
        "num_steps_bw_draws": r.either(AUTO, r.integer(1)),
        "lr": auto,
        "preconditioner": r.choice(None, "rmsprop"),
        "step_size": auto,
        "friction": auto,
        "integrator": r.anything,
        "control_variate": r.either(r.flag, AUTO),
        "noise_correction": r.either(r.flag, AUTO, r.number(least=0.0)),
        "averaged_noise": r.either(r.flag, AUTO),
    }
    table.add("lossk.SGLD", {}, {**steps, "localization": r.either(r.choice("auto", "fisher"), r.number(least=0.0))})
    table.add("lossk.BAOAB", {}, {**steps, "localization": r.either(r.choice("auto", "fisher"), r.number(least=0.0))})
    table.add("lossk.HMC", {"step_size": 0.1, "localization": 1.0},
              {**steps, "step_size": positive, "localization": r.number(least=0.0), "num_leapfrog_steps": r.integer(1),
               "num_burnin_steps": r.integer(0), "num_steps_bw_draws": r.integer(1)})  # fmt: skip
    table.add("lossk.Gaussian", {"sigma": 0.1}, {"params": names, "sigma": positive})
    table.add("lossk.Laplace", {}, {**steps, "structure": r.choice("kronecker", "diagonal")})
    for name, sampler in (
        ("HMC", lossk.HMC(step_size=0.1, localization=1.0)),
        ("Gaussian", lossk.Gaussian(sigma=0.1)),
        ("Laplace", lossk.Laplace()),
    ):
        if hasattr(type(sampler), "steps"):
            table.add(f"lossk.{name}.steps", {"num_draws": 2}, {"num_draws": r.integer(1)}, on=sampler)
    table.add(
        "lossk.Passes",
        {},
        {
            "probe_batch": r.integer(1),
            "gradient_batch": r.integer(1),
            "memory_format": r.choice("channels_last", "contiguous"),
            "num_threads": r.optional(r.integer(1)),
            "frozen_prefix": r.either(r.flag, r.text),
            "prefix_bytes": r.optional(r.integer(0)),
            "compile": r.either(r.flag, r.choice("graphs")),
            "fused_head": r.either(r.flag, AUTO),
            "overlap": r.either(r.flag, AUTO),
            "update_precision": r.choice("fp32", "tf32x3", "tf32", "fp16", "bf16"),
        },
    )


def _traces(table: Table, w: World) -> None:
    losses = w.random(CHAINS, DRAWS, N)
    known = {"excess": EXCESS, "n_beta": r.optional(r.number(above=0.0)), "meta": META, "tokens": TOKENS,
             "sets": r.optional(SPANS)}  # fmt: skip
    table.add("lossk.LossTraces", {"losses": losses}, {"losses": r.array(3), **known})
    table.add("lossk.LossTraces.save", lambda: {"path": w.fresh(".lossk")},
              {"centering": CENTERING, "dtype": STORED}, on=w.traces)  # fmt: skip
    counts = {"num_chains": r.integer(1), "num_draws": r.integer(2), "num_samples": r.integer(1)}
    table.add(
        "lossk.TraceWriter",
        lambda: {"path": w.fresh(".lossk"), "num_chains": CHAINS, "num_draws": DRAWS, "num_samples": N},
        {**counts, "path": r.path, "centering": CENTERING, "dtype": STORED, "chunk": r.optional(r.integer(1)), **known},
        function=_writer,
    )
    table.add("lossk.TraceWriter.append", {"losses": losses}, {"losses": r.array(1, 2, 3)},
              function=lambda losses: _append(w, losses))  # fmt: skip


def _writer(
    path: Any, num_chains: Any, num_draws: Any, num_samples: Any, centering: Any = "chain", dtype: Any = "float16",
    chunk: Any = None, excess: Any = None, n_beta: Any = None, tokens: Any = None, sets: Any = None, meta: Any = None,
) -> None:  # fmt: skip
    writer = lossk.TraceWriter(
        path, num_chains=num_chains, num_draws=num_draws, num_samples=num_samples, centering=centering, dtype=dtype,
        chunk=chunk, excess=excess, n_beta=n_beta, tokens=tokens, sets=sets, meta=meta,
    )  # fmt: skip
    if hasattr(writer, "_lock"):
        writer._lock.close()


def _append(w: World, losses: Any) -> None:
    path = w.folder / f"{w.fresh('.lossk').name}"
    with lossk.TraceWriter(path, num_chains=CHAINS, num_draws=DRAWS, num_samples=N) as writer:
        writer.append(losses)


def _kernel(table: Table, w: World) -> None:
    from lossk.diagnostics.diagnostics import Diagnostics
    from lossk.forms.blocks import Moments
    from lossk.forms.names import Names
    from lossk.forms.watched import Watched

    span = {"rows": r.rows, "columns": r.rows}
    table.add(
        "lossk.LossKernel",
        {"blocks": w.kernel.contents.blocks, "moments": w.kernel.contents.moments},
        {
            "blocks": r.instance(type(w.kernel.contents.blocks)),
            "moments": r.instance(Moments),
            "meta": META,
            "diagnostics": r.optional(r.instance(Diagnostics)),
            "tokens": TOKENS,
            "sets": r.optional(SPANS),
            "watched": r.optional(r.instance(Watched)),
            "names": r.optional(r.instance(Names)),
        },
    )
    table.add("lossk.LossKernel.from_traces", {"traces": w.traces},
              {"traces": r.instance(lossk.LossTraces), "centering": CENTERING})  # fmt: skip
    on = w.kernel
    table.add("lossk.LossKernel.__getitem__", {"key": 1}, {"key": _key}, on=on, words=WORDS)
    table.add("lossk.LossKernel.correlation", {}, span, on=on)
    table.add("lossk.LossKernel.standard_error", {"rows": [0], "columns": [1]},
              {**span, "method": METHOD}, on=on)  # fmt: skip
    vector = {"v": r.array(1, 2)}
    table.add("lossk.LossKernel.matvec", {"v": w.random(N)}, vector, on=on)
    table.add("lossk.LossKernel.__matmul__", {"v": w.random(N)}, vector, on=on)
    table.add("lossk.LossKernel.eigsh", {"k": 2}, {"k": r.integer(1)}, on=on)
    table.add("lossk.LossKernel.neighbors", {"k": 2},
              {"k": r.integer(1), "rows": r.optional(r.rows), "backend": r.optional(BACKEND)}, on=on)  # fmt: skip
    table.add("lossk.LossKernel.to_numpy", {}, on=on)
    for name, suffix in (("to_zarr", ".zarr"), ("to_memmap", ".npy"), ("save", ".lossk")):
        table.add(f"lossk.LossKernel.{name}", lambda suffix=suffix: {"path": w.fresh(suffix)}, on=on)
    table.add("lossk.LossKernel.named", {"labels": w.labels}, {"ids": names_of_rows, "labels": names_of_rows}, on=on)
    table.add("lossk.open", {"path": w.store})


def _key(value: Any) -> bool:
    if isinstance(value, tuple) and len(value) == 2:
        return all(r.rows(part) for part in value)
    return r.rows(value)


def _cross(table: Table, w: World) -> None:
    part = r.either(r.rows, r.text)
    table.add(
        "lossk.CrossKernel",
        {"kernel": w.kernel},
        {
            "kernel": r.instance(lossk.LossKernel),
            "train": part,
            "query": part,
            "samples": r.optional(r.array(1, kinds="iu")),
        },
    )
    span = {"rows": r.rows, "columns": r.rows}
    table.add("lossk.CrossKernel.__getitem__", {"key": 1}, {"key": _key}, on=w.cross, words=WORDS)
    for name in ("influence", "correlation"):
        table.add(f"lossk.CrossKernel.{name}", {}, span, on=w.cross)
    table.add("lossk.CrossKernel.standard_error", {"rows": [0], "columns": [1]},
              {**span, "method": METHOD}, on=w.cross)  # fmt: skip
    assert set(w.kernel.sets) == set(SETS)
    assert np.isfinite(w.kernel.to_numpy()).all()
