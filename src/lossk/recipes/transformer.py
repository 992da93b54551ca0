"""A tiny causal language model made of torch's own transformer layers, and its training."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossk.ops.sample_loss import IGNORED
from lossk.recipes.defaults import usual_defaults


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of the model."""

    vocabulary: int
    context: int = 64  # positions that predict
    width: int = 64
    heads: int = 4
    layers: int = 2


class TinyTransformer(nn.Module):
    """Token numbers [B, T] int64, T up to the context, to logits [B, T, vocabulary] of the next token.

    No dropout. Padding goes at the end, where it cannot change what comes before it.
    """

    @usual_defaults()
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Parameter(0.02 * torch.randn(shape.context, shape.width, dtype=torch.float32, device="cpu"))
        layer = nn.TransformerEncoderLayer(
            shape.width, shape.heads, 4 * shape.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, shape.layers, nn.LayerNorm(shape.width), enable_nested_tensor=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, numbers: Tensor) -> Tensor:
        length = numbers.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=numbers.device).triu(1)  # True is hidden
        x = self.embedding(numbers) + self.positions[:length]
        return F.linear(self.layers(x, mask=later, is_causal=True), self.embedding.weight)


@usual_defaults()
def train_language_model(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, steps: int, batch_size: int, lr: float, seed: int
) -> None:
    """Train in place with AdamW and a one-cycle learning rate, and leave the model in eval mode.

    `inputs` [n, T] int64, `targets` [n, T] int64, -100 where a token does not count. Minibatches come from `seed`
    alone; the caller seeds the initial weights.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=max(steps, 1), pct_start=0.2)
    model.train()
    for step in range(1, steps + 1):
        rows = torch.from_numpy(rng.choice(len(inputs), size=min(batch_size, len(inputs)), replace=False))
        loss = F.cross_entropy(model(inputs[rows]).flatten(0, 1), targets[rows].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps:
            print(f"step {step:,} of {steps:,}: loss {loss.item():.2f} nats per token", file=sys.stderr)
    model.eval()


def mean_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int = 32) -> float:
    """Mean loss of the unmasked tokens, nats; the model in eval mode returns logits, or an object with `.logits`."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids, wanted in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            found = model(ids)
            logits = getattr(found, "logits", found).float().flatten(0, 1)
            total += F.cross_entropy(logits, wanted.flatten(), ignore_index=IGNORED, reduction="sum").item()
            count += int((wanted != IGNORED).sum())
    return total / count if count else math.nan


def frequency_loss(train_targets: Tensor, targets: Tensor, vocabulary: int) -> float:
    """Mean loss, nats, of a model that knows only how frequent each token is in training (one added to each count)."""
    counts = torch.bincount(train_targets[train_targets != IGNORED], minlength=vocabulary).double() + 1.0
    wanted = targets[targets != IGNORED]
    return float(-(counts / counts.sum()).log()[wanted].mean())
