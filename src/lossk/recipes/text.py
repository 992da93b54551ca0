"""Recipe: a causal language model, and the losses of its single tokens or whole sequences.

By default our own tiny transformer, trained in a few minutes on the licences that every Debian or Ubuntu keeps in
/usr/share/common-licenses; or a Hugging Face model of yours (`lossk.recipes.huggingface`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lossk.ops.sample_loss import IGNORED, cross_entropy
from lossk.recipes import RecipeError, RecipeTask
from lossk.recipes.defaults import usual_defaults
from lossk.recipes.text_data import DEBIAN_LICENCES, SEQUENCES, Sequences, cut, read_documents
from lossk.recipes.transformer import (
    Shape,
    TinyTransformer,
    frequency_loss,
    mean_token_loss,
    train_language_model,
)
from lossk.recipes.words import Words
from lossk.settings import check_choice, check_integer, check_number

ROWS = ("tokens", "sequences")


@usual_defaults()
def make_task(
    *,
    text: str | Path = DEBIAN_LICENCES,
    model: str | Path | None = None,
    rows: str = "tokens",
    sequences: str = "packed",
    context: int = 64,
    num_probe: int | None = 32,
    held_out_share: float = 0.1,
    steps: int = 1000,
    seed: int = 0,
    required_gain: float = 1.0,
    checkpoint: str | Path | None = None,
) -> RecipeTask:
    """Train the tiny transformer on `text`, or load a Hugging Face `model`; probe `num_probe` of its sequences.

    Args:
        text: a UTF-8 text file, or a folder of them; each is a document.
        model: a Hugging Face causal language model with its tokenizer, by path or name; None is the tiny transformer.
        rows: of the kernel: "tokens", or "sequences" (each sequence's share of the training loss, the sum over its
            tokens divided by the mean number of tokens: the law of the weights is that of the tokens if `n_beta` is).
        sequences: "packed" (windows of `context` tokens) or "padded" (a paragraph each, cut at `context`).
        num_probe: sequences in the probe, chosen at random, training ones first; None is all.
        held_out_share: of the sequences, kept from training; 0 for none.
        steps: training minibatches of 16 sequences (tiny transformer).
        required_gain: nats per token that the model must beat token frequencies by, on held-out sequences.
        checkpoint: the tiny transformer's weights are read from that file if it exists, else written there.

    Raises RecipeError when there is no text or the model predicts it too badly to be worth a kernel.
    """
    check_choice("rows", rows, ROWS)
    check_choice("sequences", sequences, SEQUENCES)
    check_integer("context", context, 1)
    check_integer("steps", steps, 0)
    if num_probe is not None:
        check_integer("num_probe", num_probe, 2)
    check_number("held_out_share", held_out_share, "a number", least=0.0)
    if not held_out_share < 1:
        raise ValueError(f"held_out_share must be below 1, got {held_out_share}")
    documents = read_documents(text)
    vocabulary = _words(" ".join(each.text for each in documents)) if model is None else _hugging_face(model, context)
    data = cut(documents, vocabulary.encode, context=context, how=sequences)
    held_out = _choose(len(data), round(held_out_share * len(data)), [seed, 0])  # [S] bool
    train = data.inputs[~held_out], data.targets[~held_out]

    if vocabulary.model is None:
        network: nn.Module = _tiny(train, Shape(vocabulary=vocabulary.size, context=context), steps, seed, checkpoint)
    else:
        network = vocabulary.model
    told = held_out if held_out.any() else torch.ones_like(held_out)
    loss = mean_token_loss(network, data.inputs[told], data.targets[told])
    plain = frequency_loss(train[1], data.targets[told], vocabulary.size)
    if not loss <= plain - required_gain:
        raise RecipeError(
            f"text: the held-out loss is {loss:.2f} nats per token, not {required_gain:g} below the {plain:.2f} of "
            "token frequencies alone; train longer (task_args: steps), or give a model made for this text"
        )

    probe = _probe_rows(held_out, num_probe, seed)  # [P] int64, training sequences first
    chosen = Sequences(data.inputs[probe], data.targets[probe], data.document[probe])
    counted = chosen.targets != IGNORED
    per_sequence = float((train[1] != IGNORED).sum()) / len(train[1])
    what = "own tiny transformer" if model is None else f"{model}"
    task = RecipeTask(
        model=network,
        samples=TensorDataset(chosen.inputs, chosen.targets),
        train=train,
        loss="token_cross_entropy",
        labels=chosen.targets[counted],
        held_out=held_out[probe].unsqueeze(1).expand_as(counted)[counted],
        notes=f"Language model ({what}) of {len(documents)} documents: {len(train[0]):,} training and "
        f"{int(held_out.sum()):,} held-out sequences of up to {context} tokens, {sequences}\n"
        f"loss of {'held-out' if held_out.any() else 'all'} sequences: {loss:.3f} nats per token "
        f"({plain:.3f} from token frequencies alone); {vocabulary.size:,} tokens in the vocabulary",
        row_texts=vocabulary.decode(chosen.targets[counted]),
        label_word="token",
    )
    if rows == "tokens":
        return task
    pairs = zip(chosen.inputs, counted, strict=True)
    return dataclasses.replace(
        task,
        loss=SequenceLoss(per_sequence),
        labels=chosen.document,
        class_names=[each.name for each in documents],
        held_out=held_out[probe],
        row_texts=[_text(vocabulary.decode(ids[: int(own.sum())])) for ids, own in pairs],
        label_word="document",
    )


class SequenceLoss:
    """Loss of a sequence: the sum over its unmasked tokens, divided by the mean number of them per training sequence.

    Its mean over the training sequences is the mean over all training tokens, so the training loss is that of the
    token kernel; nats.
    """

    def __init__(self, mean_tokens: float) -> None:
        check_number("mean_tokens", mean_tokens, "a number", above=0.0)
        self.mean_tokens = mean_tokens
        self.__name__ = self.__qualname__ = "SequenceLoss"

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """[B] float32."""
        inputs, targets = batch
        found = model(inputs)
        logits = getattr(found, "logits", found).float()
        if torch.is_grad_enabled():  # a gradient needs no relative accuracy in small losses
            losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        else:
            losses = cross_entropy(logits.flatten(0, 1), targets.flatten()).view(targets.shape)
        return losses.masked_fill(targets == IGNORED, 0.0).sum(dim=1) / self.mean_tokens


@dataclass(frozen=True)
class _Vocabulary:
    """Text to token numbers and back, and the model they belong to where it is a ready one."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Tensor], Sequence[str]]  # [n] int64 -> the text of each
    size: int
    model: nn.Module | None = None


