"""Recipe: one small network that computes two or four functions of a and b modulo p, told which by a task token.

The tasks run through the same weights, and the targets are residues, not task names: that an input's neighbors are of
its own task is nothing the losses were told. A network that memorises the table shows no such blocks, so this one is
trained until it generalises to pairs it never saw (A. Power et al., Grokking, arXiv 2201.02177, is where these tables
come from). Controls: answers at random, which can only be memorised; a trunk that all tasks share; a network for each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lossk.checks import check_choice, check_integer, check_number, check_optional, check_path
from lossk.recipes import RecipeError, RecipeTask, predict, require_accuracy
from lossk.recipes.arguments import MOST_EPOCHS, MOST_SIDE, check_seed, check_share
from lossk.recipes.arithmetic import TASKS, Disjoint, OneNetwork, SharedTrunk, arithmetic
from lossk.recipes.defaults import usual_defaults

NETWORKS = ("one", "trunk", "disjoint")
ANSWERS = ("rules", "random")
LR, LAST_LR, WEIGHT_DECAY = 1e-2, 1e-3, 1.0
# Smoothed targets keep every input's gradient alive, which is what makes the network generalise within a thousand
# epochs. Plain cross entropy then takes over, long enough to leave the weights where the kernel's own loss is flat, not
# so long that the network starts to memorise.
SMOOTHING = 0.1


@usual_defaults()
def make_task(
    *,
    p: int = 23,
    num_tasks: int = 2,
    network: str = "one",
    answers: str = "rules",
    hidden: int = 256,
    loudness: float = 3.0,
    seed: int = 0,
    train_share: float = 0.8,
    epochs: int = 1000,
    plain_share: float = 0.25,
    required_accuracy: float = 0.99,
    checkpoint: str | Path | None = None,
) -> RecipeTask:
    """Train on a random `train_share` of each task's p^2 pairs; probe all `num_tasks` p^2, training inputs first.

    Args:
        p: the modulus.
        num_tasks: the first two, three or four of a + b, a - b, 2a + b, a + 2b.
        network: "one" network; a "trunk" with a head for each task; or "disjoint" networks, `hidden` units each.
        answers: "rules", or "random" ones, which must be memorised: trained without weight decay or smoothing, and
            `required_accuracy` is then of the training inputs.
        loudness: of the task token in "one" network.
        epochs: of full batches, so an epoch is a step; seconds of work on one core.
        plain_share: of the epochs, the last ones, on plain targets; four tasks start to memorise in long ones.
        checkpoint: the trained weights are read from that file if it exists, and written there if it does not.

    The labels are the tasks, so class purity is the share of neighbors of the same task. Raises RecipeError when a
    task's held-out accuracy is below `required_accuracy`.
    """
    seed, checkpoint = check_seed(seed), check_optional(check_path, "checkpoint", checkpoint)
    required_accuracy = check_share("required_accuracy", required_accuracy)
    p = check_integer("p", p, 2, ceiling=MOST_SIDE)
    num_tasks = check_integer("num_tasks", num_tasks, 2, len(TASKS))
    network = check_choice("network", network, NETWORKS)
    answers = check_choice("answers", answers, ANSWERS)
    hidden = check_integer("hidden", hidden, 1, MOST_SIDE)
    loudness = check_number("loudness", loudness, "a number", above=0.0)
    epochs = check_integer("epochs", epochs, 0, ceiling=MOST_EPOCHS)
    train_share = check_number("train_share", train_share, above=0.0, most=1.0)
    plain_share = check_number("plain_share", plain_share, "a number", least=0.0)
    if plain_share > 1:
        raise ValueError(f"plain_share must be at most 1, got {plain_share}")
    inputs, targets, tasks, num_train = arithmetic(p, train_share, seed, num_tasks)
    if not 0 < num_train < len(targets):
        raise ValueError(f"train_share must leave training and held-out inputs of each task, got {train_share}")
    if answers == "random":
        rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))  # the split's own is [seed]
        targets = torch.from_numpy(rng.integers(0, p, size=len(targets)))

    model = make_network(network, p, num_tasks, hidden, loudness, seed)
    if checkpoint is not None and Path(checkpoint).exists():
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
    else:
        memorise = answers == "random"
        train(model, inputs[:num_train], targets[:num_train], epochs, plain_share=plain_share, memorise=memorise)
        if checkpoint is not None:
            torch.save(model.state_dict(), checkpoint)
    model.eval()

    held_out = torch.arange(len(targets), device="cpu") >= num_train
    asked = held_out if answers == "rules" else ~held_out
    for task in range(num_tasks):
        own = asked & (tasks == task)
        if answers == "rules":
            require_accuracy(
                model, inputs[own], targets[own], at_least=required_accuracy, what=f"multitask, {TASKS[task]}"
            )
        elif not (right := accuracy(model, inputs[own], targets[own])) >= required_accuracy:
            raise RecipeError(f"multitask, {TASKS[task]}: only {right:.2%} of the answers were memorised; raise epochs")
    each = [accuracy(model, inputs[own], targets[own]) for own in (held_out & (tasks == t) for t in range(num_tasks))]
    shown = ", ".join(f"{name} {right:.1%}" for name, right in zip(TASKS, each, strict=False))
    functions = ", ".join(TASKS[:num_tasks]) if answers == "rules" else f"{num_tasks} tables of random answers"
    return RecipeTask(
        model=model,
        # A data set, not a pair of tensors: the labels are tasks, so predictions must not be compared with them.
        samples=TensorDataset(inputs, targets),
        train=(inputs[:num_train], targets[:num_train]),
        labels=tasks,
        class_names=TASKS[:num_tasks],
        held_out=held_out,
        held_out_accuracy=float(np.mean(each)),  # the tasks hold out equally many
        notes=f"{functions} modulo {p}: {num_train:,} training and {len(targets) - num_train:,} held-out inputs\n"
        f"held-out accuracy by task: {shown}",
        label_word="task",
    )


@usual_defaults()
def make_network(network: str, p: int, num_tasks: int, hidden: int, loudness: float, seed: int) -> nn.Module:
    """An untrained network, its weights from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if network == "trunk":
            return SharedTrunk(p, num_tasks, hidden)
        return Disjoint(p, num_tasks, hidden) if network == "disjoint" else OneNetwork(p, num_tasks, hidden, loudness)


def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Share of right answers, in [0, 1]."""
    return (predict(model, inputs) == targets).double().mean().item()


@usual_defaults()
def train(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    epochs: int,
    *,
    plain_share: float = 0.25,
    memorise: bool = False,
    each_epoch: Callable[[int], None] | None = None,
) -> None:
    """Full-batch AdamW with smoothed targets, then with plain ones and a falling learning rate, in place.

    To `memorise`, without smoothing and weight decay. `each_epoch` is told how many epochs are done.
    """
    plain = round(plain_share * epochs)
    decay = 0.0 if memorise else WEIGHT_DECAY
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=decay, betas=(0.9, 0.98))
    for left in range(epochs, 0, -1):
        if left <= plain:
            optimizer.param_groups[0]["lr"] = LAST_LR * left / plain
        smoothing = 0.0 if left <= plain or memorise else SMOOTHING
        loss = cross_entropy(model(inputs), targets, label_smoothing=smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if each_epoch is not None:
            each_epoch(epochs - left + 1)
