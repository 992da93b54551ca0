"""A small causal transformer, ragged text, and its losses per token in three writings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracles
from lossk.data.reading import read_samples
from lossk.probe.probe import Probe, prepare_probe
from lossk.task.losses import resolve_loss
from lossk.task.task import Task

IGNORED = -100


class TokenModel(nn.Module):
    """A causal transformer of one block over 7 tokens: logits [B, T, 7]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        return self.head(self.block(self.embed(tokens), src_mask=causal))


def text(num_samples: int = 11, length: int = 5) -> tuple[Tensor, Tensor]:
    """Sequences and shifted targets; ragged ends are ignored, sample 3 has no token at all, sample 4 only its first."""
    sequences = torch.randint(0, 7, (num_samples, length + 1))
    targets = sequences[:, 1:].clone()
    lengths = (torch.arange(num_samples) * 3) % length + 1
    targets[torch.arange(length) >= lengths[:, None]] = IGNORED
    targets[3] = IGNORED
    targets[4] = torch.tensor([2] + [IGNORED] * (length - 1))
    return sequences[:, :-1], targets


def callable_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same as "token_cross_entropy" in a user's own words; what is masked is infinite, and must not matter."""
    inputs, targets = batch
    mask = targets != IGNORED
    logits = model(inputs).flatten(0, 1)
    losses = F.cross_entropy(logits, targets.clamp(min=0).flatten(), reduction="none").view(targets.shape)
    return torch.where(mask, losses, math.inf), mask


LOSSES: dict[str, Any] = {"named": "token_cross_entropy", "callable": callable_loss}


def prepared(model: nn.Module, data: tuple[Tensor, Tensor], loss: Any) -> tuple[Task, Probe, Any]:
    """Task, probe and training samples as a run has them; the task is entered and left by the caller."""
    task = Task(model, resolve_loss(loss))
    probe, train = prepare_probe(task, {"": (samples := read_samples(data))}, samples)
    return task, probe, train


def true_losses(model: nn.Module, data: tuple[Tensor, Tensor]) -> np.ndarray:
    """[N] float64 of the unmasked tokens, in (sample, position) order."""
    model.eval()
    with torch.no_grad():
        logits = model(data[0]).numpy()
    rows, positions = np.nonzero(data[1].numpy() != IGNORED)
    return oracles.cross_entropy(logits[rows, positions], data[1].numpy()[rows, positions])
