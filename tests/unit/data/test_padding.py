"""Batches of different lengths, as collators make them, are padded to the longest; losses do not depend on it."""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lossk
from loader_items import Items, batches_of
from lossk.data.data import Samples
from lossk.data.reading import read_samples

PAD, WORDS = 3, 11
LENGTHS = [3, 7, 2, 5, 5, 1, 4, 7, 2, 6, 3]


class Encoding(UserDict):  # type: ignore[type-arg]
    """As of Hugging Face: a mapping whose parts are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class Collator:
    """Pads to the longest sample of a batch, on the tokenizer's side."""

    def __init__(self, side: str = "right", form: Callable[..., Any] = Encoding) -> None:
        self.tokenizer = SimpleNamespace(pad_token_id=PAD, padding_side=side)
        self.form = form

    def __call__(self, items: list[Tensor]) -> Any:
        size = max(map(len, items))
        ids = torch.stack([self.padded(item, size, PAD) for item in items])
        mask = torch.stack([self.padded(torch.ones_like(item), size, 0) for item in items])
        labels = torch.stack([self.padded(item.roll(-1), size, -100) for item in items])
        return self.form(input_ids=ids, attention_mask=mask, labels=labels)

    def padded(self, item: Tensor, size: int, value: int) -> Tensor:
        fill = torch.full((size - len(item),), value, dtype=item.dtype, device="cpu")
        return torch.cat([fill, item] if self.tokenizer.padding_side == "left" else [item, fill])


def texts() -> Items:
    numbers = torch.Generator().manual_seed(0)
    items = [torch.randint(4, WORDS, (length,), generator=numbers, device="cpu") for length in LENGTHS]
    return Items(items.__getitem__, len(items))


