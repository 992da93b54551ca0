"""Kinds of models and losses as users have them, and what is shown of each: its kernel is right, itself unharmed.

The truth is plain torch: a twin of the model in eval mode, in float64, its losses written out by hand.

- *draws*: `kernel_from_weights` of some weight states near w* against the twin that loads the same states.
- *steps*: `sample_losses` of a chain whose noise is 1e-7 a step against gradient descent on the twin: SGLD's drift is
  lr n_beta / 2 times the full-batch gradient, so that losses, gradients and the weights they move are all compared.
- *build*: `build_kernel` of the same steps, with norms folded and ragged batches, against the twin's covariances.
- *world*: after each call the model, the data and the process are as they were, and the user's next training step does
  to the model what it does to one that lossk has never seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossk
from kind_world import World, bits
from lossk.interop.weights import kernel_from_weights

HandLoss = Callable[[nn.Module, Any], Tensor]
State = dict[str, Tensor]

PASSES = lossk.Passes(probe_batch=5, gradient_batch=7, fold_norms=True)
NUM_STATES = 5
NUM_STEPS = 4
RATE = 0.1  # of gradient descent
NOISE = 1e-7  # of a weight in a step, where steps are compared: about what rounding does to it


def seed(number: int) -> None:
    """The CPU's stream alone: `torch.manual_seed` asks every kind of device, which takes longer than a model here."""
    torch.default_generator.manual_seed(number)


def apply(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """[B], by hand."""
    inputs, targets = batch
    logits = apply(model, inputs)
    return F.cross_entropy(getattr(logits, "logits", logits), targets, reduction="none")


@dataclass(frozen=True)
class Kind:
    """A model, the data it takes and its loss.

    Attributes:
        make: a new model; the same weights at every call after `torch.manual_seed`.
        data: new data, one batch.
        loss: what lossk is given.
        hand: the same losses in plain torch, one number a row of the kernel.
        exact: of the twin; float32 where part of the model is that whatever it is cast to.
        bound: of a loss, nats: float32's rounding through a few layers, against float64.
        used: whether the user has trained it, and so called it, before lossk does.
    """

    make: Callable[[], nn.Module]
    data: Callable[[], Any]
    loss: Any = "cross_entropy"
    hand: HandLoss = cross_entropy
    exact: torch.dtype = torch.float64
    bound: float = 1e-5
    used: bool = True

    def model(self) -> nn.Module:
        """As a user has it: in training mode and, where `used`, with two steps of training behind it and gradients."""
        seed(1)
        model = self.make()
        model.train()
        for _ in range(2 * self.used):
            self.train_step(model)
        return model

    def train_step(self, model: nn.Module) -> None:
        seed(2)
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(weights, lr=RATE)
        optimizer.zero_grad()
        self.hand(model, self.batch()).mean().backward()
        optimizer.step()

    def batch(self) -> Any:
        with torch.random.fork_rng(devices=[]):
            seed(3)
            return self.data()

    def twin(self) -> tuple[nn.Module, Any]:
        """The same model in eval mode, and the data, both as exact as can be."""
        model = self.model().eval()
        if any(p.dtype != self.exact for p in model.parameters()):  # `to` would make complex buffers real
            model = model.to(self.exact)
        return model, cast(self.batch(), self.exact)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, Mapping):
        return {name: cast(value, dtype) for name, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(cast(value, dtype) for value in tree)
    return tree.to(dtype) if tree.is_floating_point() else tree


def weights_near(model: nn.Module) -> list[State]:
    """Weight states around the model's own, trainable weights moved by about a tenth of their size."""
    generator = torch.Generator().manual_seed(5)
    states = []
    for _ in range(NUM_STATES):
        state = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator).to(p.dtype)
                state[name] = p.detach() + noise * (0.1 * p.detach().abs().mean() + 0.02)
        states.append(state)
    return states


