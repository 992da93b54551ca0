"""torch's own criteria, `nn.CrossEntropyLoss(...)` or `F.mse_loss`, as a loss of each sample or token.

The rule: the mean (of reduction="sum": the sum) of the per-sample losses over a batch of equal-sized samples is what
the criterion itself gives, wherever such losses exist.

* Of class indices: a sample's loss is what reduction="none" gives, whatever the reduction; with outputs [B, C, T] and
  targets [B, T] it is a loss per token, and a token with `ignore_index` is none. With class weights w it is
  w[target] times the cross entropy. No per-sample losses have torch's weighted mean, which divides by the sum of the
  weights in the batch: L_n is torch's over all samples times the mean weight of their targets.
* Of entries: reduction="mean" and "none" are the mean over a sample's entries, "sum" and "batchmean" their sum.

Losses are formed in float64 from the outputs and rounded once: errors are 1e-7 of the loss plus 1e-15 of the largest
output. A cross entropy without smoothing is `ops.sample_loss`, exact to 1e-6 of the loss however small; a smoothed one
is never small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossk.ops.sample_loss import IGNORED, cross_entropy

WRITE = (
    "loss is called as loss(model, batch) and returns one loss per sample: write "
    'loss=lambda model, batch: criterion(model(batch[0]), batch[1]) with criterion of reduction="none"'
)
FEW = 8  # entries of a tensor that a name spells out

INDEXED: dict[str, Any] = {"weight": None, "ignore_index": IGNORED}
# function: (name, options and their defaults, module)
KINDS: dict[Callable[..., Tensor], tuple[str, dict[str, Any], type[nn.Module]]] = {
    F.cross_entropy: ("cross_entropy", {**INDEXED, "label_smoothing": 0.0}, nn.CrossEntropyLoss),
    F.nll_loss: ("nll", INDEXED, nn.NLLLoss),
    F.mse_loss: ("mse", {}, nn.MSELoss),
    F.l1_loss: ("l1", {}, nn.L1Loss),
    F.smooth_l1_loss: ("smooth_l1", {"beta": 1.0}, nn.SmoothL1Loss),
    F.huber_loss: ("huber", {"delta": 1.0}, nn.HuberLoss),
    F.binary_cross_entropy: ("bce", {"weight": None}, nn.BCELoss),
    F.binary_cross_entropy_with_logits: (
        "bce_with_logits",
        {"weight": None, "pos_weight": None},
        nn.BCEWithLogitsLoss,
    ),
    F.kl_div: ("kl_div", {"log_target": False}, nn.KLDivLoss),
    F.poisson_nll_loss: ("poisson_nll", {"log_input": True, "full": False, "eps": 1e-8}, nn.PoissonNLLLoss),
    F.soft_margin_loss: ("soft_margin", {}, nn.SoftMarginLoss),
    F.hinge_embedding_loss: ("hinge_embedding", {"margin": 1.0}, nn.HingeEmbeddingLoss),
}
REDUCTIONS = ("mean", "sum", "none", "batchmean")


@dataclass(frozen=True)
class Criterion:
    """A criterion that lossk understands.

    Attributes:
        name: of the kind, with the options that are not the default.
        losses: (outputs, targets) -> losses [B] and None, or losses [B, T] and mask [B, T] bool; float32.
        check: (targets of all samples, outputs of the first or None): ValueError if unusable.
        plain: has no options, and takes class indices or the mean over entries: "cross_entropy" and "mse" as they are.
    """

    name: str
    losses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
    check: Callable[[Tensor, Tensor | None], None]
    plain: bool


def recognize(loss: Any, backend: str = "torch") -> Criterion | None:
    """The criterion of a module such as `nn.CrossEntropyLoss(...)`, of `F.cross_entropy`, or of a `partial` of it.

    Returns:
        None: something else.

    Raises:
        TypeError: a criterion of torch that has no loss per sample of one output and one target, or its class.
        ValueError: an option without a meaning for a single sample.
    """
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        raise TypeError(f"loss must be an instance, loss={loss.__name__}(...), got the class {loss.__name__} itself")
    if isinstance(loss, nn.Module):
        for function, (kind, defaults, module) in KINDS.items():
            if isinstance(loss, module) and type(loss).forward is module.forward:
                given = {option: getattr(loss, option) for option in (*defaults, "reduction")}
                return _criterion(function, kind, defaults, given, backend)
        _refuse(type(loss).__name__, type(loss).forward.__module__)
        return None
    function, given = (loss.func, loss.keywords) if isinstance(loss, partial) else (loss, {})
    known = KINDS.get(function) if callable(function) and getattr(function, "__hash__", None) else None
    if known is None or (isinstance(loss, partial) and loss.args):
        _refuse(getattr(function, "__name__", ""), getattr(function, "__module__", ""))
        return None
    return _criterion(function, known[0], known[1], given, backend)


def _refuse(name: str, module: str | None) -> None:
    if module and (module.startswith("torch.nn.modules.") or module in ("torch.nn.functional", "torch._C._nn")):
        raise TypeError(f"loss: {name} has no loss per sample of one output and one target. {WRITE}")


def _criterion(
    function: Callable[..., Tensor], kind: str, defaults: dict[str, Any], given: dict[str, Any], backend: str
) -> Criterion:
    given = {**defaults, "reduction": "mean", **given}
    reduction = given.pop("reduction")
    if unknown := sorted(set(given) - set(defaults)):
        raise ValueError(f"loss: {kind} is understood with {', '.join([*defaults, 'reduction'])}, got {unknown[0]}")
    if reduction not in REDUCTIONS or (reduction == "batchmean" and function is not F.kl_div):
        raise ValueError(f"loss: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    options = {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in given.items()
        if isinstance(value, Tensor) or value != defaults[name]
    }
    for name, value in options.items():
        if isinstance(value, Tensor) and not (value.is_floating_point() and bool(torch.isfinite(value).all())):
            raise ValueError(f"loss: {name} must hold finite floating-point numbers, got {spell(value)}")
    if function in (F.cross_entropy, F.nll_loss):
        return _of_classes(function, kind, options, backend)
    total = reduction in ("sum", "batchmean")
    return Criterion(
        _named(kind, {**options, **({"reduction": "sum"} if total else {})}),
        partial(_entry_losses, function, options, total),
        partial(_check_entries, kind, options),
        plain=not options and not total,
    )


def _named(kind: str, options: dict[str, Any]) -> str:
    return kind if not options else f"{kind}({', '.join(f'{key}={spell(value)}' for key, value in options.items())})"


def spell(value: Any) -> str:
    """An option as part of a loss's name: a long tensor by its digest, so that other values are another name."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, int | float | complex | str | bytes | None):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(spell, value))}]"
    if not isinstance(value, Tensor):  # a `repr` may hold an address, which is another one when a run is resumed
        return getattr(value, "__qualname__", type(value).__name__)
    if value.numel() <= FEW:
        return repr(value.detach().cpu().tolist())
    content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{list(value.shape)} {hashlib.blake2b(content, digest_size=6).hexdigest()}"


