"""Valid calls of `lossk.interop`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lossk

from . import rules as r
from .table import Table
from .table_core import CENTERING, LOSS, PRECISION, SEED, source
from .world import CHAINS, DRAWS, N, World

KERNEL, TRACES = r.instance(lossk.LossKernel), r.instance(lossk.LossTraces)
POSITIVE, LEAST = r.number(above=0.0), r.number(least=0.0)


def add_to(table: Table, w: World) -> None:
    """Every entry of the package."""
    _sklearn(table, w)
    _checkpoints(table, w)
    _posteriors(table, w)
    _devinterp1(table, w)
    _devinterp2(table, w)
    table.add("lossk.interop.arviz.to_xarray", {"source": w.kernel}, {"source": r.either(KERNEL, TRACES)})
    table.add("lossk.interop.arviz.to_inferencedata", {"traces": w.traces}, {"traces": TRACES})


def _sklearn(table: Table, w: World) -> None:
    from lossk.interop.sklearn import LossKernelTransformer

    for name in ("gram", "affinity", "distance", "knn", "neighbor_graph"):
        k = {"k": 3} if name in ("knn", "neighbor_graph") else {}
        table.add(f"lossk.interop.sklearn.{name}", {"kernel": w.kernel, **k},
                  {"kernel": KERNEL, "k": r.integer(1), "mode": r.choice("distance", "connectivity")})  # fmt: skip
    table.add("lossk.interop.sklearn.losses", {"traces": w.traces}, {"traces": TRACES})
    x = w.random(N, 6).numpy()
    table.add(
        "lossk.interop.sklearn.LossKernelTransformer",
        {"output": "kernel", "correlation": True, "num_chains": 1},
        {"output": r.choice("kernel", "features"), "correlation": r.flag, "num_chains": r.integer(1)},
        function=_fitted(x),
    )
    matrix = r.array(2)
    table.add("lossk.interop.sklearn.LossKernelTransformer.fit", {"X": x}, {"X": matrix, "y": r.anything},
              on=LossKernelTransformer(), words={"X": ("X", "array", "Input", "data")})  # fmt: skip
    table.add("lossk.interop.sklearn.LossKernelTransformer.transform", {"X": x}, {"X": matrix},
              on=LossKernelTransformer().fit(x), words={"X": ("X", "array", "Input", "data")})  # fmt: skip


def _fitted(x: Any) -> Any:
    """scikit-learn's contract: a constructor keeps what it is given, and `fit` looks at it."""
    from lossk.interop.sklearn import LossKernelTransformer

    def make(output: Any, correlation: Any, num_chains: Any) -> Any:
        return LossKernelTransformer(output=output, correlation=correlation, num_chains=num_chains).fit(x)

    return make


def _checkpoints(table: Table, w: World) -> None:
    from lossk.analysis.compare import Comparison
    from lossk.interop.checkpoints import CheckpointKernels

    model, state = w.model, w.model.state_dict()
    file = w.folder / "state.pt"
    torch.save(state, file)

    def build(model: nn.Module) -> lossk.LossKernel:
        return w.kernel

    k = {"k": r.integer(1), "build": r.function}
    one = r.either(r.path, r.mapping_of(r.text, r.anything))
    table.add("lossk.interop.checkpoints.over_checkpoints",
              {"model": model, "checkpoints": [state, file], "build": build, "k": 2},
              {**k, "checkpoints": r.sequence_of(one)})  # fmt: skip
    table.add("lossk.interop.checkpoints.CheckpointKernels", {"build": build, "k": 2}, k)
    table.add("lossk.interop.checkpoints.CheckpointKernels.add", {"model": model, "name": "a"},
              on=CheckpointKernels(build, k=2))  # fmt: skip
    table.add("lossk.interop.checkpoints.CheckpointKernel", {"name": "a", "kernel": w.kernel, "change": None},
              {"kernel": KERNEL, "change": r.optional(r.instance(Comparison))})  # fmt: skip
    table.add("lossk.interop.checkpoints.read_state", {"path": file})
    (w.folder / "written" / "checkpoint-1").mkdir(parents=True)

    class Trainer:
        class args:
            output_dir = str(w.folder / "written")

    table.add("lossk.interop.checkpoints.checkpoints_of", {"trainer": Trainer()}, {"trainer": r.instance(Trainer)})
    kernels = CheckpointKernels(build, k=2)
    rule = {"kernels": r.instance(CheckpointKernels), "every_n_epochs": r.integer(1)}
    table.add("lossk.interop.checkpoints.lightning_callback", {"kernels": kernels}, rule)
    table.add("lossk.interop.checkpoints.huggingface_callback", {"kernels": kernels}, rule)


