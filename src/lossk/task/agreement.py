"""What is sampled, what is read and what the user's model computes are one function: proven on a few samples at w*.

Every way in which lossk runs the model is compared with the losses of the user's own call (`lossk.task.called`):
float32 weights, with gradients and without, a sample by itself, the batch sizes in use, and every rewriting (`Passes`).
Two ways may differ by what rounding explains, and that is measured on the model: its losses are evaluated with every
weight and every layer's output off by a random relative error of the size that the arithmetic makes. `MARGIN` times the
largest change so found is allowed: a bound that follows each model's own sensitivity, whatever its depth and precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lossk.data.data import FEW, Samples, few_of, spread
from lossk.task.attributes import Attributes
from lossk.task.called import Called, as_called, check_data
from lossk.task.gradient_check import MOVED, check_gradient, moved
from lossk.task.parameters import is_compiled
from lossk.task.snapshot import Switch, acting
from lossk.task.task import Task, fitting_batch

# Relative error of a layer that is simulated: of a float32 sum of some 4,000 terms, 2^-24 sqrt(4096), and of the
# roundings of input, weight and output of a layer in lower precision, about 8 halves of its last bit.
ROUNDING = {None: 2.0**-18, "tf32": 2.0**-8, "fp16": 2.0**-8, "bf16": 2.0**-6}
OWN_ROUNDING = {torch.float64: 2.0**-18, torch.float32: 2.0**-18, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-6}
MARGIN = 4.0
MEANS = 2.0**-16  # besides, of a mean loss, whose float32 log-sum-exp is off by a last bit of the logits: 2^-24 x 256
WITNESSES = 64  # samples of each data set whose losses a resumed run is known by, and losses that are kept of these
REPEATS = 2  # simulations of rounding


class Disagreement(ValueError):
    """Two ways of running the model give different losses; the message names both."""


def prove(task: Task, named: Mapping[str, Samples]) -> tuple[dict[str, Samples], dict[str, int | None]]:
    """Check data, loss and model at w*, and set the task (not entered) to run the model as it can be run.

    Args:
        named: the data sets, under the names that messages give them.

    Returns:
        The data sets where the passes want them, and T of each, the positions of a loss per token, None of a loss per
        sample. `task.called` keeps the losses that later ways of running the model are compared with.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    for samples in named.values():
        check_data(task, samples, None)
    task.draws = False
    called = {name: as_called(task, samples, name) for name, samples in named.items()}
    ways = {each.arguments for each in called.values()}
    task.arguments = ways.pop() if len(ways) == 1 else None
    named = {name: dataclasses.replace(samples, copied=called[name].writes) for name, samples in named.items()}
    attempts = list(_attempts(task))
    for number, (task.switch, memory_format) in enumerate(attempts):
        task.use_passes(dataclasses.replace(task.passes, memory_format=memory_format))
        try:
            with task:
                placed = {name: task.place(samples) for name, samples in named.items()}
                task.called = {name: compare(task, placed[name], called[name]) for name in named}
            break
        except Exception as error:
            if number == len(attempts) - 1:
                raise _explained(task, error) from error.__cause__
            task.notes.append(_unused(attempts[number], attempts[number + 1], error))
    for name, samples in placed.items():
        if samples.padding is not None:
            task.notes.append(f"padding = {name} to the longest, losses do not depend on it: {samples.padding}")
    return placed, {name: None if each.mask is None else each.mask.shape[1] for name, each in called.items()}


def _attempts(task: Task) -> list[tuple[Switch, Any]]:
    """(how the model goes to eval mode, memory format): the preferred way first, the plainest last.

    Where a module does something of its own in `eval()`, modes are first set without it, and then after taking it back:
    weights that a layer has merged into others no longer reach the loss.
    """
    formats = [task.passes.memory_format] + (["contiguous"] if task.channels_last else [])
    switches: list[Switch] = ["none", "train", "eval"] if acting(task.model) else ["none"]
    return list(product(switches, formats))