def _words(text: str) -> _Vocabulary:
    words = Words.of(text)
    return _Vocabulary(words.encode, lambda numbers: [words.tokens[n] for n in numbers.tolist()], len(words))


def _hugging_face(name: str | Path, context: int) -> _Vocabulary:
    from lossk.recipes.huggingface import load

    loaded = load(name)
    if loaded.context is not None and context > loaded.context:
        raise ValueError(f"context must be at most {loaded.context}, the positions of {name}, got {context}")
    return _Vocabulary(loaded.encode, loaded.decode, loaded.vocabulary, loaded.model)


def _tiny(
    train: tuple[Tensor, Tensor], shape: Shape, steps: int, seed: int, checkpoint: str | Path | None
) -> TinyTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyTransformer(shape)
    if checkpoint is not None and Path(checkpoint).exists():
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        return model.eval()
    train_language_model(model, *train, steps=steps, batch_size=16, lr=3e-3, seed=seed)
    if checkpoint is not None:
        torch.save(model.state_dict(), checkpoint)
    return model


def _choose(count: int, number: int, seed: list[int]) -> Tensor:
    """[count] bool with `number` of them True, at random."""
    chosen = np.zeros(count, dtype=bool)
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    chosen[rng.choice(count, size=number, replace=False)] = True
    return torch.from_numpy(chosen)


def _probe_rows(held_out: Tensor, number: int | None, seed: int) -> Tensor:
    """[P] int64, ascending within the training sequences, which come first, and within the held-out ones."""
    number = min(number or len(held_out), len(held_out))
    chosen = _choose(len(held_out), number, [seed, 1])
    return torch.cat([(chosen & ~held_out).nonzero(), (chosen & held_out).nonzero()]).squeeze(1)


def _text(pieces: Sequence[str]) -> str:
    return " ".join("".join(pieces).split())
