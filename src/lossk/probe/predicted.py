"""The model's own predictions as targets: a probe that does not know the true labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lossk.ambient import usual_modes
from lossk.checks import check_callable, check_flag, check_optional
from lossk.data.data import Transform
from lossk.data.reading import read_samples
from lossk.task.losses import forward, resolve_loss, split_batch
from lossk.task.passes import Passes
from lossk.task.task import Task
from lossk.timings import Progress

BATCH = 256


@usual_modes()
def predicted_labels(
    model: nn.Module, loader: Any, transform: Transform | None = None, *, progress: bool = True
) -> tuple[Any, Tensor]:
    """The same samples with the class the trained model gives each, for `build_kernel(model, predicted_labels(...))`.

    With true labels a misclassified sample's loss is large and moves against its neighbors'; with predicted ones every
    loss measures how firmly the model holds its own answer.

    Args:
        model: a classifier with outputs [B, C]; used in eval mode and given back as it was.
        loader: (inputs, targets) samples, in any form `build_kernel` takes; the targets are not looked at.
        transform: of a batch's inputs, as in `build_kernel`.
        progress: show a progress bar on stderr while data are read.

    Returns:
        (inputs, predictions [N] int64), on the CPU or wherever the inputs are.

    Raises:
        ValueError: batches that are not (inputs, targets), or outputs that are not [B, C].
    """
    transform = check_optional(check_callable, "transform", transform, "a callable or None")
    progress = check_flag("progress", progress)
    with Progress(progress) as bar:
        samples = read_samples(loader, bar=bar).transformed(transform, "loader")
    inputs, _ = split_batch(samples.tree)
    predictions = []
    task = Task(model, resolve_loss("cross_entropy"))
    task.switch = "eval"  # as its user calls it
    task.use_passes(Passes(memory_format="contiguous"))
    with task, torch.no_grad():
        placed = task.place(samples)
        for _, batch in placed.batches(BATCH):
            outputs = forward(model, split_batch(batch)[0])
            if outputs.ndim != 2:
                raise ValueError(f"model must have outputs of shape [B, C], got {list(outputs.shape)}")
            predictions.append(outputs.argmax(dim=1).cpu())
    return inputs, torch.cat(predictions).clone()
