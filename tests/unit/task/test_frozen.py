"""Late blocks of real architectures: what frozen modules give is kept, and the kernel is that of whole passes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lossk
from conftest import sgld
from frozen_models import RUNS, WORDS, Bert, Decoder, EfficientNet, Encoding, GoogLeNet, ViT, Windows
from lossk.probe import frozen_outputs

N = 11
Build = Callable[..., lossk.LossKernel]


def ids() -> Tensor:
    return torch.randint(0, WORDS, (N, 5), generator=torch.Generator().manual_seed(3), device="cpu")


def lengths() -> Tensor:
    mask = torch.ones(N, 5, dtype=torch.int64, device="cpu")
    mask[::2, 3:] = 0
    return mask


def texts() -> Any:
    return {
        "input_ids": ids(),
        "attention_mask": lengths(),
        "labels": ids().roll(-1, 1).masked_fill(lengths() == 0, -100),
    }


def images(size: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, 3, size, size, generator=torch.Generator().manual_seed(3), device="cpu")
    return x, torch.arange(N, device="cpu") % 3


def windows() -> tuple[Tensor, Tensor]:
    return images()[0].flatten(1)[:, :12].reshape(N, 3, 4), images()[1]


def next_tokens(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Hugging Face's call: a batch's inputs by their names; logits from the output's attribute or key."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"])["logits"]
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none"), batch["labels"] != -100


def classes(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any, list[str], str]] = {
    "decoder": (Decoder, texts, next_tokens, ["layers.2.*", "layers.3.*"], "3 calls.*embed_tokens to layers.1"),
    "decoder, mlp of a layer": (Decoder, texts, next_tokens, ["layers.3.mlp.*"], "to layers.3.post_att"),
    "decoder, head": (Decoder, texts, next_tokens, ["lm_head.*"], "6 calls.*embed_tokens to norm"),
    "encoder": (
        Bert, lambda: ((ids(), lengths()), torch.arange(N) % 3), "cross_entropy", ["encoder.layer.2.*"],
        "words to encoder.layer.1",
    ),
    "vision transformer": (ViT, images, classes, ["blocks.2.*", "head.*"], "patches to blocks.1"),
    "efficientnet": (EfficientNet, images, classes, ["features.3.*"], "features.0 to features.2"),
    "googlenet, a branch": (GoogLeNet, images, classes, ["last.branch2.2.*"], "conv to last.branch3"),
    "googlenet, late": (GoogLeNet, images, classes, ["last.*", "fc.*"], "conv to first"),
    "windows": (Windows, windows, classes, ["out.*"], "3 calls.*read to mix"),
}  # fmt: skip


def reason(kernel: lossk.LossKernel) -> str:
    """What was said of the prefix."""
    (found,) = [line for line in kernel.meta["passes_reasons"] if line.startswith("frozen prefix")]
    return found


def kernels(build: Build, case: str, **settings: Any) -> tuple[lossk.LossKernel, lossk.LossKernel]:
    """With what frozen modules give, and by whole passes."""
    make, data, loss, params, _ = CASES[case]
    torch.manual_seed(0)
    model, samples = make(), data()
    given = {"loss": loss, "sampler": sgld(params=params), **settings}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = build(model, samples, passes=lossk.Passes(), **given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())
    return found, build(model, samples, passes=lossk.Passes(frozen_prefix=False), **given)


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_is_that_of_whole_passes(case: str, build: Build) -> None:
    """Bit for bit, where gradients are taken in the probe's own batches."""
    found, whole = kernels(build, case, sampler=sgld(params=CASES[case][3], batch_size=None))
    assert "= cached" in reason(found), reason(found)
    assert re.search(CASES[case][4], reason(found)), reason(found)
    assert np.array_equal(found.to_numpy(), whole.to_numpy())
    assert float(found.variance.max()) > 0


@pytest.mark.parametrize("case", ["decoder", "efficientnet", "vision transformer"])
def test_minibatches_of_another_composition(case: str, build: Build) -> None:
    """Off by the rounding of products of matrices of other sizes at most."""
    found, whole = (kernel.to_numpy() for kernel in kernels(build, case))
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-4 * np.abs(whole).max())


