"""Runnable experiments: each is a config (a .yaml file here) naming a function that returns a `RecipeTask`.

To run your own model, write such a function anywhere importable, copy a packaged .yaml, and point its `task:` at it:
`lossk run mine.yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossk.checks import (
    check_callable,
    check_instance,
    check_integer,
    check_number,
    check_optional,
    check_path,
    check_tensor,
    check_text,
    wrong_kind,
)  # fmt: skip
from lossk.errors import LosskError
from lossk.recipes.arguments import MOST_EPOCHS, check_pairs, check_seed, check_share, check_source
from lossk.recipes.defaults import usual_defaults
from lossk.records import check_record


class RecipeError(LosskError):
    """A recipe cannot give what it promises: its data is missing, or its network trained to too low an accuracy."""


@dataclass(frozen=True, kw_only=True)
class RecipeTask:
    """What a recipe hands to `lossk.build_kernel`, and what the printed story and the picture need besides."""

    model: nn.Module  # trained
    samples: Any  # the N probe samples: (inputs, targets) tensors, a Dataset or a DataLoader
    train: Any = None  # the data that defines L_n; None = the samples
    loss: Any = "cross_entropy"  # name, or callable loss(model, batch) -> losses [B]
    transform: Any = None  # what to do with a batch's inputs before the model is given them
    labels: Tensor | None = None  # [N] int64
    images: Tensor | None = None  # [N, H, W] or [N, H, W, 3] float32 in [0, 1], as shown in the picture
    class_names: Sequence[str] = ()
    held_out: Tensor | None = None  # [N] bool: True where the network was not trained on the sample
    held_out_accuracy: float | None = None  # in [0, 1]
    notes: str = ""  # one or two lines, printed before the kernel is built
    row_texts: Sequence[str] | None = None  # the text of each row of the kernel, a token's or a sequence's
    label_word: str = "class"  # what a label is called
    checkpoints: Sequence[Path] = ()  # state dicts of the model while it was trained, earliest first; not as it is now
    synsets: Sequence[str] | None = None  # of label 0, 1, ...: WordNet's noun, by name, offset or wnid

    def __post_init__(self) -> None:
        check_record(self)
        check_source("samples", self.samples)
        check_optional(check_source, "train", self.train)
        check_optional(check_callable, "transform", self.transform)
        check_optional(check_number, "held_out_accuracy", self.held_out_accuracy, least=0.0, most=1.0)
        if not isinstance(self.loss, str):
            check_callable("loss", self.loss, "the name of a loss, or a callable")
        if isinstance(self.checkpoints, str | bytes) or not isinstance(self.checkpoints, Sequence):
            raise wrong_kind("checkpoints", "a list of paths", self.checkpoints)
        for checkpoint in self.checkpoints:
            check_path("checkpoints", checkpoint)
        labels = check_optional(check_tensor, "labels", self.labels, ("N",), of="an integer")
        for name, sizes, of in (("images", (3, 4), "a number"), ("held_out", (1,), "a flag")):
            given = check_optional(check_tensor, name, getattr(self, name), of=of)
            if given is not None and (given.ndim not in sizes or (labels is not None and len(given) != len(labels))):
                raise ValueError(f"{name} must be [N, ...], an entry per label, got {list(given.shape)}")


def packaged_config(name: str) -> Path | None:
    """The path of the packaged config called `name` ("digits", "fashion"), or None."""
    check_text("name", name)
    path = Path(__file__).parent / f"{name}.yaml"
    return path if name in packaged_names() else None


def packaged_names() -> list[str]:
    """Names that `lossk run` accepts in place of a config file."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def packaged_tasks() -> list[str]:
    """What the packaged configs name as their tasks: the recipes that this library vouches for."""
    return [f"lossk.recipes.{name}:make_task" for name in packaged_names()]


@usual_defaults()
def train_classifier(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    seed: int,
    each_epoch: Callable[[int, float], None] | None = None,
) -> None:
    """Train in place with AdamW and a one-cycle learning rate, and leave the model in eval mode.

    `inputs` [n, ...] float32, `targets` [n] int64. The order of the samples comes from `seed` alone; the caller seeds
    the initial weights. `each_epoch(epoch, loss)` is told the epoch, from 1, and its mean training loss in nats.
    """
    check_instance("model", model, nn.Module)
    inputs, targets = check_pairs(inputs, targets)
    epochs, batch_size = check_integer("epochs", epochs, 0, MOST_EPOCHS), check_integer("batch_size", batch_size, 1)
    lr, weight_decay = check_number("lr", lr, above=0.0), check_number("weight_decay", weight_decay, least=0.0)
    seed, each_epoch = check_seed(seed), check_optional(check_callable, "each_epoch", each_epoch)
    order = np.random.default_rng(np.random.SeedSequence(seed))
    count = len(targets)
    steps = math.ceil(count / batch_size) * epochs
    if steps == 0:
        model.eval()
        return
    rise = 5 if steps == 4 else steps  # of 4 steps torch divides by the length of a rise of none
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=rise, pct_start=0.25)
    model.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for rows in torch.from_numpy(order.permutation(count)).split(batch_size):
            loss = nn.functional.cross_entropy(model(inputs[rows]), targets[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        if each_epoch is not None:
            each_epoch(epoch, total / count)
    model.eval()


@torch.inference_mode()
def predict(
    model: nn.Module, inputs: Tensor, batch_size: int = 200, transform: Callable[[Any], Any] | None = None
) -> Tensor:
    """Predicted classes [N] int64 of a classifier in eval mode; the model's train/eval modes are put back."""
    check_instance("model", model, nn.Module)
    inputs, transform = check_tensor("inputs", inputs), check_optional(check_callable, "transform", transform)
    if inputs.ndim < 2:
        raise ValueError(f"inputs must be [n, ...], got {list(inputs.shape)}")
    batch_size = check_integer("batch_size", batch_size, 1)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        parts = inputs.split(batch_size)
        return torch.cat([model(part if transform is None else transform(part)).argmax(dim=1) for part in parts])
    finally:
        for module, training in modes:
            module.training = training


def require_accuracy(model: nn.Module, inputs: Tensor, targets: Tensor, *, at_least: float, what: str) -> float:
    """Accuracy on held-out samples; RecipeError when it is below `at_least`, as the kernel would then mislead."""
    at_least = check_share("at_least", at_least)
    check_text("what", what)
    inputs, targets = check_pairs(inputs, targets, at_least=0)
    accuracy = (predict(model, inputs) == targets).double().mean().item()
    if not accuracy >= at_least:
        raise RecipeError(
            f"{what}: held-out accuracy is {accuracy:.2%}, below the {at_least:.0%} this recipe promises; "
            "train longer (task_args: epochs) or change seed"
        )
    return accuracy
