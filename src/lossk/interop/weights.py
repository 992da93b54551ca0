"""The loss kernel of any sampler's draws: from the weights themselves, whoever made them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossk.checks import check_choice, check_flag, check_instance, shown
from lossk.data.reading import read_samples
from lossk.interop.weight_states import OwnTensors, flat_value, is_state
from lossk.kernel.kernel import LossKernel
from lossk.kernel.traces import LossTraces
from lossk.probe.probe import Probe, first_non_finite, prepare_probe
from lossk.run.backends import resolve_backend
from lossk.settings import CENTERINGS
from lossk.task.losses import LossFunction, resolve_loss
from lossk.task.task import Task
from lossk.timings import Progress

Weights = Mapping[str, Any] | Tensor | np.ndarray


def kernel_from_weights(
    weights: Iterable[Any],
    model: nn.Module,
    loader: Any,
    *,
    loss: str | LossFunction = "cross_entropy",
    centering: str = "chain",
    device: str | torch.device | None = None,
    precision: str | None = None,
    progress: bool = True,
) -> LossKernel:
    """The loss kernel of given draws of the weights.

    Args:
        weights: an iterable of weight states, one chain; or a list (tuple) of such iterables, one per chain and all of
            the same length. A state is a mapping of names to tensors or arrays, as `state_dict()` gives (what it leaves
            out stays as in `model`; buffers count, `_extra_state` does not; prefixes that DDP, DataParallel or
            `torch.compile` put before names do not matter), or a flat tensor or array [P] of all parameters in the
            order of `model.parameters()`. States are used one at a time, so that a generator may reuse its tensors.
        model: where the weights belong; in eval mode meanwhile, and given back bit-identical.
        loader: the N probe samples, as in `lossk.build_kernel`.
        loss, device, precision: as in `lossk.build_kernel`.
        centering: "chain" or "pooled".
        progress: show a progress bar on stderr.

    Returns:
        LossKernel in factor form, which takes 8 bytes per draw and sample while it is made and 4 afterwards.

    Raises:
        ValueError: a state that does not fit the model or is not finite, tied weights that differ, a loss that is not
            finite, chains of unequal or less than two draws; naming chain and draw.
        TypeError: a state that is neither mapping nor tensor.
    """
    check_choice("centering", centering, CENTERINGS)
    check_instance("model", model, nn.Module)
    progress, given = check_flag("progress", progress), _chains(weights)
    _check_lengths([len(chain) for chain in given if isinstance(chain, list | tuple)])
    task = Task(model, resolve_loss(loss), params=["*"], device=device, precision=precision)
    task.use_loss(resolve_loss(loss, resolve_backend("auto", task.device)))
    gradients = torch.is_grad_enabled()
    with Progress(progress) as bar:
        samples = read_samples(loader, bar=bar)
        probe, _ = prepare_probe(task, {"": samples}, samples)
    with Progress(progress) as bar, task:
        bar.say(
            f"lossk: the losses of {len(probe)} {task.loss.unit} at each draw, {4 * len(probe) / 1e6:.2f} MB a draw"
        )
        put = WeightLoader(task)
        chains = [_chain(_in_mode(states, gradients), c, put, probe, bar) for c, states in enumerate(given)]
    _check_lengths([len(chain) for chain in chains])
    meta = {"source": "weights", "loss": task.loss.name}
    return LossKernel.from_traces(LossTraces(torch.stack(chains), meta=meta, tokens=probe.tokens), centering=centering)


def _chains(weights: Iterable[Any]) -> list[Iterable[Any]]:
    if is_state(weights):
        raise TypeError(f"weights must be an iterable of weight states, got one {type(weights).__name__}")
    if isinstance(weights, str | bytes | bytearray | type) or not isinstance(weights, Iterable):
        kind = type(weights).__name__
        raise TypeError(
            f"weights must be an iterable of weight states, or a list of such, got one {kind}: {shown(weights)}"
        )
    if not isinstance(weights, list | tuple) or not weights or is_state(weights[0]):
        return [weights]
    for c, chain in enumerate(weights):
        if is_state(chain) or isinstance(chain, str | bytes | bytearray | type) or not isinstance(chain, Iterable):
            raise TypeError(f"weights: chain {c} must be an iterable of weight states, got {type(chain).__name__}")
        if isinstance(chain, Iterator) and any(chain is other for other in weights[:c]):
            raise ValueError(f"weights: chain {c} is the same iterator as one before it, which leaves it nothing")
    return list(weights)


def _check_lengths(lengths: list[int]) -> None:
    """Of the chains, in order."""
    if len(set(lengths)) > 1 or any(length < 2 for length in lengths):
        raise ValueError(f"weights must hold at least 2 draws per chain and as many in each, got {lengths}")


def _in_mode(states: Iterable[Any], gradients: bool) -> Iterable[Any]:
    """The states; where they come from a generator, it runs with gradients on or off as its caller has them."""
    if isinstance(states, list | tuple):
        return states
    return _generated(iter(states), gradients)


def _generated(states: Iterator[Any], gradients: bool) -> Iterator[Any]:
    while True:
        with torch.set_grad_enabled(gradients):
            try:
                state = next(states)
            except StopIteration:
                return
        yield state


def _chain(states: Iterable[Weights], chain: int, put: WeightLoader, probe: Probe, bar: Progress) -> Tensor:
    """[draws, N] float32: the losses at each state."""
    total, rows = len(states) if isinstance(states, list | tuple) else 0, []
    bar.start(total)
    for draw, state in enumerate(states):
        row = torch.empty(len(probe), dtype=torch.float32, device="cpu")
        try:
            put(state)
        except (ValueError, TypeError) as error:
            raise type(error)(f"weights of chain {chain}, draw {draw}: {error}") from error
        probe.fill(put.task, row)
        bad = first_non_finite(row)
        if bad is not None:
            raise ValueError(f"weights of chain {chain}, draw {draw}: {probe.describe(bad)} has loss {float(row[bad])}")
        rows.append(row)
        bar.update()
    return torch.stack(rows) if rows else torch.zeros(0, len(probe), dtype=torch.float32, device="cpu")


class WeightLoader:
    """Puts one state after the other into the model of an entered task that samples all parameters."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._own = OwnTensors(task.model)
        self._buffers = [(name, buffer.clone()) for name, buffer in task.model.named_buffers()]

    @torch.no_grad()
    def __call__(self, state: Weights) -> None:
        """Put a state; what it leaves out is as it was in the model.

        Raises:
            ValueError, TypeError: it does not fit.
        """
        if isinstance(state, Tensor | np.ndarray):
            flat = flat_value(state, self.task.num_weights)
            parts = zip(self.task.sampled, flat.split([p.numel() for p in self.task.sampled]), strict=True)
            pairs = [(p.data, part.view(p.shape)) for p, part in parts]
        elif isinstance(state, Mapping):
            pairs = self._own.match(state)
            self.task.reset()
            own = dict(self.task.model.named_buffers())
            pairs = [*((own[name], value) for name, value in self._buffers), *pairs]
        else:
            hint = "; pass its state_dict()" if isinstance(state, nn.Module) else ""
            hint = "; load files with torch.load" if isinstance(state, str | bytes) else hint
            raise TypeError(
                f"a state must be a mapping of names to tensors or a flat tensor, got {type(state).__name__}{hint}"
            )
        for target, value in pairs:
            target.copy_(value)
