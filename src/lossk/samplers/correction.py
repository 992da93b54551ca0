"""The noise that a step injects, less what its minibatch's own noise has put there already.

A minibatch gradient has noise of covariance (1/m - 1/n) S, S that of the gradients of single samples. In place of
sqrt(lr) eta a corrected step injects

    sqrt(lr) (eta - alpha lr n_beta^2 (1/m - 1/n) / 8  C_B eta),    C_B = 1/(m-1) sum_i (g_i - mean g) (g_i - mean g)'

with C_B the minibatch's own, unbiased estimate of S (S. J. Vollmer, K. C. Zygalakis, Y. W. Teh, "Exploration of the
(Non-)Asymptotic Bias and Variance of Stochastic Gradient Langevin Dynamics", JMLR 17, 2016, the modified SGLD; the
strength alpha is ours: `lossk.diagnostics.bias`). C_B is never formed. With s_i = sqrt(lr) g_i . eta, by how much the
step's noise moves loss i, drift and correction together are the drift of one weighted gradient,

    sum_i a_i g_i,    a_i = 1/m + alpha n_beta (1/m - 1/n) / (4 (m-1)) (s_i - mean s),

and s_i is a difference of losses: of sample i at w + sqrt(lr) eta and at w. A forward pass more, then, is all it costs.
Noise moves weights both ways: its sign in the difference alternates from step to step, whose errors of even order in
the move so cancel. With a control variate g_i stands for g_i(w) - g_i(w*), and s_i for the same difference of moves.

The differences are taken in float32 whatever the precision of the passes: half precision would not resolve them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lossk.data.data import Samples
from lossk.task.losses import Weights
from lossk.task.task import Task


@dataclass(frozen=True)
class Correction:
    """What a step tells its minibatch gradient of its noise.

    Args:
        move: [P] float32, sqrt(lr) eta: the noise that the step will add to the weights, or the opposite of it.
        strength: alpha n_beta, with the sign of `move`.
    """

    move: Tensor
    strength: float

    def weights(self, task: Task, train: Samples, index: Tensor, anchor_losses: Tensor | None = None) -> Weights:
        """The a_i of a minibatch: [m] float32, or, where its losses at w come with its gradient, a function of these.

        Args:
            index: [m] int64.
            anchor_losses: [m] float64, the minibatch's losses at w*, for the gradient with a control variate.
        """
        size, total = len(index), len(train)
        scale = self.strength * (1.0 / size - 1.0 / total) / (4.0 * (size - 1))
        here = task.flat.clone()
        try:
            ahead = self._moved(task, train, index)
            if anchor_losses is not None:
                task.reset()
                at_anchor = exact_losses(task, train, index) if task.precision else anchor_losses.to(ahead.device)
                ahead -= self._moved(task, train, index) - at_anchor
        finally:
            task.flat.copy_(here)

        def weigh(losses: Tensor) -> Tensor:
            moved = ahead - losses.double()
            return (1.0 / size + scale * (moved - moved.mean())).float()

        if task.precision is None and task.in_one_pass(index):
            return weigh
        return weigh(exact_losses(task, train, index))

    def _moved(self, task: Task, train: Samples, index: Tensor) -> Tensor:
        """[m] float64: the losses at a move from the present weights, which stay there."""
        task.flat.add_(self.move)
        return exact_losses(task, train, index)


def exact_losses(task: Task, train: Samples, index: Tensor) -> Tensor:
    """[m] float64: the minibatch's losses at the present weights, in float32 passes as large as its gradient's."""
    with torch.no_grad():  # and no autocast
        parts = [task.loss.singly(task.run_model, train[part]).double() for part in task.gradient_parts(index)]
    return torch.cat(parts)
