"""Networks of several arithmetic tasks, told apart by a task token, and their data."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lossk.recipes.defaults import usual_defaults

TASKS = ("a + b", "a - b", "2a + b", "a + 2b")
COEFFICIENTS = ((1, 1), (1, -1), (2, 1), (1, 2))


class OneNetwork(nn.Module):
    """All tasks through the same weights: a hidden layer that sees the pair and, `loudness` times over, the task token.

    Inputs [B, 2 p + tasks] one-hot to logits [B, p]. A loud token lets a unit serve one task at little weight; it
    also makes the hidden layers of one task's inputs alike before anything is learned (docs/multitask.md). Its weights
    have a name of their own, "token.weight".
    """

    @usual_defaults()
    def __init__(self, p: int, tasks: int, hidden: int, loudness: float) -> None:
        super().__init__()
        self.p, self.loudness = p, loudness
        self.pairs, self.token = nn.Linear(2 * p, hidden), nn.Linear(tasks, hidden, bias=False)
        self.head = nn.Linear(hidden, p)
        nn.init.uniform_(self.token.weight, -((2 * p) ** -0.5), (2 * p) ** -0.5)  # as the pair's own weights

    def forward(self, x: Tensor) -> Tensor:
        pair, token = x[:, : 2 * self.p], x[:, 2 * self.p :]
        return self.head((self.pairs(pair) + self.loudness * self.token(token)).relu())


class SharedTrunk(nn.Module):
    """A hidden layer that sees the pair alone, and a head for each task."""

    @usual_defaults()
    def __init__(self, p: int, tasks: int, hidden: int) -> None:
        super().__init__()
        self.p = p
        self.pairs, self.heads = nn.Linear(2 * p, hidden), nn.Linear(hidden, tasks * p)

    def forward(self, x: Tensor) -> Tensor:
        every = self.heads(self.pairs(x[:, : 2 * self.p]).relu()).view(len(x), -1, self.p)  # [B, tasks, p]
        return (every * x[:, 2 * self.p :].unsqueeze(2)).sum(dim=1)


class Disjoint(nn.Module):
    """A network for each task, which shares no weight with the others."""

    @usual_defaults()
    def __init__(self, p: int, tasks: int, hidden: int) -> None:
        super().__init__()
        self.p = p
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * p, hidden), nn.ReLU(), nn.Linear(hidden, p)) for _ in range(tasks)
        )

    def forward(self, x: Tensor) -> Tensor:
        pair, token = x[:, : 2 * self.p], x[:, 2 * self.p :]
        return sum(network(pair) * token[:, [task]] for task, network in enumerate(self.networks))


def arithmetic(p: int, train_share: float, seed: int, num_tasks: int = 2) -> tuple[Tensor, Tensor, Tensor, int]:
    """All inputs in a random order, training inputs first, every task equally often in either part.

    Returns inputs [tasks p^2, 2 p + tasks] float32 (one-hot a, b and task), targets [tasks p^2] int64 in [0, p), tasks
    [tasks p^2] int64, numbers in `TASKS`, and the number of training inputs.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    count = p * p
    each = round(train_share * count)
    orders = [torch.from_numpy(rng.permutation(count)) for _ in range(num_tasks)]
    pairs = torch.cat([order[:each] for order in orders] + [order[each:] for order in orders])
    sizes = torch.tensor([each] * num_tasks + [count - each] * num_tasks, dtype=torch.int64, device="cpu")
    tasks = torch.arange(num_tasks, device="cpu").repeat(2).repeat_interleave(sizes)
    a, b = pairs // p, pairs % p
    of_a, of_b = torch.tensor(COEFFICIENTS, dtype=torch.int64, device="cpu")[tasks].T
    targets = (of_a * a + of_b * b) % p  # torch's % is never negative here
    inputs = torch.cat([one_hot(a, p), one_hot(b, p), one_hot(tasks, num_tasks)], dim=1).float()
    return inputs, targets, tasks, num_tasks * each
