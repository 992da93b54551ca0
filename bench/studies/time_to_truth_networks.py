"""The three networks of `bench.studies.time_to_truth`, and what both sides are given of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.peers_devinterp import describe
from lossk.data.reading import read_samples
from lossk.recipes import RecipeTask, digits, fashion, multitask, require_accuracy, train_classifier
from lossk.recipes.arithmetic import OneNetwork

FASHION_PROBE = 1000


@dataclass(frozen=True)
class Network:
    """A trained network, the samples whose kernel is wanted, and its training data."""

    name: str
    what: str
    model: nn.Module
    probe: tuple[Tensor, Tensor]  # inputs, targets
    train: tuple[Tensor, Tensor]

    def save(self, path: Path) -> None:
        """For another process: plain data and tensors, read with weights_only=True."""
        torch.save(
            {
                "layers": json.dumps(describe(self.model)),
                "state": self.model.state_dict(),
                "probe_x": self.probe[0],
                "probe_y": self.probe[1],
                "train_x": self.train[0],
                "train_y": self.train[1],
            },
            path,
        )


def make_digits(checkpoint: Path | None) -> Network:
    """An MLP 64-128-128-10 on the split of the digits recipe."""
    task = digits.make_task(epochs=1, required_accuracy=0.0)  # for its data; its own network is another
    x, y = (part.flatten(1) if part.ndim > 1 else part for part in task.samples)
    num_train = len(task.train[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )  # fmt: skip
    train_classifier(model, x[:num_train], y[:num_train], epochs=15, batch_size=64, lr=8e-3, weight_decay=0.3, seed=0)
    accuracy = require_accuracy(model, x[num_train:], y[num_train:], at_least=0.95, what="digits MLP")
    what = f"MLP 64-128-128-10, held-out accuracy {accuracy:.1%}"
    return Network("digits", what, model, (x, y), (x[:num_train], y[:num_train]))


def make_fashion(checkpoint: Path | None) -> Network:
    task = fashion.make_task(num_probe=FASHION_PROBE, checkpoint=checkpoint)
    return _from_recipe("fashion", f"CNN with batch norm, the first {FASHION_PROBE:,} test images", task)


def make_multitask(checkpoint: Path | None) -> Network:
    made = _from_recipe("multitask", "MLP 60-512-29, a + b and a - b modulo 29", multitask.make_task())
    model, scale = as_layers(made.model)
    probe, train = ((x * scale, y) for x, y in (made.probe, made.train))
    return dataclasses.replace(made, model=model, probe=probe, train=train)


def as_layers(model: OneNetwork) -> tuple[nn.Sequential, Tensor]:
    """(the same function of scaled inputs, with the same weights, as plain layers; the scale [2 p + tasks])."""
    pairs, token = model.pairs, model.token
    inputs, tasks = pairs.in_features, token.in_features
    layers = nn.Sequential(nn.Linear(inputs + tasks, pairs.out_features), nn.ReLU(), model.head)
    with torch.no_grad():
        layers[0].weight.copy_(torch.cat([pairs.weight, token.weight], dim=1))
        layers[0].bias.copy_(pairs.bias)
    return layers.eval(), torch.cat([torch.ones(inputs), torch.full((tasks,), model.loudness)])


def _from_recipe(name: str, what: str, task: RecipeTask) -> Network:
    what = f"{what}, held-out accuracy {task.held_out_accuracy:.1%}"
    return Network(name, what, task.model, read_samples(task.samples, "samples").tree, task.train)


NETWORKS: dict[str, Callable[[Path | None], Network]] = {
    "digits": make_digits,
    "fashion": make_fashion,
    "multitask": make_multitask,
}