# -- class indices ------------------------------------------------------------------------------------------------


def class_rows(outputs: Tensor) -> Tensor:
    """[B, C] as they are; torch's [B, C, T] as rows [B T, C]."""
    return outputs if outputs.ndim == 2 else outputs.movedim(1, -1).flatten(0, -2)


def _of_classes(function: Callable[..., Tensor], kind: str, options: dict[str, Any], backend: str) -> Criterion:
    ignored, weight = options.get("ignore_index", IGNORED), options.get("weight")

    def losses(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        rows, flat = class_rows(outputs), targets.flatten().long()
        weights = None if weight is None else weight.to(rows.device)
        if function is F.cross_entropy and "label_smoothing" not in options:
            found = cross_entropy(rows, flat.masked_fill(flat == ignored, IGNORED), backend=backend)
            if weights is not None:
                found = found * weights.float()[flat.masked_fill(flat == ignored, 0)]
        else:
            wide = None if weights is None else weights.double()
            given = {**options, **({} if wide is None else {"weight": wide})}
            found = function(rows.double(), flat, reduction="none", **given).float()
        return (found, None) if targets.ndim == 1 else (found.view(targets.shape), targets != ignored)

    return Criterion(_named(kind, options), losses, partial(_check_classes, kind, ignored, weight), plain=not options)


def _check_classes(kind: str, ignored: int, weight: Tensor | None, targets: Tensor, outputs: Tensor | None) -> None:
    indices = not (targets.is_floating_point() or targets.dtype == torch.bool)
    if not indices or targets.ndim not in (1, 2):
        raise ValueError(
            f"targets must be class indices, integers [N] or of a loss per token [N, T], for this {kind} loss, got "
            f"{targets.dtype} of shape {list(targets.shape)}. {WRITE}"
        )
    if targets.ndim == 1 and bool((targets == ignored).any()):
        i = int((targets == ignored).nonzero()[0])
        raise ValueError(
            f"targets: sample {i} has ignore_index, {ignored}, and so no loss; leave such samples out of the data"
        )
    if outputs is None:
        return
    wanted = [outputs.shape[1] if outputs.ndim > 1 else "C", *targets.shape[1:]]
    if outputs.ndim != targets.ndim + 1 or list(outputs.shape[1:]) != wanted:
        last = targets.ndim == 2 and outputs.ndim == 3 and outputs.shape[1] == targets.shape[1]
        hint = "; outputs [B, T, C] are those of loss='token_cross_entropy'" if last else ""
        shape = "[B, C]" if targets.ndim == 1 else f"[B, C, {targets.shape[1]}], as torch's own"
        raise ValueError(f"this {kind} loss needs model outputs of shape {shape}, got {list(outputs.shape)}{hint}")
    num_classes = outputs.shape[1]
    if weight is not None and list(weight.shape) != [num_classes]:
        raise ValueError(f"loss: weight must have shape [{num_classes}], one for each class, got {list(weight.shape)}")
    wrong = ((targets != ignored) & ((targets < 0) | (targets >= num_classes))).nonzero()
    if wrong.numel():
        i = int(wrong[0, 0])
        value = int(targets[tuple(wrong[0].tolist())])
        raise ValueError(f"targets must lie in [0, {num_classes}), the model's classes; sample {i} has {value}")


# -- entries ------------------------------------------------------------------------------------------------------


def _entry_losses(
    function: Callable[..., Tensor], options: dict[str, Any], total: bool, outputs: Tensor, targets: Tensor
) -> tuple[Tensor, None]:
    wide = outputs.double()
    given = {
        name: value.to(wide.device, torch.float64) if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    entries = function(wide, targets.to(wide.device, torch.float64).reshape(wide.shape), reduction="none", **given)
    entries = entries.reshape(len(entries), -1)
    return (entries.sum(dim=1) if total else entries.mean(dim=1)).float(), None


def _check_entries(kind: str, options: dict[str, Any], targets: Tensor, outputs: Tensor | None) -> None:
    if outputs is None:
        return
    wanted, found = list(targets.shape[1:]), list(outputs.shape[1:])
    if found != wanted and not (wanted in ([], [1]) and found in ([], [1])):
        raise ValueError(
            f"this {kind} loss needs outputs and targets of one shape per sample, got outputs {found} and targets "
            f"{wanted}"
        )
    for name, value in options.items():
        if isinstance(value, Tensor) and not _broadcasts(value, found):
            raise ValueError(
                f"loss: {name} must fit the entries of a single sample, {found}, got shape {list(value.shape)}; a "
                "weight of each sample belongs into the batch and a loss(model, batch)"
            )


def _broadcasts(value: Tensor, entries: list[int]) -> bool:
    """Whether a tensor multiplies the entries of every sample alike."""
    shape = list(value.shape)[1:] if value.ndim == len(entries) + 1 and value.shape[0] == 1 else list(value.shape)
    try:
        return list(torch.broadcast_shapes(torch.Size(shape), torch.Size(entries))) == entries
    except RuntimeError:
        return False
