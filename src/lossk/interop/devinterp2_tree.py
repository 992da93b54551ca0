"""devinterp 2's tree of sampling results: read into LossTraces, and written from them.

Its root dataset holds, per observable NAME, `loss_NAME` (chain, draw, batch_NAME, token_pos) float32 and
`input_ids_NAME` (batch_NAME, token); for learning coefficients also `sampling_loss_micro` (chain, step,
batch_sampling, token_pos) and `init_loss` (chain, token_pos). Its attributes hold `metadata["config"]["sampler"]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lossk.checks import (
    check_choice,
    check_flag,
    check_instance,
    check_number,
    check_optional,
    check_path,
    check_strings,
    check_tensor,
    check_text,
    shown,
)  # fmt: skip
from lossk.kernel.traces import LossTraces
from lossk.optional import require

PREFIX = "loss_"


class MissingObservable(KeyError, ValueError):
    """A sequence or an observable that is not there: devinterp's KeyError, and a bad argument as any other."""

    __str__ = Exception.__str__


def open_tree(source: Any) -> Any:
    """A tree as it is, or the one in a Zarr store at a path, read lazily.

    Raises:
        TypeError: neither.
        FileNotFoundError: nothing is there.
    """
    xr = require("xarray", "devinterp")
    if isinstance(source, str | Path):
        check_path("source", source)
        if not Path(source).exists():
            raise FileNotFoundError(f"source must be the path of a Zarr store, nothing is at {str(source)!r}")
        try:
            return xr.open_datatree(str(source), engine="zarr", consolidated=False)
        except Exception as error:  # of Zarr or xarray, as the case may be
            raise ValueError(f"source must be the path of a Zarr store, {str(source)!r} is none: {error}") from error
    if not isinstance(source, xr.DataTree):
        raise TypeError(f"source must be an xarray DataTree or the path of a Zarr store, got {shown(source)}")
    return source


def observable_id(name: str) -> str:
    """Their form of an observable's name within the names of variables."""
    plain = re.sub(r"\W", "_", name) or "_"
    return f"_{plain}" if plain[0].isdigit() else plain


def loss_names(dataset: Any, wanted: Literal["all"] | Sequence[str] = "all") -> list[str]:
    """The observables of a tree's dataset, sorted, or those wanted in their order.

    Raises:
        KeyError: there is none, or not one of those wanted.
    """
    found = sorted(str(v).removeprefix(PREFIX) for v in dataset.data_vars if str(v).startswith(PREFIX))
    if isinstance(wanted, str):
        if wanted != "all":
            raise MissingObservable(f"loss_keys must be 'all' or a list of observables of {found}, got {wanted!r}")
        if not found:
            raise MissingObservable(
                f"source must hold a variable {PREFIX}NAME, got {sorted(map(str, dataset.data_vars))}"
            )
        return found
    wanted = check_strings("loss_keys", wanted, "observables")
    missing = [name for name in wanted if name not in found]
    if missing or not wanted:
        raise MissingObservable(f"loss_keys must name observables of {found}, got {list(wanted)}")
    return list(wanted)


def read_losses(dataset: Any, name: str) -> np.ndarray:
    """The losses of an observable: [chain, draw, batch, token_pos] float32.

    Raises:
        ValueError: other dimensions, or a chain with a loss that is not finite: devinterp leaves a chain that failed
            so, with nothing but a warning.
    """
    array = dataset[f"{PREFIX}{name}"]
    expected = ("chain", "draw", f"batch_{name}", "token_pos")
    if array.dims != expected:
        raise ValueError(f"{PREFIX}{name} must have dimensions {expected}, got {array.dims}")
    losses = np.asarray(array.values, dtype=np.float32)
    for chain in range(losses.shape[0]):
        bad = ~np.isfinite(losses[chain]).all(axis=(1, 2))
        if bad.any():
            others = [c for c in range(losses.shape[0]) if c != chain]
            raise ValueError(
                f"{PREFIX}{name} must be finite; chain {chain} is not from draw {int(bad.argmax())} on, which is how "
                f"devinterp leaves a chain that failed: leave it out, tree.isel(chain={others}), or sample again"
            )
    return losses


