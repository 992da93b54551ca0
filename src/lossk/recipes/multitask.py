"""Recipe: one small network that adds and subtracts modulo p, told which by a task token.

Both tasks run through the same weights, and the targets are residues, not task names: that an input's neighbours are of
its own task is nothing the losses were told. A network that memorises the table shows no such blocks, so this one is
trained until it generalises to pairs it never saw (A. Power et al., Grokking, arXiv 2201.02177, is where these tables
come from).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import TensorDataset

from lossk.recipes import RecipeTask, require_accuracy
from lossk.settings import check_integer, check_number

TASKS = ("a + b", "a - b")
HIDDEN = 512
LR, LAST_LR, WEIGHT_DECAY = 1e-2, 1e-3, 1.0
# Smoothed targets keep every input's gradient alive, which is what makes the network generalise within a thousand
# epochs. Plain cross entropy then takes over, long enough to leave the weights where the kernel's own loss is flat, not
# so long that the network starts to memorise.
SMOOTHING, PLAIN_SHARE = 0.1, 0.25


def make_task(
    *,
    p: int = 29,
    seed: int = 0,
    train_share: float = 0.8,
    epochs: int = 1300,
    required_accuracy: float = 0.97,
    checkpoint: str | Path | None = None,
) -> RecipeTask:
    """Train on a random `train_share` of each task's p^2 pairs; probe all 2 p^2, training inputs first.

    Seconds of work on one core; full batches, so an epoch is a step. With `checkpoint`, the trained weights are read
    from that file if it exists and written there if it does not. The labels are the tasks, so class purity is the share
    of neighbours of the same task. Raises RecipeError when a task's held-out accuracy is below `required_accuracy`.
    """
    check_integer("p", p, 2)
    check_integer("epochs", epochs, 0)
    check_number("train_share", train_share, "a number", above=0.0)
    inputs, targets, tasks, num_train = arithmetic(p, train_share, seed)
    if not 0 < num_train < len(targets):
        raise ValueError(f"train_share must leave training and held-out inputs of each task, got {train_share}")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(inputs.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, p))
    if checkpoint is not None and Path(checkpoint).exists():
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
    else:
        train(model, inputs[:num_train], targets[:num_train], epochs)
        if checkpoint is not None:
            torch.save(model.state_dict(), checkpoint)
    model.eval()

    held_out = torch.arange(len(targets)) >= num_train
    accuracies = [
        require_accuracy(
            model, inputs[held_out & (tasks == task)], targets[held_out & (tasks == task)],
            at_least=required_accuracy, what=f"multitask, {name}",
        )
        for task, name in enumerate(TASKS)
    ]  # fmt: skip
    shown = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in zip(TASKS, accuracies, strict=True))
    return RecipeTask(
        model=model,
        # A data set, not a pair of tensors: the labels are tasks, so predictions must not be compared with them.
        samples=TensorDataset(inputs, targets),
        train=(inputs[:num_train], targets[:num_train]),
        labels=tasks,
        class_names=TASKS,
        held_out=held_out,
        held_out_accuracy=float(np.mean(accuracies)),  # both tasks hold out equally many
        notes=f"a + b and a - b modulo {p}: {num_train:,} training and {len(targets) - num_train:,} held-out inputs\n"
        f"held-out accuracy by task: {shown}; a sample's class below is its task",
    )


def arithmetic(p: int, train_share: float, seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """All 2 p^2 inputs in a random order, training inputs first, both tasks equally often in either part.

    Returns inputs [2 p^2, 2 p + 2] float32 (one-hot a, b and task), targets [2 p^2] int64 in [0, p), tasks [2 p^2]
    int64 (0 adds, 1 subtracts), and the number of training inputs.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    count = p * p
    each = round(train_share * count)
    orders = [torch.from_numpy(rng.permutation(count)) for _ in TASKS]
    pairs = torch.cat([order[:each] for order in orders] + [order[each:] for order in orders])
    tasks = torch.tensor([0, 1, 0, 1]).repeat_interleave(torch.tensor([each, each, count - each, count - each]))
    a, b = pairs // p, pairs % p
    targets = torch.where(tasks == 0, a + b, a - b) % p  # torch's % is never negative here
    inputs = torch.cat([one_hot(a, p), one_hot(b, p), one_hot(tasks, len(TASKS))], dim=1).float()
    return inputs, targets, tasks, len(TASKS) * each


def train(model: nn.Module, inputs: Tensor, targets: Tensor, epochs: int) -> None:
    """Full-batch AdamW with smoothed targets, then with plain ones and a falling learning rate, in place."""
    plain = round(PLAIN_SHARE * epochs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    for left in range(epochs, 0, -1):
        if left <= plain:
            optimizer.param_groups[0]["lr"] = LAST_LR * left / plain
        smoothing = 0.0 if left <= plain else SMOOTHING
        loss = cross_entropy(model(inputs), targets, label_smoothing=smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
