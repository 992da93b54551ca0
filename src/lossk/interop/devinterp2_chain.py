"""The chain that devinterp 2's `sample()` asks for, by lossk's step, with what it keeps of every step.

    w <- clamp( w - (lr/2) M G [ n_beta g + localization (w - w*) + weight_decay w ] + sqrt(lr) M sqrt(G) sigma xi )

with M the 0/1 mask of the weights to sample and the clamp to a box around w*. In terms of `lossk.ops.sgld_step` the
pull to w* and the decay are one pull, of strength localization + weight_decay, to their weighted mean
localization / (localization + weight_decay) w*; and noise of standard deviation sigma is a step of lr sigma^2 with both
forces divided by sigma^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lossk.data.minibatches import Minibatches
from lossk.errors import DivergedError
from lossk.interop.devinterp2_loss import TokenLoss
from lossk.ops.philox import normals
from lossk.ops.sgld_step import sgld_step
from lossk.samplers.chain import Surroundings
from lossk.samplers.sgld import SGLD
from lossk.samplers.stepping import SteppingChain

INITIAL_NOISE_STEP = 2**32 - 1  # of the noise stream: a step that no chain reaches


@dataclass(frozen=True, kw_only=True)
class Law:
    """What devinterp's settings say beyond those of `lossk.SGLD`."""

    weight_decay: float = 0.0
    noise_level: float = 1.0
    bounding_box_size: float | None = None
    init_noise: float | None = None
    alpha: float = 0.99  # of the RMSprop preconditioner, with `stability`
    stability: float = 0.1
    shuffle: bool = True
    same_minibatches: bool = True  # in every chain
    masks: dict[str, Tensor] = field(default_factory=dict)  # parameter -> which of its elements move; bool


class InOrder:
    """Minibatches of consecutive samples, round and round."""

    def __init__(self, num_samples: int, batch_size: int) -> None:
        self.num_samples, self.batch_size = num_samples, batch_size

    def __getitem__(self, step: int) -> Tensor:
        return (torch.arange(self.batch_size, device="cpu") + step * self.batch_size) % self.num_samples


class StepLog:
    """The token losses and tokens of every step's minibatch, of all chains."""

    def __init__(self, num_chains: int, num_steps: int, batch_size: int, positions: int) -> None:
        self.losses = torch.zeros(num_chains, num_steps, batch_size, positions, dtype=torch.float32, device="cpu")
        self.input_ids = torch.zeros(num_chains, num_steps, batch_size, positions + 1, dtype=torch.int64, device="cpu")

    @staticmethod
    def nbytes(num_chains: int, num_steps: int, batch_size: int, positions: int) -> int:
        """What it will hold."""
        return num_chains * num_steps * batch_size * (4 * positions + 8 * (positions + 1))


class LoggedChain(SteppingChain):
    """One such chain from w*."""

    def __init__(
        self, around: Surroundings, sampler: SGLD, chain: int, *, law: Law, loss: TokenLoss, log: StepLog
    ) -> None:
        super().__init__(around, sampler, chain, control_variate=False)
        self.sampler, self.law, self.loss, self.log = sampler, law, loss, log
        n, size = len(around.train), self.force.minibatches.batch_size
        if not law.shuffle:
            self.force.minibatches = InOrder(n, size)  # type: ignore[assignment]
        elif law.same_minibatches:
            self.force.minibatches = Minibatches(n, size, seed=around.seed, chain=0)
        self.pull = self.localization + law.weight_decay
        self.center = self.task.anchor * (self.localization / self.pull if self.pull else 0.0)
        self.moves = self._mask() if law.masks else None

    @property
    def reach(self) -> float:
        return math.sqrt(float(self.sampler.lr))

    def _mask(self) -> Tensor:
        """[P] bool, in the order of `flat`."""
        parts = []
        for name, parameter in zip(self.task.names, self.task.sampled, strict=True):
            mask = self.law.masks.get(name)
            whole = torch.ones(parameter.shape, dtype=torch.bool, device="cpu")
            parts.append((whole if mask is None else mask.expand(parameter.shape)).to(self.task.device))
        return self.task.flatten(parts)

    def begin(self) -> None:
        if self.sampler.preconditioner is not None:
            self.carried["square_avg"] = torch.zeros_like(self.task.flat)
        if self.law.init_noise:
            flat = self.task.flat
            noise = normals(self.around.seed, self.chain, INITIAL_NOISE_STEP, flat.numel()).to(flat.device)
            flat.add_(noise, alpha=self.law.init_noise)
            self._hold_masked()

    def _hold_masked(self) -> None:
        if self.moves is not None:
            torch.where(self.moves, self.task.flat, self.task.anchor, out=self.task.flat)

    def advance(self) -> float:
        self.loss.parts.clear()
        excess = self.gradient(self.step)
        self._record()
        square = self.law.noise_level**2
        with self.around.timings.measure("step"):
            sgld_step(
                self.task.flat,
                self.task.grad,
                self.center,
                lr=float(self.sampler.lr) * square,
                n_beta=self.n_beta / square,
                localization=self.pull / square,
                seed=self.around.seed,
                chain=self.chain,
                step=self.step,
                backend=self.around.backend,
                square_avg=self.carried.get("square_avg"),
                alpha=self.law.alpha,
                stability=self.law.stability,
            )
            self._hold_masked()
            if self.law.bounding_box_size is not None:
                box, anchor = self.law.bounding_box_size, self.task.anchor
                self.task.flat.clamp_(min=anchor - box, max=anchor + box)
        self.step += 1
        return excess

    def _record(self) -> None:
        index = self.force.minibatches[self.step]
        self.log.losses[self.chain, self.step] = torch.cat(self.loss.parts).cpu()
        self.log.input_ids[self.chain, self.step] = self.around.train.tree["input_ids"][index].cpu()

    def diverged(self, what: str) -> DivergedError:
        lr = float(self.sampler.lr)
        return DivergedError(
            f"chain {self.chain} diverged at step {self.step}: {what}; devinterp would go on and leave NaN; "
            f"try lr={lr / 8:.2g} instead of {lr:.2g}, or a larger localization than {self.localization:.3g}"
        )
