"""A loss per token of sequences `input_ids` [B, P + 1], as devinterp 2 takes it, in the form lossk takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossk.ops.sample_loss import cross_entropy
from lossk.task.losses import forward

LossFn = Callable[[nn.Module, Tensor], Tensor]  # (model, input_ids [B, P + 1]) -> losses [B, P]
CHUNK = 2**22  # logits whose exact cross entropy is formed at a time


class TokenLoss:
    """`loss(model, {"input_ids": ids})` -> (losses [B, P], a mask of ones); keeps the losses of gradient passes.

    Attributes:
        parts: the losses [B, P] of each pass that took a gradient, in order; emptied by whoever reads them.
    """

    def __init__(self, loss_fn: LossFn | None, backend: str = "torch") -> None:
        self.loss_fn = partial(next_token_losses, backend=backend) if loss_fn is None else loss_fn
        self.parts: list[Tensor] = []

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids = batch["input_ids"]
        losses = self.loss_fn(model, ids)
        expected = [ids.shape[0], ids.shape[1] - 1]
        if not isinstance(losses, Tensor) or list(losses.shape) != expected:
            found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"loss_fn must return one loss per predicted token, shape {expected}, got {found}")
        if torch.is_grad_enabled():
            self.parts.append(losses.detach().float())
        return losses, torch.ones_like(losses, dtype=torch.bool)


def next_token_losses(model: nn.Module, input_ids: Tensor, *, backend: str = "torch") -> Tensor:
    """Cross entropy of each next token: [B, P] float32, nats; exact in small losses where no gradient is taken."""
    if getattr(getattr(model, "config", None), "use_cache", None):  # a Hugging Face model would build its cache
        logits = forward(model, {"input_ids": input_ids, "use_cache": False})
    else:
        logits = forward(model, input_ids)
    wanted = input_ids[:, 1:].flatten()
    flat = logits[:, :-1].flatten(0, 1)  # [B P, V]
    if torch.is_grad_enabled():
        return F.cross_entropy(flat.float(), wanted, reduction="none").view(len(input_ids), -1)
    chunk = max(1, CHUNK // flat.shape[1])
    losses = [cross_entropy(x, y, backend=backend) for x, y in zip(flat.split(chunk), wanted.split(chunk), strict=True)]
    return torch.cat(losses).view(len(input_ids), -1)