def _unused(attempt: tuple[Switch, Any], following: tuple[Switch, Any], error: Exception) -> str:
    """Why a way of running the model is not used, as a reason."""
    if attempt[1] != following[1] == "contiguous":
        return f"memory format = contiguous: {attempt[1]} is not used: {error}".splitlines()[0]
    how = {"train": "by train(), then module by module", "eval": "by eval()"}[following[0]]
    return f"eval mode = {how}: otherwise {error}".splitlines()[0]


def _explained(task: Task, error: Exception) -> Exception:
    """The error of the plainest way of running the model, and what its user can do."""
    dtype = task.sampled[0].dtype
    if isinstance(error, Disagreement):
        return error
    if isinstance(error, RuntimeError) and "reentrant" in str(error):
        return ValueError(
            "model must not use reentrant checkpointing, under which gradients cannot be taken for given weights; "
            f"call torch.utils.checkpoint.checkpoint with use_reentrant=False: {error}"
        )
    if dtype != torch.float32 and not isinstance(error, ValueError):
        return ValueError(
            f"model has {dtype} parameters and runs as you call it, but fails with the float32 weights that lossk "
            "samples; where its forward casts to a fixed dtype, cast to that of the weights instead "
            f"({type(error).__name__}: {error})"
        )
    error.add_note("raised by the model or the loss, on samples that lossk checks before it starts")
    return error


def compare(task: Task, samples: Samples, called: Called) -> Called:
    """The plain ways of running the model, against the user's own call; the task is entered, at w*.

    Returns:
        `called` with what rounding is allowed.

    Raises:
        ValueError: a loss that is random, depends on its batch or on no sampled weight, or on weights kept elsewhere.
        Disagreement: two plain ways give different losses.
    """
    begun = Attributes(task.model)
    (rows, mask), (again, mask_again) = task.rows(samples[called.index]), task.rows(samples[called.index])
    if mask is not None and (mask_again is None or not torch.equal(mask, mask_again)):
        raise ValueError("loss: the mask must depend on the data only; two passes over the same batch gave two")
    if (mask is None) != (called.mask is None) or not _same_mask(mask, called.mask):
        raise ValueError("loss: the mask must depend on the data only; with and without gradients it is not the same")
    _check_finite(called)
    size, own = ROUNDING[task.precision], OWN_ROUNDING.get(called.dtype, 2.0**-6)
    if not _within(rows, again, size * float(rows.abs().amax()) if len(rows) else 0.0):
        raise ValueError(
            "model must be deterministic in eval mode: two passes over the same batch gave different losses"
        )
    repeatable = rounding_of(task, samples, called.index, rows, size)
    allowed = repeatable if own <= size else rounding_of(task, samples, called.index, rows, own)
    called = dataclasses.replace(called, allowed=allowed, repeatable=repeatable)
    check_rows(called, rows, "with float32 weights, without gradients")
    with torch.enable_grad(), task.autocast():
        check_rows(
            called, task.loss.rows(task.run_model, samples[called.index])[0], "with float32 weights and gradients"
        )
    _check_alone(task, samples, called, rows)
    check_padding(task, samples, called.name, own if own > size else size)
    check_mean(called, task.gradient(samples, called.index), "in a gradient pass")
    if len(rows):
        check_gradient(task, lambda: samples[called.index], rows, called.allowed)
    _check_follows(task, samples, called, begun)
    return called