def losses_at(kind: Kind, states: list[State]) -> np.ndarray:
    """[T, N] float64: the twin's losses at each state."""
    model, batch = kind.twin()
    own = dict(model.named_parameters())
    rows = []
    with torch.no_grad():
        for state in states:
            for name, value in state.items():
                own[name].copy_(value)
            rows.append(kind.hand(model, batch).double().numpy())
    return np.stack(rows)


def losses_of_descent(kind: Kind) -> np.ndarray:
    """[T, N] float64: the twin's losses after each step of gradient descent."""
    model, batch = kind.twin()
    weights = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for _ in range(NUM_STEPS):
        model.zero_grad()
        kind.hand(model, batch).mean().backward()
        with torch.no_grad():
            for p in weights:
                if p.grad is not None:
                    p -= RATE * (p.grad.to_dense() if p.grad.is_sparse else p.grad)
            rows.append(kind.hand(model, batch).double().numpy())
    return np.stack(rows)


def assert_kernel_of(kernel: lossk.LossKernel, losses: np.ndarray, bound: float) -> None:
    """A kernel against the covariance of losses [T, N], each of which may be off by `bound`."""
    assert kernel.num_samples == losses.shape[1]
    deviation = losses.std(axis=0, ddof=1)
    assert np.median(deviation) > 20 * bound, "nothing would be shown: the losses hardly vary"
    assert np.abs(kernel.mean_loss.double().numpy() - losses.mean(axis=0)).max() <= bound
    error = np.abs(kernel.to_numpy() - np.cov(losses, rowvar=False))
    # Deviations off by 2 bounds put a covariance off by as much times the other's deviation, from either side.
    assert np.all(error <= 4 * bound * (deviation[:, None] + deviation + bound))


def descent() -> lossk.SGLD:
    """SGLD that is gradient descent at RATE, but for NOISE."""
    return lossk.SGLD(
        lr=NOISE**2,
        n_beta=2 * RATE / NOISE**2,
        localization=0.0,
        batch_size=None,
        num_burnin_steps=0,
        num_steps_bw_draws=1,
    )


def short() -> lossk.SGLD:
    return lossk.SGLD(lr=1e-4, n_beta=20.0, localization=5.0, batch_size=4, num_burnin_steps=1, num_steps_bw_draws=1)


def check_draws(kind: Kind) -> None:
    model, batch = kind.model(), kind.batch()
    states = weights_near(model)
    exact = losses_at(kind, states)
    world = World(model, data=batch)
    kernel = kernel_from_weights(states, model, batch, loss=kind.loss, progress=False)
    assert_kernel_of(kernel, exact, kind.bound)
    world.assert_same()


def check_steps(kind: Kind) -> None:
    model, batch, exact = kind.model(), kind.batch(), losses_of_descent(kind)
    moved = np.abs(exact[-1] - exact[0])
    assert np.median(moved) > 50 * kind.bound, "nothing would be shown: the losses hardly move"
    world = World(model, data=batch)
    traces = lossk.sample_losses(
        model, batch, loss=kind.loss, sampler=descent(), num_chains=1, num_draws=NUM_STEPS, progress=False
    )
    error = np.abs(traces.losses[0].double().numpy() - exact).max()
    assert error <= 3 * kind.bound  # rounding adds up over steps
    world.assert_same()


def check_build(kind: Kind) -> None:
    model, untouched, batch, exact = kind.model(), kind.model(), kind.batch(), losses_of_descent(kind)
    settings: dict[str, Any] = {"sampler": descent(), "num_chains": 1, "num_draws": NUM_STEPS, "passes": PASSES}
    world = World(model, data=batch)
    kernel = lossk.build_kernel(model, batch, loss=kind.loss, tile=16, progress=False, **settings)
    assert_kernel_of(kernel, exact, 3 * kind.bound)
    world.assert_same()
    for each in (model, untouched):
        kind.train_step(each)
    for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
        assert bits(p) == bits(q), "the user's training goes on in another way"


def check(kind: Kind) -> None:
    """Draws, steps, build and world."""
    check_draws(kind)
    check_steps(kind)
    check_build(kind)