@pytest.mark.parametrize("case", ["decoder", "efficientnet"])
def test_outputs_in_files(case: str, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit into a quarter of what is free."""
    monkeypatch.setattr(frozen_outputs, "_free", lambda task, budget: 64)
    found, whole = kernels(build, case, sampler=sgld(params=CASES[case][3], batch_size=None))
    assert "in mapped files in" in reason(found)
    assert np.array_equal(found.to_numpy(), whole.to_numpy())


def test_what_is_more_than_allowed_is_not_kept(build: Build) -> None:
    torch.manual_seed(0)
    kernel = build(
        Decoder(), texts(), loss=next_tokens, sampler=sgld(params=["lm_head.*"]), passes=lossk.Passes(prefix_bytes=100)
    )
    assert "not cached: a loss of your own" in reason(kernel)
    assert "outputs of frozen modules need" in reason(kernel)


def test_frozen_layers_run_for_the_checks_and_once(build: Build) -> None:
    """However many draws there are."""
    runs = []
    for num_draws in (6, 30):
        torch.manual_seed(0)
        model = Decoder()
        build(model, texts(), loss=next_tokens, sampler=sgld(params=["layers.3.*"]), num_draws=num_draws)
        runs.append([sum(layer is model.layers[i] for layer in RUNS) for i in (0, 3)])
        RUNS.clear()
    assert runs[0][0] == runs[1][0]
    assert runs[1][1] > runs[0][1] + 24


def test_only_what_is_read_is_kept(build: Build) -> None:
    """The last frozen layer's hidden states, and not those of layers before it: 5 positions of 8 float32 a sample."""
    found, _ = kernels(build, "decoder")
    assert f"; {N * 5 * 8 * 4 / 1e3:.0f} kB of outputs" in reason(found)


def test_batches_and_precision_of_every_kind(build: Build) -> None:
    torch.manual_seed(0)
    model, samples = Decoder(), Encoding(**texts())
    rows = [{key: value[i] for key, value in samples.items()} for i in range(N)]

    def collate(items: list[Any]) -> Encoding:
        return Encoding(**{key: torch.stack([item[key] for item in items]) for key in items[0]})

    loader = DataLoader(rows, 4, collate_fn=collate)  # type: ignore[arg-type]
    for precision in (None, "bf16"):
        kernel = build(model, loader, loss=next_tokens, sampler=sgld(params=["layers.3.*"]), precision=precision)
        assert "= cached" in reason(kernel)


# --- not kept ----------------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """A frozen module whose input has no gradient, but follows sampled weights: which expert is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.expert = nn.Linear(4, 6), nn.Linear(6, 6), nn.Embedding(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.first(x))
        return y[:, :3] + 2 * self.expert(y.argmax(1))


class Counting(nn.Module):
    """Gives an object that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Any:
        return {"x": self.first(x), "cache": object()}


class Holding(nn.Module):
    """Its first module gives what cannot be kept, but what is inside that can."""

    def __init__(self) -> None:
        super().__init__()
        self.counting, self.last = Counting(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.counting(x)["x"])


class Mixing(nn.Module):
    """A frozen module that gives one row for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x[:1] * 0 + x)[: len(x)] + 0 * self.first(x.sum(0)))


def vectors() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 4, generator=torch.Generator().manual_seed(5), device="cpu"), torch.arange(N) % 3


def test_what_follows_sampled_weights_without_a_gradient_is_run(build: Build) -> None:
    torch.manual_seed(0)
    given = {"loss": classes, "sampler": sgld(params=["gate.*"], batch_size=None)}
    model = Routed()
    kernel = build(model, vectors(), **given)
    assert "1 call of frozen modules run once (first)" in reason(kernel)
    whole = build(model, vectors(), passes=lossk.Passes(frozen_prefix=False), **given)
    assert np.array_equal(kernel.to_numpy(), whole.to_numpy())


class Deciding(Routed):
    """Which module is called follows a number that follows sampled weights."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.first(x))
        rows = self.expert.weight if float(self.gate.weight.sum()) > 1e9 else self.expert(torch.arange(6).flip(0))
        return y[:, :3] + rows[:1]


def test_calls_after_a_number_was_read_are_run(build: Build) -> None:
    torch.manual_seed(0)
    kernel = build(Deciding(), vectors(), loss=classes, sampler=sgld(params=["gate.*"], batch_size=None))
    assert "1 call of frozen modules run once (first)" in reason(kernel)


def test_a_module_that_gives_an_object_is_looked_into(build: Build) -> None:
    kernel = build(Holding(), vectors(), loss=classes, sampler=sgld(params=["last.*"]))
    assert "cached: 1 call of frozen modules run once (counting.first)" in reason(kernel)


def test_rows_of_a_whole_batch_are_refused(build: Build) -> None:
    kernel = build(Mixing(), vectors(), loss=classes, sampler=sgld(params=["last.*"]))
    assert "not cached" in reason(kernel)
