"""Models that compute something else, or nothing, in some ways of calling them: without gradients, under autocast.

What is sampled, what is read and what the user's model computes are one function, or the call is refused in words.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_kinds_dtypes import network
from test_kinds_layers import embedded, tokens
from test_kinds_modules import vectors
from test_kinds_sequences import CLASSES, WIDTH, Encoder, masked, sequences
from test_kinds_wrappers import Branched
from torch import Tensor, nn

import lossk
from kind_world import World
from kinds import Kind, check, cross_entropy, short


class Pooled(Encoder):
    """The mean over all positions: where some are padding, the fused path has zeros there, the other not."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask).mean(dim=1))


class Asking(nn.Module):
    """Does something else where nothing needs a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(dim=1)) * (1.0 if torch.is_grad_enabled() else 0.5)


DISAGREEING = {"encoder-pooled-over-padding": Kind(Pooled, masked), "asks-for-gradients": Kind(Asking, sequences)}


@pytest.mark.parametrize("kind", DISAGREEING)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_without_gradients_another_function(kind: str) -> None:
    """Sampled is what is differentiated: its losses are what is read, or the call is refused with a word on it."""
    model, batch = DISAGREEING[kind].model(), DISAGREEING[kind].batch()
    own = cross_entropy(DISAGREEING[kind].model().eval(), batch).detach()
    world = World(model, data=batch)
    still = lossk.SGLD(lr=1e-14, n_beta=1.0, localization=0.0, batch_size=4, num_burnin_steps=0, num_steps_bw_draws=1)
    try:
        traces = lossk.sample_losses(model, batch, sampler=still, num_chains=1, num_draws=2, progress=False)
    except ValueError as error:
        assert "gradient" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(traces.losses[0], own.expand(2, -1), rtol=0, atol=1e-5)
    world.assert_same()


@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
def test_within_the_users_autocast(precision: str | None) -> None:
    """The precision is the one that lossk is given, and the user's autocast goes on afterwards."""
    kind = Kind(network, vectors)
    model, batch = kind.model(), kind.batch()
    settings: dict[str, Any] = {"sampler": short(), "num_chains": 1, "num_draws": 3, "progress": False}
    alone = lossk.sample_losses(model, batch, precision=precision, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        inside = lossk.sample_losses(model, batch, precision=precision, **settings)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert torch.equal(alone.losses, inside.losses)


REFUSED_BY_TORCH = {
    "scripted": Kind(lambda: torch.jit.script(Branched()), vectors),
    "scripted-part": Kind(lambda: nn.Sequential(torch.jit.script(Branched()), nn.Linear(CLASSES, CLASSES)), vectors),
    "sparse-embedding": Kind(lambda: embedded(sparse=True), tokens),
}


@pytest.mark.parametrize("kind", REFUSED_BY_TORCH)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_where_torch_takes_one_way_only(kind: str) -> None:
    """Scripts that cannot run in inference mode once they have trained; gradients that are not dense."""
    check(REFUSED_BY_TORCH[kind])