class Attending(nn.Module):
    """One layer of attention among the unmasked tokens."""

    def __init__(self, masked: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.masked = masked
        self.embed, self.read, self.out = nn.Embedding(WORDS, 6), nn.Linear(6, 12), nn.Linear(6, WORDS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k = self.read(x).chunk(2, dim=-1)
        scores = q @ k.transpose(1, 2)
        if self.masked:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -torch.inf)
        return self.out(scores.softmax(dim=-1) @ x)


def token_losses(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    logits = model(batch.input_ids, attention_mask=batch.attention_mask)
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
    return losses, batch.labels != -100


def sampled(loader: Any, model: nn.Module | None = None, loss: Any = token_losses) -> lossk.LossTraces:
    sampler = lossk.SGLD(lr=1e-3, n_beta=5.0, localization=1.0, batch_size=4, num_burnin_steps=0, num_steps_bw_draws=1)
    return lossk.sample_losses(
        model or Attending(), loader, loss=loss, sampler=sampler, num_chains=1, num_draws=3, progress=False
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, len(LENGTHS)])
def test_batches_are_padded_as_one_batch_of_all_would_be(side: str, size: int) -> None:
    """The collator itself, given all samples at once, is the reference."""
    collate = Collator(side)
    expected = collate([*map(texts().item, range(len(LENGTHS)))])
    read = read_samples(DataLoader(texts(), size, collate_fn=collate), pads=True)
    for name in expected:
        assert torch.equal(read.tree[name], expected[name]), name
    assert type(read[:3]) is Encoding


def test_a_sample_alone_is_as_long_as_in_its_own_batch() -> None:
    read = read_samples(DataLoader(texts(), 2, collate_fn=Collator("left")), pads=True)
    alone = read.alone(3)
    own = Collator("left")([texts().item(2), texts().item(3)])
    assert all(torch.equal(alone[name], own[name][1:]) for name in own)
    assert read.padding is not None
    order = read.padding.by_share(read.tree).tolist()
    assert max(LENGTHS[i] for i in order[:3]) <= 5
    assert LENGTHS[order[-1]] == 7 or LENGTHS[order[-1] ^ 1] == 7


@pytest.mark.parametrize("form", [Encoding, Batch])
def test_a_kernel_does_not_depend_on_how_samples_are_batched(form: Any) -> None:
    together = sampled(DataLoader(texts(), len(LENGTHS), collate_fn=Collator(form=form)))
    for size in (1, 3):
        found = sampled(DataLoader(texts(), size, collate_fn=Collator(form=form)))
        assert torch.equal(found.losses, together.losses)
    assert together.losses.shape[-1] == sum(LENGTHS)


def test_padding_that_bears_on_losses_is_refused() -> None:
    """A model that attends to padding: a sample's loss in its own batch is not that of the padded one."""
    with pytest.raises(ValueError, match=r"loader: .*padding.*\['input_ids'\] with 3.*\['labels'\] with -100.*mask"):
        sampled(DataLoader(texts(), 1, collate_fn=Collator()), Attending(masked=False))
    traces = sampled(DataLoader(texts(), len(LENGTHS), collate_fn=Collator()), Attending(masked=False))
    assert torch.isfinite(traces.losses).all()  # a loader of one batch is taken as it is


def test_values_by_the_tokenizer_by_name_or_as_seen() -> None:
    ids, mask = torch.tensor([[5, 6], [7, 9]]), torch.tensor([[1, 1], [1, 0]])
    long = {"ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    long |= {"kind": torch.ones(1, 3, dtype=torch.int64), "x": torch.ones(1, 3), "labels": torch.ones(1, 3).long()}
    short = {"ids": ids, "attention_mask": mask, "kind": 1 - mask, "x": torch.rand(2, 2), "labels": ids}
    read = read_samples(batches_of(short, long), pads=True).tree
    assert read["ids"].tolist() == [[5, 6, 9], [7, 9, 9], [1, 1, 1]]
    assert read["kind"].tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert read["x"][:2, 2].tolist() == [0.0, 0.0]
    assert read["labels"][:, 2].tolist() == [-100, -100, 1]
    assert read["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


def test_a_tokenizer_is_found_in_functions_and_partials() -> None:
    collator = Collator()

    def closed(items: Any) -> Any:
        return collator(items)

    def given(items: Any, tokenizer: Any) -> Any:
        return collator(items)

    for collate in (closed, functools.partial(given, tokenizer=collator.tokenizer), collator.__call__):
        read = read_samples(DataLoader(texts(), 1, collate_fn=collate), pads=True)
        assert read.tree["input_ids"][0].tolist()[3:] == [PAD] * 4


def test_pairs_of_inputs_and_targets_and_several_dimensions() -> None:
    first = (torch.ones(2, 1, 2, 3), torch.ones(2, 2, dtype=torch.int64))
    second = (torch.ones(1, 1, 4, 1), torch.ones(1, 3, dtype=torch.int64))
    samples = read_samples(batches_of(first, second), pads=True)
    x, y = samples.tree
    assert x.shape == (3, 1, 4, 3)
    assert x.sum(dim=(1, 2, 3)).tolist() == [6.0, 6.0, 4.0]
    assert y.tolist() == [[1, 1, -100], [1, 1, -100], [1, 1, 1]]
    assert samples.alone(2)[0].shape == (1, 1, 4, 1)


def test_who_does_not_prove_padding_refuses_it() -> None:
    with pytest.raises(ValueError, match="one shape in every batch"):
        read_samples(DataLoader(texts(), 1, collate_fn=Collator()))
    with pytest.raises(ValueError, match="one shape in every batch"):
        read_samples(batches_of(torch.ones(2, 3), torch.ones(2, 3, 1)), pads=True)


def test_samples_that_are_read_already_are_taken_as_they_are() -> None:
    read = read_samples(DataLoader(texts(), 1, collate_fn=Collator()), pads=True)
    assert isinstance(read, Samples)
    assert read_samples(read) is read


def test_the_choice_is_said() -> None:
    said = sampled(DataLoader(texts(), 1, collate_fn=Collator())).meta["passes_reasons"]
    assert any("padding = loader" in line and "['input_ids'] with 3" in line for line in said)
