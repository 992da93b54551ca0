"""Sequences: recurrent layers, attention and its fast path, transformer layers with caches and masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossk
from kind_world import World
from kinds import Kind, check, cross_entropy, short

N, STEPS, WIDTH, CLASSES = 12, 5, 8, 3


def sequences() -> tuple[Tensor, Tensor]:
    """[N, STEPS, WIDTH] and labels."""
    return torch.randn(N, STEPS, WIDTH), torch.arange(N) % CLASSES


def padded() -> tuple[dict[str, Tensor], Tensor]:
    """Sequences of unequal length with what says so, as keyword arguments of the model."""
    lengths = torch.arange(N) % 3 + 3
    x, targets = sequences()
    return {"x": x, "lengths": lengths}, targets


class Recurrent(nn.Module):
    """Any of torch's recurrent layers and a head on its last output."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.batch_first = settings.get("batch_first", False)
        self.rnn = kind(WIDTH, 6, **settings)
        outputs = settings.get("proj_size", 0) or 6
        self.head = nn.Linear(2 * outputs if settings.get("bidirectional") else outputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.rnn(x if self.batch_first else x.transpose(0, 1))
        return self.head(found[:, -1] if self.batch_first else found[-1])


class Packed(nn.Module):
    """Packed sequences of unequal length."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(WIDTH, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][-1])


class Cells(nn.Module):
    """A loop over an LSTM cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(WIDTH, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h, c = x.new_zeros(len(x), 6), x.new_zeros(len(x), 6)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return self.head(h)


RECURRENT = {
    "lstm": Kind(lambda: Recurrent(nn.LSTM), sequences),
    "lstm-batch-first": Kind(lambda: Recurrent(nn.LSTM, batch_first=True), sequences),
    "lstm-both-ways-two-layers-dropout": Kind(
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, dropout=0.3), sequences
    ),
    "lstm-with-projection": Kind(lambda: Recurrent(nn.LSTM, proj_size=4), sequences),
    "gru": Kind(lambda: Recurrent(nn.GRU), sequences),
    "gru-batch-first": Kind(lambda: Recurrent(nn.GRU, batch_first=True), sequences),
    "plain-rnn": Kind(lambda: Recurrent(nn.RNN, nonlinearity="relu"), sequences),
    "packed-sequences": Kind(Packed, padded),
    "loop-over-cells": Kind(Cells, sequences),
}


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_recurrent(kind: str) -> None:
    check(RECURRENT[kind])


class Attention(nn.Module):
    """`nn.MultiheadAttention` on itself, with or without its weights asked for."""

    def __init__(self, *, need_weights: bool, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **settings)
        self.head, self.need_weights = nn.Linear(WIDTH, CLASSES), need_weights

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.attention(x, x, x, need_weights=self.need_weights)
        return self.head((x + found).mean(dim=1))


class Cross(nn.Module):
    """Keys and values of other widths than the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(WIDTH, 6)
        self.attention = nn.MultiheadAttention(WIDTH, 2, kdim=6, vdim=6, batch_first=True, add_bias_kv=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        other = self.narrow(x)
        return self.head(self.attention(x, other, other)[0].mean(dim=1))


class Scaled(nn.Module):
    """`F.scaled_dot_product_attention`, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(found.transpose(1, 2).flatten(2).mean(dim=1))


ATTENTION = {
    "multihead-attention": Kind(lambda: Attention(need_weights=True), sequences),
    "multihead-attention-without-weights": Kind(lambda: Attention(need_weights=False, dropout=0.1), sequences),
    "multihead-attention-of-other-widths": Kind(Cross, sequences),
    "scaled-dot-product-attention": Kind(Scaled, sequences),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention(kind: str) -> None:
    check(ATTENTION[kind])


class Encoder(nn.Module):
    """`nn.TransformerEncoder`, whose layers take a fused path of their own where nothing needs a gradient."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.1, batch_first=True, **settings)
        nested = not settings.get("norm_first", False)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        found = self.encoder(x, src_key_padding_mask=mask)
        if mask is None:
            return self.head(found.mean(dim=1))
        return self.head(found[:, 0])


class WholeTransformer(nn.Module):
    """`nn.Transformer`, encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Transformer(WIDTH, 2, 1, 1, 16, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.head(self.both(x, x, tgt_mask=mask).mean(dim=1))


def masked() -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Sequences and a mask, True where nothing is, as two arguments of the model."""
    x, targets = sequences()
    mask = torch.zeros(N, STEPS, dtype=torch.bool)
    mask[::3, 3:] = True
    return (x, mask), targets


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(names))
    return model


TRANSFORMERS = {
    "transformer-encoder": Kind(Encoder, sequences),
    "transformer-encoder-gelu-norm-first": Kind(lambda: Encoder(norm_first=True, activation="gelu"), sequences),
    "transformer-encoder-with-padding": Kind(lambda: Encoder(norm_first=True), masked),
    "frozen-transformer-encoder-and-sampled-head": Kind(lambda: frozen(Encoder(), "encoder"), sequences),
    "transformer": Kind(WholeTransformer, sequences),
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_transformer_layers(kind: str) -> None:
    check(TRANSFORMERS[kind])


class Decoder(nn.Module):
    """A causal language model with its head tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.attention = nn.Embedding(11, WIDTH), Scaled()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.tokens(index)
        q, k, v = self.attention.qkv(x).chunk(3, dim=-1)
        return self.head(self.norm(x + F.scaled_dot_product_attention(q, k, v, is_causal=True)))


def sentences() -> tuple[Tensor, Tensor]:
    """[N, STEPS] indices, and what comes next; -100 where nothing does."""
    text = torch.randint(0, 11, (N, STEPS + 1))
    targets = text[:, 1:].clone()
    targets[::4, 3:] = -100
    return text[:, :-1], targets


def token_losses(model: nn.Module, batch: Any) -> Tensor:
    """[unmasked tokens], by hand."""
    inputs, targets = batch
    losses = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")
    return losses[targets.flatten() != -100]


PER_TOKEN = {"tied-language-model": Kind(Decoder, sentences, "token_cross_entropy", token_losses)}


@pytest.mark.parametrize("kind", PER_TOKEN)
def test_per_token(kind: str) -> None:
    check(PER_TOKEN[kind])


def test_a_frozen_encoder_keeps_its_fast_path_to_itself() -> None:
    """Frozen and in eval mode, a layer may take another path than the user's; the head's losses are the user's."""
    kind = TRANSFORMERS["frozen-transformer-encoder-and-sampled-head"]
    model, batch = kind.model(), kind.batch()
    world = World(model, data=batch)
    passes = lossk.Passes(frozen_prefix=False)
    traces = [
        lossk.sample_losses(model, batch, sampler=short(), num_chains=1, num_draws=3, passes=each, progress=False)
        for each in (passes, lossk.Passes())
    ]
    world.assert_same()
    torch.testing.assert_close(traces[0].losses, traces[1].losses, rtol=0, atol=1e-5)
    with torch.no_grad():
        own = cross_entropy(model.eval(), batch)
    assert float((traces[0].losses[0].mean(dim=0) - own).abs().max()) < 1.0