def _posteriors(table: Table, w: World) -> None:
    from lossk.interop import posteriors as p

    def log_posterior(params: Any, batch: Any) -> tuple[torch.Tensor, None]:
        return -params["w"].square().sum(), None

    scheduled = r.either(POSITIVE, r.function)
    rules = {
        "lr": scheduled, "temperature": scheduled, "localization": LEAST, "seed": SEED, "chain": SEED,
        "log_posterior": r.function, "state": r.instance(p.SGLDState), "batch": r.anything,
        "params": r.either(r.instance(torch.Tensor), r.instance(dict, list, tuple)),
    }  # fmt: skip
    table.add("lossk.interop.posteriors.build", {"log_posterior": log_posterior, "lr": 0.1}, rules)
    params = {"w": w.random(3)}
    table.add("lossk.interop.posteriors.init", {"params": params}, rules)
    table.add("lossk.interop.posteriors.update",
              lambda: {"state": p.init(params), "batch": None, "log_posterior": log_posterior, "lr": 0.1}, rules,
              work=())  # fmt: skip
    states = [w.model.state_dict(), {key: 2 * value for key, value in w.model.state_dict().items()}]
    state = r.either(r.mapping_of(r.text, r.anything), r.instance(torch.Tensor))
    one_chain = r.sequence_of(state, least=2)
    for module in ("posteriors", "weights"):
        table.add(
            f"lossk.interop.{module}.kernel_from_weights",
            {"weights": states, "model": w.model, "loader": w.data, "progress": False},
            {
                "weights": r.either(one_chain, r.sequence_of(one_chain, least=1)),
                "loader": source, "loss": LOSS, "centering": CENTERING, "precision": PRECISION,
            },
        )  # fmt: skip


def _devinterp1(table: Table, w: World) -> None:
    from lossk.interop.devinterp import LossKernelCallback, sgld

    weights = nn.Parameter(w.random(4))
    names = r.optional(r.sequence_of(r.text))
    rules = {
        "params": r.sequence_of(r.instance(nn.Parameter, dict), least=1),
        **dict.fromkeys(("lr", "noise_level"), POSITIVE),
        **dict.fromkeys(("weight_decay", "localization", "nbeta"), LEAST),
        "bounding_box_size": r.optional(LEAST),
        "optimize_over": r.optional(r.either(r.array(1), r.sequence_of(r.anything))),
        "metrics": names,
        "alpha": r.number(least=0.0, most=1.0),
        "eps": POSITIVE,
        "save_metrics": r.choice(False),
        "add_grad_correction": r.choice(False),
    }
    for name in ("sgld", "rmsprop_sgld"):
        table.add(f"lossk.interop.devinterp.{name}", {"params": [weights]}, rules)
    every = {
        "lr": 0.1, "noise_level": 1.0, "weight_decay": 0.0, "localization": 0.0, "nbeta": 1.0,
        "bounding_box_size": None, "optimize_over": None, "metrics": None, "alpha": None, "eps": 0.1,
    }  # fmt: skip
    table.add("lossk.interop.devinterp.LangevinOptimizer", {"params": [weights], **every},
              {**rules, "alpha": r.optional(rules["alpha"])})  # fmt: skip
    table.add("lossk.interop.devinterp.LangevinOptimizer.step", {}, {"closure": r.optional(r.function)},
              on=sgld([weights]))  # fmt: skip
    callback = {
        "num_chains": r.integer(1), "num_draws": r.integer(2), "probe": source, "loss": LOSS,
        "batch_size": r.integer(1), "centering": CENTERING, "nbeta": r.optional(POSITIVE),
    }  # fmt: skip
    size = {"num_chains": CHAINS, "num_draws": DRAWS, "probe": w.data}
    table.add("lossk.interop.devinterp.LossKernelCallback", size, callback)
    table.add("lossk.interop.devinterp.LossKernelCallback.__call__", {"chain": 0, "draw": 1, "model": w.model},
              {"chain": r.integer(0, CHAINS - 1), "draw": r.integer(0, DRAWS - 1)},
              on=LossKernelCallback(**size))  # fmt: skip