def sampler_config(tree: Any) -> dict[str, Any]:
    """The sampler's settings as the tree keeps them; empty where it keeps none."""
    config = tree.attrs.get("metadata", {}).get("config", {}).get("sampler", {})
    return dict(config)


def read_traces(
    source: Any,
    *,
    loss_keys: Literal["all"] | Sequence[str] = "all",
    per_token: bool = False,
) -> LossTraces:
    """The losses of devinterp 2's sampling results, as traces of lossk.

    Args:
        source: what its `sample()` returned, or the path of its Zarr store.
        loss_keys: the observables, one after the other; "all" takes them in alphabetical order.
        per_token: a column per token (`traces.tokens`); False takes the mean over each sequence's tokens.

    Returns:
        LossTraces [chain, draw, column], `traces.sets` naming the columns of each observable where there are several.
        With `n_beta`, and with the excess training loss of each draw (the mean over its steps, less the initial loss),
        where the tree holds them.

    Raises:
        ValueError: a chain that failed (see `read_losses`), or fewer than 2 draws.
        KeyError: an observable that is not there.
        ImportError: xarray is not installed.
    """
    per_token = check_flag("per_token", per_token)
    tree = open_tree(source)
    dataset = tree.dataset
    names = loss_names(dataset, loss_keys)
    parts, tokens, sets, start = [], [], {}, 0
    for name in names:
        losses = read_losses(dataset, name)  # [C, T, B, P]
        num_samples, positions = losses.shape[2:]
        columns = losses.reshape(*losses.shape[:2], -1) if per_token else losses.mean(axis=3, dtype=np.float64)
        parts.append(columns.astype(np.float32, copy=False))
        tokens.append(np.stack(np.divmod(np.arange(num_samples * positions), positions), axis=1))
        sets[name] = slice(start, start + columns.shape[2])
        start += columns.shape[2]
    sampler = sampler_config(tree)
    return LossTraces(
        np.concatenate(parts, axis=2) if len(parts) > 1 else parts[0],
        excess=_excess(dataset, sampler),
        n_beta=None if sampler.get("n_beta") is None else float(sampler["n_beta"]),
        meta={"source": "devinterp", "sampler": sampler},
        tokens=np.concatenate(tokens) if per_token else None,
        sets=sets if len(sets) > 1 else None,
    )


def _excess(dataset: Any, sampler: Mapping[str, Any]) -> Tensor | None:
    """[chain, draw] float64: training loss over each draw's steps, less the initial loss; None where not recorded."""
    if "sampling_loss_micro" not in dataset or "init_loss" not in dataset:
        return None
    micro = dataset["sampling_loss_micro"]
    steps = micro.mean(dim=["batch_sampling", "token_pos"], dtype=np.float64).values  # [C, steps]
    num_draws, between = dataset.sizes["draw"], int(sampler.get("num_steps_bw_draws", 1))
    steps = steps[:, int(sampler.get("num_burnin_steps", 0)) :]
    if steps.shape[1] != num_draws * between or not np.isfinite(steps).all():
        return None
    per_draw = steps.reshape(-1, num_draws, between).mean(axis=2)
    return torch.from_numpy(per_draw - float(dataset["init_loss"].values.mean(dtype=np.float64)))