def check_passes(task: Task, samples: Samples, called: Called, minibatch: int | None) -> None:
    """The passes as a run will make them, rewritings and batch sizes included; the task is entered, at w*.

    Args:
        minibatch: samples of a gradient; None where no gradient is taken.

    Raises:
        Disagreement: their losses are not those of the user's own call.
    """
    others = torch.ones(len(samples), dtype=torch.bool, device="cpu")
    others[called.index] = False
    order = torch.cat([called.index, others.nonzero().flatten()])
    size = fitting_batch(task.passes.probe_batch, task.loss.positions)
    batch = samples[order[: max(size, len(called.index))]]
    how = f"in a probe pass of {min(max(size, len(called.index)), len(samples))} samples ({task.passes})"
    check_rows(called, task.rows(batch)[0], how)
    if task.draws_at_a_time(2) > 1:
        with task.evaluating(torch.stack([task.flat, task.flat])) as rows:
            for row in rows(batch)[0]:
                check_rows(called, row, f"in a probe pass of several draws ({task.passes})")
    if minibatch is None:
        return
    part = order[: min(minibatch, task.passes.gradient_batch)]
    mean = float(torch.cat([task.losses(samples[few]) for few in part.split(size)]).double().mean())
    tokens = 1.0 if called.mask is None else float(called.mask.sum(dim=1).amax()) / task.loss.mean_tokens
    found = task.gradient(samples, part)
    if not abs(found - mean) <= called.allowed * max(1.0, tokens) + MEANS * (1.0 + abs(mean)):
        raise Disagreement(
            f"model: {len(part)} samples of {called.name} have mean loss {mean:.7g} without gradients, but {found:.7g} "
            f"in a gradient pass ({task.passes})"
        )


def check_rows(called: Called, rows: Tensor, how: str) -> None:
    """Raise Disagreement unless the first rows are the called losses."""
    rows = rows[: len(called.losses)].detach().double().cpu()
    if len(rows) and not _within(rows, called.losses, called.allowed):
        row = int((rows - called.losses).abs().nan_to_num(nan=torch.inf).argmax())
        raise Disagreement(
            f"model: {called.where(row)} has loss {float(called.losses[row]):.7g} as you call the model (eval mode, "
            f"gradients enabled, {called.dtype}), but {float(rows[row]):.7g} {how}; lossk needs both, so they must "
            f"agree to {called.allowed:.2g} nats, which is what rounding explains"
        )


def check_mean(called: Called, mean: float, how: str) -> None:
    """Raise Disagreement unless it is the mean of the called losses."""
    allowed = called.allowed * max(1.0, len(called.losses) / len(called.index)) + MEANS * (1.0 + abs(called.mean))
    if not abs(mean - called.mean) <= allowed:
        raise Disagreement(
            f"model: samples {called.index.tolist()} of {called.name} have mean loss {called.mean:.7g} as you call the "
            f"model (eval mode, gradients enabled, {called.dtype}), but {mean:.7g} {how}; lossk needs both, so they "
            f"must agree to {allowed:.2g} nats, which is what rounding explains"
        )


def _check_finite(called: Called) -> None:
    bad = (~torch.isfinite(called.losses)).nonzero()
    if len(bad):
        row = int(bad[0])
        value = float(called.losses[row])
        raise ValueError(f"loss must be finite at the trained weights; {called.where(row)} has {value}")


def _same_mask(a: Tensor | None, b: Tensor | None) -> bool:
    return a is None or b is None or torch.equal(a.cpu(), b)


def _within(a: Tensor, b: Tensor, allowed: float) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= allowed).all())


def _check_alone(task: Task, samples: Samples, called: Called, rows: Tensor) -> None:
    """A sample's loss does not depend on the other samples of its batch."""
    count = len(called.index)
    if count < 2 or len(rows) == 0:
        return
    alone = torch.cat([task.rows(samples[called.index[i : i + 1]])[0] for i in range(count)])
    if len(alone) != len(rows):
        raise ValueError(
            "loss: the mask of a sample must not depend on the other samples of its batch, but evaluating "
            f"{count} samples one by one leaves {len(alone)} tokens, together {len(rows)}"
        )
    if not _within(alone, rows, called.allowed):
        raise ValueError(
            "loss of a sample must not depend on the other samples of its batch, but evaluating it alone changed it "
            f"by {float((alone - rows).abs().amax()):.3g} (largest loss {float(rows.abs().amax()):.3g})"
        )