def _devinterp2(table: Table, w: World) -> None:
    import xarray

    from lossk.interop.devinterp import to_datatree

    tree = to_datatree(w.token_traces)
    results = r.either(r.path, r.instance(xarray.DataTree))
    keys = r.either(r.choice("all"), r.sequence_of(r.text, least=1))
    read = {"source": results, "loss_keys": keys}
    table.add("lossk.interop.devinterp.read_traces", {"source": tree}, read, words={"source": ("samples",)})
    ids = r.either(r.array(2, kinds="iu"), r.mapping_of(r.text, r.array(2, kinds="iu")))
    table.add("lossk.interop.devinterp.to_datatree", {"traces": w.traces, "name": "all"},
              {"traces": TRACES, "input_ids": r.optional(ids), "init_loss": r.optional(r.number())})  # fmt: skip
    span = r.either(r.choice("all"), r.sequence_of(r.integer(0)))
    method = {
        "correlation_method": r.choice("token", "sequence"),
        "reduce_chain_dimension_method": r.choice("stack", "mean"),
        "loss_keys": keys, "batch_index_range_1": span, "batch_index_range_2": span, "batch_size": r.integer(1),
    }  # fmt: skip
    table.add("lossk.interop.devinterp.compute_bif", {"samples": tree}, {"samples": results, **method},
              words={"samples": ("source",)})  # fmt: skip
    _devinterp2_runs(table, w, method)


def _devinterp2_runs(table: Table, w: World, method: dict[str, r.Rule]) -> None:
    from lossk.ops.philox import uint32_stream

    tokens = torch.from_numpy(uint32_stream(0, 0, 0, 0, 40).astype("int64") % 4).reshape(8, 5)
    data = {"input_ids": tokens}
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    dataset = r.either(r.instance(dict), source)
    counts = ("num_chains", "batch_size", "num_steps_bw_draws", "num_init_loss_batches", "batches_per_draw",
              "gradient_accumulation_steps")  # fmt: skip
    rules: dict[str, r.Rule] = {
        "dataset": dataset,
        "observables": r.mapping_of(r.text, r.anything),
        "param_masks": r.optional(r.mapping_of(r.text, r.anything)),
        **dict.fromkeys(counts, r.integer(1)),
        "num_draws": r.integer(2), "num_burnin_steps": r.integer(0), "init_seed": SEED, "obs_seed": r.integer(),
        **dict.fromkeys(("lr", "n_beta", "noise_level"), POSITIVE),
        **dict.fromkeys(("localization", "llc_weight_decay"), LEAST),
        **dict.fromkeys(("bounding_box_size", "init_noise"), r.optional(LEAST)),
        **dict.fromkeys(("rmsprop_eps", "rmsprop_alpha"), r.optional(POSITIVE)),
        "sampling_method": r.choice("sgmcmc_sgld", "rmsprop_sgld"),
        "sampling_method_kwargs": r.optional(r.mapping_of(r.text, r.anything)),
        "save_metrics": r.choice(False),
        "loss_fn": r.optional(r.function),
        "device": r.optional(r.either(r.text, r.instance(torch.device))),
        **method,
    }  # fmt: skip
    call = {
        "model": model, "dataset": data, "observables": {"probe": data}, "lr": 1e-3, "n_beta": 1.0, "num_chains": 1,
        "num_draws": 2, "batch_size": 2, "batches_per_draw": 1, "num_init_loss_batches": 1,
    }  # fmt: skip
    work = ("lossk.interop.devinterp2_sample._Sampling.result",)
    table.add("lossk.interop.devinterp.sample", call, rules, work=work)
    table.add("lossk.interop.devinterp.bif", call, rules, work=work)
