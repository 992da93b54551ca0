"""Models of the transformers library, made from their configurations: ModelOutput, dict batches, tied heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinds import Kind, check

N, LENGTH, WORDS, CLASSES = 12, 5, 17, 3
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
NAMES = {"num_labels": CLASSES}


def text() -> tuple[dict[str, Tensor], Tensor]:
    """Words, a mask of what counts, and labels."""
    mask = torch.ones(N, LENGTH, dtype=torch.int64)
    mask[::3, 3:] = 0
    return {"input_ids": torch.randint(0, WORDS, (N, LENGTH)), "attention_mask": mask}, torch.arange(N) % CLASSES


def dictionary() -> dict[str, Tensor]:
    inputs, labels = text()
    return {**inputs, "labels": labels}


def sentences() -> tuple[Tensor, Tensor]:
    words = torch.randint(0, WORDS, (N, LENGTH + 1))
    targets = words[:, 1:].clone()
    targets[::4, 3:] = -100
    return words[:, :-1], targets


def pictures() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 3, 8, 8), torch.arange(N) % CLASSES


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=WORDS, max_position_embeddings=16, initializer_range=0.3, **SMALL, **NAMES)
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=8, n_layer=1, n_head=2, initializer_range=0.3)
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    """Rotary positions, RMS norms, grouped keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 16, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, tie_word_embeddings=True, **settings))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, initializer_range=0.2, **SMALL, **NAMES))


def dinov2() -> nn.Module:
    """A vision transformer with drop-path and layer scale."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    settings = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
    config = Dinov2Config(
        image_size=8, patch_size=4, drop_path_rate=0.3, initializer_range=0.2, mlp_ratio=2, **settings, **NAMES
    )
    return Dinov2ForImageClassification(config)


def of_labels(model: nn.Module, batch: Any) -> Tensor:
    """Per-sample losses where the model, given the labels, would return their mean only."""
    given = {name: value for name, value in batch.items() if name != "labels"}
    return F.cross_entropy(model(**given).logits, batch["labels"], reduction="none")


def of_tokens(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    losses = F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses[targets.flatten() != -100]


def next_words(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """A causal language model's losses as its users write them: shifted here, a dictionary in."""
    logits = model(**batch).logits[:, :-1]
    wanted = batch["input_ids"][:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none"), batch["attention_mask"][:, 1:].bool()


def of_next_words(model: nn.Module, batch: Any) -> Tensor:
    losses, mask = next_words(model, batch)
    return losses[mask]


def masked_text() -> dict[str, Tensor]:
    return text()[0]


KINDS: dict[str, Kind] = {
    "bert-with-inputs-by-name": Kind(bert, text),
    "bert-with-a-dictionary-batch": Kind(bert, dictionary, of_labels, of_labels),
    "gpt2-with-a-tied-head": Kind(gpt2, sentences, "token_cross_entropy", of_tokens),
    "gpt2-with-its-own-shift": Kind(gpt2, masked_text, next_words, of_next_words),
    "llama-with-rotary-positions": Kind(llama, sentences, "token_cross_entropy", of_tokens, bound=3e-5),
    "vit": Kind(vit, pictures),
    "vit-with-drop-path": Kind(dinov2, pictures),
}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers(kind: str) -> None:
    check(KINDS[kind])


@pytest.mark.parametrize("make", [bert, vit], ids=["bert", "vit"])
def test_in_bfloat16(make: Callable[[], nn.Module]) -> None:
    """Loaded as most checkpoints are today."""
    data = text if make is bert else pictures

    def cast(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        dtype = next(model.parameters()).dtype
        outputs = model(inputs.to(dtype)) if make is vit else model(**inputs)
        logits = outputs.logits
        return F.cross_entropy(logits if dtype == torch.float64 else logits.float(), targets, reduction="none")

    check(Kind(lambda: make().to(torch.bfloat16), data, hand=cast))
