"""Traces and kernels as xarray objects, and in the groups ArviZ knows.

ArviZ 1.x has no InferenceData class any more: what its functions take is an `xarray.DataTree` with the groups it had.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lossk.checks import check_flag, check_instance, wrong_kind
from lossk.kernel.kernel import LossKernel
from lossk.kernel.traces import LossTraces
from lossk.optional import require


def to_xarray(source: LossTraces | LossKernel, *, correlation: bool = False) -> Any:
    """Traces or a kernel as an `xarray.Dataset`.

    Args:
        source: traces: `loss` (chain, draw, sample) float32, nats. A kernel: `covariance` (sample, other) float32,
            nats^2, `variance`, `mean_loss` and `dead` (sample). Columns know their number, their probe set (`set`) and,
            of tokens, the sample and position that they are of (`token_sample`, `token_position`).
        correlation: of a kernel, `correlation` instead of `covariance`.

    Raises:
        MemoryError: the matrix does not fit.
        TypeError: neither traces nor a kernel.
        ImportError: xarray is not installed.
    """
    correlation = check_flag("correlation", correlation)
    if not isinstance(source, LossTraces | LossKernel):
        raise wrong_kind("source", "a LossTraces or a LossKernel", source)
    xr = require("xarray", "arviz")
    if isinstance(source, LossTraces):
        return xr.Dataset(
            {"loss": (("chain", "draw", "sample"), source.losses.numpy(), {"units": "nats"})},
            coords={
                "chain": np.arange(source.num_chains),
                "draw": np.arange(source.num_draws),
                **_columns(source.num_samples, source.tokens, source.sets),
            },
        )
    name, units = ("correlation", "1") if correlation else ("covariance", "nats^2")
    columns = _columns(source.num_samples, source.tokens, source.sets)
    return xr.Dataset(
        {
            name: (("sample", "other"), source.to_numpy(correlation=correlation), {"units": units}),
            "variance": ("sample", source.variance.numpy(), {"units": "nats^2"}),
            "mean_loss": ("sample", source.mean_loss.numpy(), {"units": "nats"}),
            "dead": ("sample", source.dead.numpy()),
        },
        coords={**columns, "other": columns["sample"]},
        attrs={"num_chains": source.num_chains, "num_draws": source.num_draws, "centering": source.centering},
    )


def to_inferencedata(traces: LossTraces) -> Any:
    """Traces in ArviZ's groups, as the `xarray.DataTree` that ArviZ 1.x works on.

    Returns:
        `log_likelihood` with `loss` (chain, draw, observation): minus the losses, in nats, a log likelihood where the
        loss is one (cross entropy), for `arviz_stats.loo` and its like; `posterior` with `mean_loss` (chain, draw), and
        `excess_loss` where the traces know it, for `summary`, `rhat`, `ess` and trace plots.

    Raises:
        ImportError: arviz-base is not installed.
    """
    traces = check_instance("traces", traces, LossTraces)
    base = require("arviz_base", "arviz", package="arviz-base")
    losses = traces.losses.numpy()
    posterior = {"mean_loss": losses.mean(axis=2, dtype=np.float64)}
    if traces.excess is not None:
        posterior["excess_loss"] = np.asarray(traces.excess, dtype=np.float64)
    return base.from_dict(
        {"posterior": posterior, "log_likelihood": {"loss": -losses}},
        coords={"observation": np.arange(traces.num_samples)},
        dims={"loss": ["observation"]},  # "sample" is ArviZ's own, of chain and draw together
        attrs={"/": {"n_beta": traces.n_beta}} if traces.n_beta is not None else None,
    )


def _columns(count: int, tokens: Any, sets: dict[str, slice]) -> dict[str, Any]:
    """Coordinates of the samples."""
    coords: dict[str, Any] = {"sample": np.arange(count)}
    if tokens is not None:
        coords["token_sample"] = ("sample", tokens[:, 0].numpy())
        coords["token_position"] = ("sample", tokens[:, 1].numpy())
    if sets:
        names = np.empty(count, dtype=object)
        for name, span in sets.items():
            names[span] = name
        coords["set"] = ("sample", names.astype(str))
    return coords