def check_padding(task: Task, samples: Samples, name: str, size: float) -> None:
    """A sample's loss does not depend on what it was padded with; the task is entered, at w*.

    Args:
        size: relative error of a layer.

    Raises:
        ValueError: samples in the length of their own batch have another loss; the message says what was filled in.
    """
    if samples.padding is None:
        return
    order = samples.padding.by_share(samples.tree)
    index = order[spread(len(samples), FEW)]
    rows = task.rows(samples[index])[0]
    alone = torch.cat([task.rows(samples.alone(i))[0] for i in index.tolist()])
    allowed = rounding_of(task, samples, index, rows, size)
    if not _within(alone, rows, allowed):
        off = f"by {float((alone - rows).abs().amax()):.3g} nats" if len(alone) == len(rows) else "in what is masked"
        raise ValueError(
            f"{name}: the loss of a sample must not depend on its padding, but losses change {off} where batches of "
            f"different lengths are padded to the longest ({samples.padding}); rounding explains {allowed:.2g}. Have "
            "the model and the loss use an attention mask, or pad to a fixed length in collate_fn"
        )


def _check_follows(task: Task, samples: Samples, called: Called, begun: Attributes) -> None:
    """Where a model keeps something from pass to pass, its losses still follow its weights."""
    kept = begun.changed()
    if not kept:
        return
    with moved(task, MOVED, seed=0, whole=True):
        used = task.rows(samples[called.index])[0]
        begun.restore()
        fresh = task.rows(samples[called.index])[0]
    begun.restore()
    if not _within(used, fresh, called.allowed):
        raise ValueError(
            f"model must compute its losses from its weights at every pass, but it keeps {', '.join(kept[:4])} from an "
            f"earlier pass: after a move of the weights a loss is off by {float((used - fresh).abs().amax()):.3g}"
        )


def witness_of(task: Task, named: Mapping[str, Samples]) -> dict[str, Any]:
    """Losses at w*, in full precision, and by how much rounding may move them (`store.witness`); the task not entered.

    Args:
        named: the data sets as `prove` returned them.

    Returns:
        {"losses": {name: up to 64 of them}, "allowed": nats}, JSON-ready.
    """
    losses = {}
    with task:
        for name, samples in named.items():
            index = few_of(samples, fitting_batch(WITNESSES, task.loss.positions))
            rows = task.rows(samples[index])[0].cpu()
            losses[name] = rows[spread(len(rows), WITNESSES)].tolist()
    return {"losses": losses, "allowed": max(each.repeatable for each in task.called.values())}


# --- what rounding explains --------------------------------------------------------------------------------------


def rounding_of(task: Task, samples: Samples, index: Tensor, rows: Tensor, size: float) -> float:
    """Nats by which a loss may differ between two ways of running the model; the task is entered, at w*.

    Args:
        index: [k] the samples that are tried.
        rows: their losses.
        size: relative error of a layer.
    """
    largest = size * float(rows.abs().amax()) if len(rows) else 0.0
    for seed in range(REPEATS):
        with moved(task, size, seed), _rounded_outputs(task.network, size, seed):
            changed = task.rows(samples[index])[0]
        if changed.shape == rows.shape and len(rows):
            largest = max(largest, float((changed - rows).abs().nan_to_num(nan=0.0, posinf=0.0).amax()))
    return MARGIN * largest


@contextmanager
def _rounded_outputs(network: nn.Module, size: float, seed: int) -> Iterator[None]:
    """The outputs of a network's innermost modules off by a random relative error."""
    generators: dict[torch.device, torch.Generator] = {}

    def round_output(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.is_nested:
            return None
        generator = generators.setdefault(output.device, torch.Generator(output.device).manual_seed(seed))
        noise = torch.empty(output.shape, dtype=torch.float32, device=output.device).normal_(generator=generator)
        return (output * (1.0 + size * noise)).to(output.dtype)

    innermost = [] if is_compiled(network) else [m for m in network.modules() if not any(m.children())]
    plain = [module for module in innermost if not isinstance(module, torch.jit.ScriptModule)]
    handles = [module.register_forward_hook(round_output) for module in plain]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