def to_datatree(
    traces: LossTraces,
    *,
    name: str = "all",
    input_ids: Tensor | np.ndarray | Mapping[str, Tensor | np.ndarray] | None = None,
    init_loss: float | None = None,
) -> Any:
    """Traces as the tree that devinterp 2's compute_bif, compute_llc and compute_susceptibilities take.

    Args:
        traces: of samples (token_pos is then of length 1) or of tokens, all positions of all samples.
        name: of the observable; ignored where the traces are of several sets, each of which becomes one.
        input_ids: [N, P + 1] integers, the token sequences of each observable (a mapping, of several). None numbers the
            samples: [i, 0, 0, ...].
        init_loss: mean training loss at the trained weights, nats; None takes what the traces' `meta` says
            ("anchor_loss"). Without it (or without `traces.excess`) the tree has no `init_loss` and
            `sampling_loss_micro`, which learning coefficients and susceptibilities need.

    Returns:
        xarray.DataTree. `sampling_loss_micro` has one step per draw, all of it after burn-in, and one entry of
        batch_sampling: the mean minibatch loss, repeated along token_pos.

    Raises:
        ValueError: tokens with gaps, or input_ids of another shape.
        ImportError: xarray is not installed.
    """
    traces, name = check_instance("traces", traces, LossTraces), check_text("name", name)
    init_loss = check_optional(check_number, "init_loss", init_loss)
    xr = require("xarray", "devinterp")
    spans = traces.sets or {name: slice(0, traces.num_samples)}
    given = input_ids if isinstance(input_ids, Mapping) else dict.fromkeys(spans, input_ids)
    for key in given:
        check_choice("input_ids", key, tuple(spans))
    variables: dict[str, Any] = {}
    for key, span in spans.items():
        num_samples, positions = _grid(traces, span)
        plain = observable_id(key)
        losses = traces.losses[:, :, span].reshape(*traces.losses.shape[:2], num_samples, positions).numpy()
        variables[f"{PREFIX}{plain}"] = (("chain", "draw", f"batch_{plain}", "token_pos"), losses)
        ids = _input_ids(given.get(key), num_samples, positions)
        variables[f"input_ids_{plain}"] = ((f"batch_{plain}", "token"), ids)
    level = traces.meta.get("anchor_loss") if init_loss is None else init_loss
    if level is not None:
        initial = np.full((traces.num_chains, positions), level, dtype=np.float32)
        variables["init_loss"] = (("chain", "token_pos"), initial)
        if traces.excess is not None:
            mean = np.asarray(traces.excess, dtype=np.float64) + level  # [C, T]
            micro = np.repeat(mean.astype(np.float32)[:, :, None, None], positions, axis=3)
            variables["sampling_loss_micro"] = (("chain", "step", "batch_sampling", "token_pos"), micro)
    sampler = {
        "n_beta": traces.n_beta,
        "num_chains": traces.num_chains,
        "num_draws": traces.num_draws,
        "num_burnin_steps": 0,
        "num_steps_bw_draws": 1,
    }
    observables = [{"obs_id": observable_id(key)} for key in spans]
    config = {"sampler": sampler, "observables": observables, "lossk": traces.meta.get("sampler")}
    return xr.DataTree(xr.Dataset(variables, attrs={"metadata": {"config": config}}))


def _grid(traces: LossTraces, span: slice) -> tuple[int, int]:
    """(samples, positions) of the columns of a set."""
    columns = span.stop - span.start
    if traces.tokens is None:
        return columns, 1
    tokens = traces.tokens[span]
    positions = int(tokens[:, 1].max()) + 1
    column = torch.arange(columns, device="cpu")
    full = torch.stack([column // positions, column % positions], dim=1)
    first = tokens[0] * torch.tensor([1, 0], dtype=torch.int64, device="cpu")
    if columns % positions or not torch.equal(tokens - first, full):
        raise ValueError(
            "traces must hold every position of every sample, in order, to be devinterp's (batch, token_pos) array; "
            "these leave tokens out: average them over each sample first"
        )
    return columns // positions, positions


def _input_ids(given: Any, num_samples: int, positions: int) -> np.ndarray:
    if given is None:
        ids = np.zeros((num_samples, positions + 1), dtype=np.int64)
        ids[:, 0] = np.arange(num_samples)
        return ids
    ids = check_tensor("input_ids", given, of="an integer").cpu().numpy()
    if ids.shape != (num_samples, positions + 1) or ids.dtype.kind not in "iu":
        raise ValueError(
            f"input_ids must be integers of shape [{num_samples}, {positions + 1}], got {ids.dtype} {list(ids.shape)}"
        )
    return ids.astype(np.int64)
