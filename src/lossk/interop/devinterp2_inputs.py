"""What a call of devinterp's `sample` is given: datasets of sequences, observables, masks; read and checked."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lossk.checks import (
    check_integer,
    check_mapping,
    check_tensor,
    shown,
)  # fmt: skip
from lossk.data.data import Samples
from lossk.data.reading import read_samples
from lossk.data.streams import streams_kept
from lossk.data.trees import leaves

ObservableSpec = Any  # a dataset with "input_ids", or (dataset, batches per draw)
ParamMasks = dict[str, Tensor | None]  # parameter -> its elements to sample, None for all of them


def check_observables(given: Any) -> Mapping[str, ObservableSpec]:
    observables = check_mapping("observables", given)
    if not observables:
        raise ValueError("observables must hold at least one data set, as name: data, got none")
    for name, spec in observables.items():
        if isinstance(spec, tuple):
            if len(spec) != 2:
                raise ValueError(f"observables[{name!r}] must be data or (data, batches per draw), got {shown(spec)}")
            check_integer(f"observables[{name!r}][1]", spec[1], 1)
    return observables


def read_sequences(source: Any, name: str) -> Samples:
    """{"input_ids": [n, P + 1] int64} of a dataset, in its order."""
    if not isinstance(source, Mapping):
        if isinstance(source, type | str | bytes | bytearray | range | Tensor | np.ndarray) or not (
            hasattr(source, "__getitem__") and hasattr(source, "__len__")
        ):
            raise TypeError(f'{name} must be {{"input_ids": tokens}} or a dataset of such, got {shown(source)}')
        try:
            with streams_kept():
                batches = [batch["input_ids"] for batch in DataLoader(source, batch_size=256)]
        except Exception as error:  # of the user's dataset, or of what is none
            raise TypeError(
                f'{name}[i]["input_ids"] must be a tensor of tokens, got {shown(source)}: {error}'
            ) from error
        if not batches or not all(isinstance(ids, Tensor) and ids.ndim == 2 for ids in batches):
            raise TypeError(
                f'{name}[i]["input_ids"] must be a tensor of tokens; of a datasets.Dataset, with_format("torch")'
            )
        source = {"input_ids": torch.cat(batches)}
    elif "input_ids" not in source:
        raise ValueError(f'{name} must hold "input_ids", got {shown(list(source))}')
    samples = read_samples({"input_ids": source["input_ids"]}, name)
    (ids,) = leaves(samples.tree)
    if ids.ndim != 2 or ids.shape[1] < 2 or ids.is_floating_point():
        raise ValueError(f"{name}: input_ids must be integers [n, 2 or more], got {ids.dtype} {list(ids.shape)}")
    return Samples({"input_ids": ids.long()}, len(ids))


def choose_sequences(samples: Samples, count: int, seed: int, name: str) -> Samples:
    """The sequences that devinterp would show an observable, in its order."""
    if count > len(samples):
        raise ValueError(
            f"observables[{name!r}] must hold batches per draw (batches_per_draw) x batch_size = {count} "
            f"sequences, got {len(samples)}"
        )
    index = torch.tensor(random.Random(seed).sample(range(len(samples)), count), dtype=torch.int64, device="cpu")
    return Samples({"input_ids": samples.tree["input_ids"][index]}, count)


def sampled_masks(model: nn.Module, given: ParamMasks | None) -> ParamMasks | None:
    """The parameters to sample that require grad, with bool masks."""
    if given is None:
        return None
    if not check_mapping("param_masks", given):
        raise ValueError("param_masks must name at least one parameter, got none")
    parameters, masks = dict(model.named_parameters()), {}
    for name, mask in check_mapping("param_masks", given).items():
        if name not in parameters:
            raise ValueError(f"param_masks must name parameters of the model, it has no {name!r}")
        if mask is not None:
            mask = check_tensor(f"param_masks[{name!r}]", mask, tuple(parameters[name].shape), of="a real number")
        if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"param_masks[{name!r}] must hold 0 and 1 only")
        if parameters[name].requires_grad:
            masks[name] = None if mask is None else mask.bool()
    return masks
