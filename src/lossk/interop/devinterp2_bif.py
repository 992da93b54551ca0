"""devinterp 2's Bayesian influence function from its tree of losses, in the memory of the result.

Covariance or correlation of losses over all chains and draws pooled (one mean, ddof 1), as devinterp 2 defines it:
between sequences ("sequence": of each sequence's mean loss), or between all pairs of tokens of all pairs of sequences
("token"). Both come from one standardised matrix Z [draws, rows]: a block of the result is a block of Z'Z. Averaged
over pairs of tokens it is (mean of Z over a sequence's tokens)' times the same, and the pairs are never formed.

Means and variances are float64 sums, products float32. A loss that never varies has no correlation: NaN, as theirs.
(Theirs may show a number there, where its float32 mean of equal numbers is not that number.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lossk.ambient import without_autocast
from lossk.checks import check_choice, check_device, check_flag, check_integer, shown
from lossk.forms.blocks import tile_spans
from lossk.forms.centering import center, degrees_of_freedom
from lossk.interop.devinterp2_sample import LossFn, ObservableSpec, ParamMasks, sample
from lossk.interop.devinterp2_tree import MissingObservable, loss_names, open_tree, read_losses
from lossk.optional import require

CorrelationMethod = Literal["token", "sequence"]
ChainReductionMethod = Literal["stack", "mean"]
Range = Literal["all"] | Sequence[int]

STRIPE = 4096  # rows standardised at a time, and rows and columns of a block


def compute_bif(
    samples: Any,
    *,
    correlation_method: CorrelationMethod = "token",
    reduce_chain_dimension_method: ChainReductionMethod = "stack",
    loss_keys: Literal["all"] | list[str] = "all",
    batch_index_range_1: Range = "all",
    batch_index_range_2: Range = "all",
    average_tokenwise_bif: bool = False,
    compute_covariance: bool = False,
    batch_size: int = 32,
    device: str | torch.device | None = None,
) -> Any:
    """Bayesian influence function of sampling results; arguments and result as `devinterp.slt.bif.compute_bif`.

    Args:
        samples: the tree that devinterp's or lossk's `sample()` returns, or the path of its Zarr store.
        correlation_method: "token" or "sequence".
        reduce_chain_dimension_method: "stack" pools all chains' draws; "mean" averages over chains at each draw.
        loss_keys: the observables, "all" in alphabetical order.
        batch_index_range_1, batch_index_range_2: the sequences of the rows and of the columns.
        average_tokenwise_bif: the mean over token pairs, one number per pair of sequences.
        compute_covariance: covariance, nats^2, instead of correlation.
        batch_size: taken for compatibility; blocks have the size that runs well.
        device: where the products run; None is the GPU if there is one.

    Returns:
        xarray.Dataset with float32 `influences` (batch_1, batch_2) or, of tokens and not averaged, (batch_1, batch_2,
        target_position, target_position_T), and `input_ids`. Equal to theirs up to float32 rounding. Memory beyond
        the result: three times the losses, and of tokens a block of 4,096 rows and columns twice.

    Raises:
        ValueError: an unknown method, a chain that failed, or fewer than 2 draws.
        KeyError: a sequence or observable that is not there.
        ImportError: xarray is not installed.
    """
    xr = require("xarray", "devinterp")
    check_choice("correlation_method", correlation_method, ("token", "sequence"))
    check_choice("reduce_chain_dimension_method", reduce_chain_dimension_method, ("stack", "mean"))
    average_tokenwise_bif = check_flag("average_tokenwise_bif", average_tokenwise_bif)
    compute_covariance = check_flag("compute_covariance", compute_covariance)
    check_integer("batch_size", batch_size, 1)
    device = _device("device", device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for argument, chosen in (
        ("batch_index_range_1", batch_index_range_1),
        ("batch_index_range_2", batch_index_range_2),
    ):
        _check_range(argument, chosen)
    try:
        dataset = open_tree(samples).dataset
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise type(error)(f"samples{str(error).removeprefix('source')}") from error
    names = loss_names(dataset, loss_keys)
    rows, positions = _rows(dataset, names, correlation_method, reduce_chain_dimension_method)
    averaged = correlation_method == "token" and average_tokenwise_bif
    z = _standardise(rows, compute_covariance, positions if averaged else None).to(device)
    del rows
    per_sequence = 1 if correlation_method == "sequence" or averaged else positions
    labels = _labels(xr, dataset, names, z.shape[1] // per_sequence)
    first = _select("batch_index_range_1", labels, batch_index_range_1)
    second = _select("batch_index_range_2", labels, batch_index_range_2)
    index = labels.coords["batch"].values
    z1, z2 = (_columns(z, chosen, per_sequence) for chosen in (first, second))
    del z
    influences, dims = _products(z1, z2, per_sequence), ["batch_1", "batch_2"]
    coords: dict[str, np.ndarray] = {"batch_1": index[first], "batch_2": index[second]}
    if correlation_method == "sequence" and not compute_covariance:
        influences.clip(-1.0, 1.0, out=influences)
    if correlation_method == "token" and not averaged:
        influences = influences.reshape(len(first), len(second), positions, positions)  # of one token, too
        dims += ["target_position", "target_position_T"]
        coords["target_position"] = coords["target_position_T"] = np.arange(1, positions + 1)
    result = xr.DataArray(influences, name="influences", dims=dims, coords=coords).to_dataset()
    ids = [dataset[f"input_ids_{name}"].rename({f"batch_{name}": "batch", "token": "position"}) for name in names]
    result["input_ids"] = xr.concat(ids, dim="batch").load()
    return result.drop_vars([name for name in result.coords if result[name].ndim == 0])


def bif(
    model: nn.Module,
    dataset: Any,
    observables: dict[str, ObservableSpec],
    *,
    lr: float,
    n_beta: float,
    param_masks: ParamMasks | None = None,
    correlation_method: CorrelationMethod = "token",
    reduce_chain_dimension_method: ChainReductionMethod = "stack",
    average_tokenwise_bif: bool = False,
    compute_covariance: bool = False,
    bif_batch_size: int = 32,
    bif_device: str | torch.device | None = None,
    loss_fn: LossFn | None = None,
    **kwargs: Any,
) -> Any:
    """Sample and compute the influence function; arguments and result as `devinterp.slt.bif.bif`.

    Further keywords are those of `lossk.interop.devinterp.sample`, the others those of `compute_bif`.
    """
    check_choice("correlation_method", correlation_method, ("token", "sequence"))
    check_choice("reduce_chain_dimension_method", reduce_chain_dimension_method, ("stack", "mean"))
    check_flag("average_tokenwise_bif", average_tokenwise_bif)
    check_flag("compute_covariance", compute_covariance)
    check_integer("bif_batch_size", bif_batch_size, 1)
    _device("bif_device", bif_device)
    samples = sample(
        model, dataset, observables, lr=lr, n_beta=n_beta, param_masks=param_masks, loss_fn=loss_fn, **kwargs
    )
    return compute_bif(
        samples,
        correlation_method=correlation_method,
        reduce_chain_dimension_method=reduce_chain_dimension_method,
        average_tokenwise_bif=average_tokenwise_bif,
        compute_covariance=compute_covariance,
        batch_size=bif_batch_size,
        device=bif_device,
    )


def _rows(dataset: Any, names: list[str], method: str, reduction: str) -> tuple[Tensor, int]:
    """Losses of each row of the result, [chain, draw, row] float32, and the tokens of a sequence."""
    parts = []
    for name in names:
        losses = read_losses(dataset, name)
        positions = losses.shape[3]
        if method == "sequence":
            losses = losses.mean(axis=3, dtype=np.float32)
        if reduction == "mean":
            losses = losses.mean(axis=0, dtype=np.float32, keepdims=True)
        parts.append(losses.reshape(*losses.shape[:2], -1))
    rows = torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2))
    if rows.shape[0] * rows.shape[1] < 2:
        raise ValueError(f"samples must hold at least 2 draws, got {rows.shape[0] * rows.shape[1]}")
    return rows, positions


def _standardise(rows: Tensor, covariance: bool, positions: int | None) -> Tensor:
    """Z [D, rows] float32, so that Z'Z is what is wanted; averaged over each sequence's `positions` where given."""
    num_chains, num_draws, count = rows.shape
    freedom = degrees_of_freedom(num_chains, num_draws, "pooled")
    group = positions or 1
    z = torch.empty(num_chains * num_draws, count // group, dtype=torch.float32, device="cpu")
    for span in tile_spans(count, max(group, STRIPE // group * group)):
        centered = center(rows[:, :, span], "pooled")
        unit = torch.ones_like(centered.scale) if covariance else centered.variance.sqrt()  # 0 gives NaN: 0 * inf
        part = centered.factor * (centered.scale / unit / freedom**0.5).float()
        if positions is not None:
            part = part.reshape(len(part), -1, positions).mean(dim=2)
        z[:, span.start // group : span.stop // group] = part
    return z


def _labels(xr: Any, dataset: Any, names: list[str], count: int) -> Any:
    """The position of each sequence, by its label: its own coordinate where there is one, else its number."""
    coords = [f"batch_{name}" for name in names]
    if all(coord in dataset.coords for coord in coords):
        labels = np.concatenate([dataset.coords[coord].values for coord in coords])
    else:
        labels = np.arange(count)
    return xr.DataArray(np.arange(count), dims="batch", coords={"batch": labels})


def _device(name: str, value: Any) -> torch.device | None:
    """A device that torch knows, or None."""
    if check_device(name, value) is None:
        return None
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{name} must be a device that torch knows, got {shown(value)}") from error


def _check_range(name: str, wanted: Any) -> None:
    if isinstance(wanted, str):
        check_choice(name, wanted, ("all",))
    elif not isinstance(wanted, list | tuple | range) and not (isinstance(wanted, np.ndarray) and wanted.ndim == 1):
        raise TypeError(f"{name} must be 'all' or a list of sequences, got {shown(wanted)}")


def _select(name: str, labels: Any, wanted: Range) -> np.ndarray:
    """The positions of the sequences wanted: [r] int64."""
    if isinstance(wanted, str):
        return labels.values
    try:
        return labels.sel(batch=list(wanted)).values
    except (KeyError, TypeError, ValueError) as error:
        raise MissingObservable(f"{name} must be of the sequences that are there, got {shown(wanted)}") from error


def _columns(z: Tensor, chosen: np.ndarray, per_sequence: int) -> Tensor:
    """The columns of Z of some sequences; Z itself where these are all of them, in order."""
    if np.array_equal(chosen, np.arange(z.shape[1] // per_sequence)):
        return z
    columns = (torch.from_numpy(chosen)[:, None] * per_sequence + torch.arange(per_sequence, device="cpu")).reshape(-1)
    return z[:, columns.to(z.device)]


@without_autocast()
def _products(z1: Tensor, z2: Tensor, per_sequence: int) -> np.ndarray:
    """Z1'Z2 as [n1, n2] float32, or by tokens [n1, n2, P, P]."""
    n1, n2 = z1.shape[1] // per_sequence, z2.shape[1] // per_sequence
    shape = (n1, n2) if per_sequence == 1 else (n1, n2, per_sequence, per_sequence)
    out = np.empty(shape, dtype=np.float32)
    into, side = torch.from_numpy(out), max(1, STRIPE // per_sequence)
    for rows in tqdm(tile_spans(n1, side), desc="influence", unit="stripe", disable=n1 <= 4 * side):
        left = z1[:, rows.start * per_sequence : rows.stop * per_sequence].T
        if per_sequence == 1 and z2.device.type == "cpu":
            torch.mm(left, z2, out=into[rows])
            continue
        if per_sequence == 1:
            into[rows] = (left @ z2).cpu()
            continue
        for columns in tile_spans(n2, side):
            block = left @ z2[:, columns.start * per_sequence : columns.stop * per_sequence]
            block = block.reshape(rows.stop - rows.start, per_sequence, -1, per_sequence)
            into[rows, columns] = block.transpose(1, 2)
    return out
