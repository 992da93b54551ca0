"""A tiny causal language model, for `bench.language` and for the peer that is given the same: torch alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Of the model and of its sequences."""

    vocabulary: int = 512
    context: int = 32  # positions that predict
    width: int = 64
    heads: int = 4
    blocks: int = 2


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a layer norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.queries_keys_values = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.shape
        split = self.queries_keys_values(self.norm1(x)).view(size, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(size, length, width))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Token ids [B, T] to logits [B, T, vocabulary]; the head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Parameter(0.02 * torch.randn(shape.context + 1, shape.width))
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.blocks)))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.embedding.weight)


def sequences(count: int, shape: Shape) -> Tensor:
    """[count, context + 1] int64: random walks on a ring of tokens, so that there is something to predict."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, shape.vocabulary, (count, 1), generator=generator)
    moves = torch.randint(0, 8, (count, shape.context), generator=generator)
    return torch.cat([start, start + moves.cumsum(dim=1)], dim=1) % shape.vocabulary


def trained(ids: Tensor, shape: Shape, steps: int) -> LanguageModel:
    """A model that has seen `steps` minibatches, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LanguageModel(shape)
        nn.init.normal_(model.embedding.weight, std=0.02)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            batch = ids[torch.randint(0, len(ids), (32,))]
            optimizer.zero_grad()
            F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
    model.zero_grad()
    return model.eval()
