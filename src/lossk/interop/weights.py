"""The loss kernel of any sampler's draws: from the weights themselves, whoever made them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lossk.backends import resolve_backend
from lossk.kernel import LossKernel
from lossk.losses import LossFunction, resolve_loss
from lossk.probe import Probe, first_non_finite, prepare_probe
from lossk.reading import read_samples
from lossk.settings import CENTERINGS, check_choice
from lossk.task import Task
from lossk.timings import Progress
from lossk.torch_modes import own_modes
from lossk.traces import LossTraces

Weights = Mapping[str, Tensor] | Tensor


@own_modes()
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
            the same length. A state is a mapping of names to tensors, as `state_dict()` gives (what it leaves out stays
            as in `model`; buffers count), or a flat tensor [P] of all parameters in the order of `model.parameters()`.
            States are used one at a time, so that a generator may reuse its tensors.
        model: where the weights belong; in eval mode meanwhile, and given back bit-identical.
        loader: the N probe samples, as in `lossk.build_kernel`.
        loss, device, precision: as in `lossk.build_kernel`.
        centering: "chain" or "pooled".
        progress: show a progress bar on stderr.

    Returns:
        LossKernel in factor form, which takes 8 bytes per draw and sample while it is made and 4 afterwards.

    Raises:
        ValueError: a state that does not fit the model, a loss that is not finite, chains of unequal or less than two
            draws; naming chain and draw.
        TypeError: a state that is neither mapping nor tensor.
    """
    check_choice("centering", centering, CENTERINGS)
    task = Task(model, resolve_loss(loss), params=["*"], device=device, precision=precision)
    task.loss = resolve_loss(loss, resolve_backend("auto", task.device))
    with Progress(progress) as bar:
        samples = read_samples(loader, bar=bar)
        probe, _ = prepare_probe(task, {"": samples}, samples)
    with Progress(progress) as bar, task:
        bar.say(
            f"lossk: the losses of {len(probe)} {task.loss.unit} at each draw, {4 * len(probe) / 1e6:.2f} MB a draw"
        )
        put = WeightLoader(task)
        chains = [_chain(states, c, put, probe, bar) for c, states in enumerate(_chains(weights))]
    lengths = sorted({len(chain) for chain in chains})
    if len(lengths) != 1 or lengths[0] < 2:
        raise ValueError(f"weights must hold at least 2 draws per chain and as many in each, got {lengths}")
    meta = {"source": "weights", "loss": task.loss.name}
    return LossKernel.from_traces(LossTraces(torch.stack(chains), meta=meta, tokens=probe.tokens), centering=centering)


def _chains(weights: Iterable[Any]) -> list[Iterable[Weights]]:
    if isinstance(weights, Mapping | Tensor):
        raise TypeError(f"weights must be an iterable of weight states, got one {type(weights).__name__}")
    if isinstance(weights, list | tuple) and weights and not isinstance(weights[0], Mapping | Tensor):
        return list(weights)
    return [weights]


def _chain(states: Iterable[Weights], chain: int, put: WeightLoader, probe: Probe, bar: Progress) -> Tensor:
    """[draws, N] float32: the losses at each state."""
    total, rows = len(states) if isinstance(states, list | tuple) else 0, []
    bar.start(total)
    for draw, state in enumerate(states):
        try:
            put(state)
        except (ValueError, TypeError) as error:
            raise type(error)(f"weights of chain {chain}, draw {draw}: {error}") from error
        row = torch.empty(len(probe), dtype=torch.float32, device="cpu")
        probe.fill(put.task, row)
        bad = first_non_finite(row)
        if bad is not None:
            raise ValueError(f"chain {chain}, draw {draw}: {probe.describe(bad)} has loss {float(row[bad])}")
        rows.append(row)
        bar.update()
    return torch.stack(rows) if rows else torch.zeros(0, len(probe), dtype=torch.float32, device="cpu")


class WeightLoader:
    """Puts one state after the other into the model of an entered task that samples all parameters."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._buffers = [(name, buffer.clone()) for name, buffer in task.model.named_buffers()]

    @torch.no_grad()
    def __call__(self, state: Weights) -> None:
        """Put a state; what it leaves out is as it was in the model.

        Raises:
            ValueError, TypeError: it does not fit.
        """
        if isinstance(state, Tensor):
            if state.shape != (self.task.num_weights,):
                raise ValueError(f"a flat state must have shape [{self.task.num_weights}], got {list(state.shape)}")
            parts = zip(self.task.sampled, state.detach().split([p.numel() for p in self.task.sampled]), strict=True)
            pairs = [(p.data, part.view(p.shape)) for p, part in parts]
        elif isinstance(state, Mapping):
            pairs = list(self._pairs(state))
            self.task.reset()
            own = dict(self.task.model.named_buffers())
            pairs = [*((own[name], value) for name, value in self._buffers), *pairs]
        else:
            raise TypeError(
                f"a state must be a mapping of names to tensors or a flat tensor, got {type(state).__name__}"
            )
        for target, value in pairs:
            target.copy_(value)

    def _pairs(self, state: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(a tensor of the model, its new value) for each entry of a state."""
        model = self.task.model
        own = {name: p.data for name, p in model.named_parameters(remove_duplicate=False)}
        own |= dict(model.named_buffers(remove_duplicate=False))
        for name, value in state.items():
            target = own.get(name)
            if target is None:
                raise ValueError(f"the model has no parameter or buffer {name!r}")
            if target.shape != value.shape:
                raise ValueError(f"{name!r} must have shape {list(target.shape)}, got {list(value.shape)}")
            yield target, value.detach()
