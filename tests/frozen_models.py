"""Stand-ins for well-known architectures, whose layers are called as theirs are."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS, WIDTH, HEADS = 13, 8, 2
RUNS: list[nn.Module] = []  # the decoder layers that have run


class Encoding(UserDict):  # type: ignore[type-arg]
    """A mapping whose parts are attributes too, as a tokenizer of Hugging Face gives."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class Output:
    """What a model of Hugging Face returns: tensors, tuples of them, and None."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None


class Rotary(nn.Module):
    """(cos, sin) [1, T, d] of the positions, without weights."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None] / 10.0 ** torch.linspace(0, 1, WIDTH // HEADS, dtype=x.dtype, device=x.device)
        return angles.cos(), angles.sin()


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class DecoderLayer(nn.Module):
    """Called with keywords only, but for the hidden states; gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(), RMSNorm()
        self.qkv, self.o_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.SiLU(), nn.Linear(16, WIDTH))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None, use_cache: bool = False, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        RUNS.append(self)
        assert position_embeddings is not None
        cos, sin = (part[:, None] for part in position_embeddings)
        x = self.input_layernorm(hidden_states)
        q, k, v = self.qkv(x).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, dim=1)
        q, k = (part * cos + part.roll(1, dims=-1) * sin for part in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask).transpose(1, 2).flatten(2)
        hidden_states = hidden_states + self.o_proj(y)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), None


class Decoder(nn.Module):
    """A causal language model of Hugging Face's form; it does not trace."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embed_tokens, self.rotary_emb = nn.Embedding(WORDS, WIDTH), Rotary()
        self.layers, self.norm = nn.ModuleList(DecoderLayer() for _ in range(layers)), RMSNorm()
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False, **_: Any
    ) -> Any:
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1], device=hidden.device, dtype=torch.int64)[None]
        rotary = self.rotary_emb(hidden, positions)
        mask = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool, device=hidden.device).tril()[None, None]
        if attention_mask is not None:
            mask = mask & (attention_mask[:, None, None] != 0)
        seen = []
        for layer in self.layers[: len(self.layers)]:
            seen.append(hidden)
            outputs = layer(hidden, attention_mask=mask, position_embeddings=rotary, use_cache=False)
            hidden = outputs[0]
        return OrderedDict(logits=self.lm_head(self.norm(hidden)), hidden_states=tuple(seen))


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.intermediate, self.output = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor]:
        y, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        x = self.norm1(x + self.dropout(y))
        return (self.norm2(x + self.dropout(self.output(F.gelu(self.intermediate(x))))),)


class Encoder(nn.Module):
    """The layers alone, giving a dataclass."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer() for _ in range(layers))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Output:
        seen = [x]
        for layer in self.layer:
            x = layer(x, padding=padding)[0]
            seen.append(x)
        return Output(x, tuple(seen))


class Bert(nn.Module):
    """Embeddings, encoder, pooler, classifier."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.words, self.norm, self.encoder = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH), Encoder(layers)
        self.pooler, self.classifier = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        padding = None if attention_mask is None else attention_mask == 0
        outputs = self.encoder(self.norm(self.words(input_ids)), padding=padding)
        if bool((outputs.last_hidden_state.sum() > 1e9).item()):  # not to be traced
            raise ValueError
        return self.classifier(self.pooler(outputs.last_hidden_state[:, 0]).tanh())


class ViT(nn.Module):
    """Patches, a class token, blocks with the sequence first."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, 10, WIDTH))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.1) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.places
        x = x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[0]))


class Squeeze(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class MBConv(nn.Module):
    """An inverted bottleneck with squeeze-and-excitation and a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.depth = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.squeeze = Squeeze(2 * width)
        self.project, self.norm2 = nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.expand(x)))
        return x + self.norm2(self.project(self.squeeze(F.silu(self.depth(y)))))


class EfficientNet(nn.Module):
    """Its features in one Sequential, of which the last blocks are sampled."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.SiLU())
        self.features = nn.Sequential(stem, *(MBConv(4) for _ in range(blocks)))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Inception(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1 = nn.Conv2d(width, 2, 1)
        self.branch2 = nn.Sequential(nn.Conv2d(width, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1))
        self.branch3 = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(width, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(branch(x)) for branch in (self.branch1, self.branch2, self.branch3)], dim=1)


class GoogLeNet(nn.Module):
    """Two inceptions; a branch of the last, or all of it, is sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), Inception(4), Inception(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.first(F.relu(self.conv(x)))).mean((2, 3)))


class Windows(nn.Module):
    """Rows of a sample side by side in the first dimension, as in a Swin transformer; a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.mix, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read(x.reshape(-1, 4))
        y = self.mix(self.mix(y).tanh())
        return self.out(y.unflatten(0, (len(x), -1)).mean(1))
