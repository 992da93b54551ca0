"""Models and data of the calibration, as a user gives them to `lossk.build_kernel`, each with its losses once more in
float64, written out here: what the truth is worked out from shares no code with the engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DECAY = 1e-4  # of the weights of a network that memorises, or they would grow without end
Losses = Callable[[Tensor], Tensor]  # weights [C, p] float64 -> losses [C, n], nats


@dataclass(frozen=True)
class Problem:
    """A model at w*, the data that are both training set and probe, and the same losses as plain float64."""

    name: str
    model: nn.Module
    data: tuple[Tensor, Tensor]
    loss: Any
    losses: Losses
    design: Tensor | None = None  # [n, p] float64, where the model is linear in its weights and the loss is a square
    product: bool = False  # f = a b x, whose law is known in closed form or by quadrature
    minimum: bool = True  # whether w* is a minimum of the training loss

    @property
    def w_star(self) -> Tensor:
        """[p] float64, what float32 holds."""
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).double()

    @property
    def n(self) -> int:
        return len(self.data[0])

    @property
    def n_beta(self) -> float:
        """n / ln n."""
        return self.n / math.log(self.n)


class Product(nn.Module):
    """f = a b x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[0] * self.weight[1] * x


class Blocks(nn.Module):
    """Independent linear models; the last input says which one."""

    def __init__(self, blocks: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(blocks, inputs, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :-1] * self.weight[x[:, -1].long()]).sum(dim=1, keepdim=True)


def _squares(design: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (w @ design.T - y).square()


def _products(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (w[:, :1] * w[:, 1:] * x - y).square()


def _outputs(sizes: tuple[int, ...], x: Tensor, w: Tensor) -> Tensor:
    """[C, n, outputs] of dense layers with ReLU between them, from flat weights in torch's order."""
    start, out = 0, x.expand(len(w), *x.shape)
    for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        matrix = w[:, start : start + inputs * outputs].view(-1, outputs, inputs)
        bias = w[:, start + inputs * outputs : start + (inputs + 1) * outputs]
        start += (inputs + 1) * outputs
        out = (out.clamp(min=0) if number else out) @ matrix.transpose(1, 2) + bias.unsqueeze(1)
    return out


def _network_losses(kind: str, sizes: tuple[int, ...], x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    out = _outputs(sizes, x, w)
    if kind == "mse":
        return (out[..., 0] - y).square()
    if kind == "logistic":
        return torch.logaddexp(out[..., 0], out.new_zeros(())) - y * out[..., 0]
    return out.logsumexp(dim=2) - out.gather(2, y.long().expand(len(w), -1).unsqueeze(2)).squeeze(2)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _linear(name: str, scales: tuple[float, ...], n: int, heavy: bool = False) -> Problem:
    generator = _generator(1)
    x = torch.randn(n, len(scales), generator=generator) * torch.tensor(scales)
    noise = torch.randn(n, generator=generator)
    if heavy:  # Student's t with 2 degrees of freedom
        noise = noise / (torch.randn(n, 2, generator=generator).square().sum(dim=1) / 2).sqrt()
    y = (x / torch.tensor(scales)) @ torch.randn(len(scales), generator=generator) + noise
    model = nn.Linear(len(scales), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x.double(), y.double().unsqueeze(1)).solution.T.float())
    design = x.double()
    return Problem(name, model, (x, y.unsqueeze(1)), "mse", partial(_squares, design, y.double()), design)


def _blocks(blocks: int = 40, rows: int = 10, inputs: int = 2) -> Problem:
    generator = _generator(2)
    x, y = torch.randn(blocks, rows, inputs, generator=generator), torch.randn(blocks, rows, 1, generator=generator)
    model = Blocks(blocks, inputs)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x.double(), y.double()).solution.squeeze(2).float())
    index = torch.arange(blocks).repeat_interleave(rows).unsqueeze(1)
    design = torch.block_diag(*x.double())
    data = torch.cat([x.flatten(0, 1), index.float()], dim=1), y.flatten(0, 1)
    return Problem("40 blocks", model, data, "mse", partial(_squares, design, y.double().flatten()), design)


def _product(name: str, slope: float, n: int) -> Problem:
    generator = _generator(3)
    x, e = torch.randn(2, n, generator=generator).double()
    e = e - x * (x @ e) / (x @ x)  # sum x e = 0
    x, y = x.float(), (slope * x + e).float()
    data = x.unsqueeze(1), y.unsqueeze(1)
    losses = partial(_products, x.double(), y.double())
    return Problem(name, Product(), data, "mse", losses, product=True, minimum=slope == 0)


def network(
    name: str, kind: str, sizes: tuple[int, ...], n: int, *, iterations: int, random: bool = False, seed: int = 4
) -> Problem:
    """A student of a teacher of the same shape, or of labels that mean nothing; no iterations leave it untrained."""
    generator = _generator(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.ReLU()] * bool(layers) + [nn.Linear(inputs, outputs)]
    model, x = nn.Sequential(*layers), torch.randn(n, sizes[0], generator=generator)
    count = sum(p.numel() for p in model.parameters())
    teacher = _outputs(sizes, x.double(), 0.7 * torch.randn(1, count, generator=generator).double())[0]
    if kind == "mse":
        y = (teacher[:, 0] + 0.5 * torch.randn(n, generator=generator)).float()
    elif kind == "logistic":
        y = (torch.rand(n, generator=generator) < teacher[:, 0].sigmoid()).float()
    elif random:
        y = torch.randint(sizes[-1], (n,), generator=generator)
    else:
        y = torch.multinomial(teacher.softmax(dim=1), 1, generator=generator)[:, 0]
    losses = partial(_network_losses, kind, sizes, x.double(), y.double())
    start = torch.cat([torch.randn(i * o + o, generator=generator) * i**-0.5 for i, o in itertools.pairwise(sizes)])
    w = _trained(losses, start.double(), iterations, DECAY * random).float()
    for parameter, part in zip(model.parameters(), w.split([p.numel() for p in model.parameters()]), strict=True):
        parameter.data.copy_(part.view_as(parameter))
    given = {"mse": "mse", "logistic": nn.BCEWithLogitsLoss(), "softmax": "cross_entropy"}[kind]
    data = x, y if kind == "softmax" else y.unsqueeze(1)
    return Problem(name, model, data, given, losses, minimum=iterations > 0)


def _trained(losses: Losses, w: Tensor, iterations: int, decay: float) -> Tensor:
    if not iterations:
        return w
    w = w.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        mean = losses(w.unsqueeze(0)).mean() + decay / 2 * w.square().sum()
        mean.backward()
        return mean

    optimizer.step(closure)
    return w.detach()


MAKERS: dict[str, Callable[[], Problem]] = {
    "linear": lambda: _linear("linear", (1.0,) * 5, 2000),
    "ill-scaled linear": lambda: _linear("ill-scaled linear", (0.1, 0.3, 1.0, 3.0, 10.0), 2000),
    "ReLU MLP": lambda: network("ReLU MLP", "mse", (3, 6, 1), 300, iterations=1000),
    "logistic": lambda: network("logistic", "logistic", (5, 1), 1000, iterations=200),
    "softmax": lambda: network("softmax", "softmax", (5, 3), 2000, iterations=200),
    "singular": lambda: _product("singular", 0.0, 400),
    "memorised": lambda: network("memorised", "softmax", (6, 8, 3), 60, iterations=300, random=True),
    "40 blocks": _blocks,
    "heavy-tailed": lambda: _linear("heavy-tailed", (1.0,) * 5, 1000, heavy=True),
    "untrained": lambda: network("untrained", "softmax", (5, 8, 3), 300, iterations=0),
    "saddle": lambda: _product("saddle", 0.5, 400),
    "small linear": lambda: _linear("small linear", (1.0,) * 5, 400),
    "small softmax": lambda: network("small softmax", "softmax", (4, 3), 400, iterations=200),
}  # fmt: skip


@cache
def problem(name: str) -> Problem:
    """One of the problems, made once."""
    return MAKERS[name]()


def curvature(of: Problem) -> np.ndarray:
    """Eigenvalues of the training loss's Hessian at w*, ascending."""
    hessian = torch.autograd.functional.hessian(lambda w: of.losses(w.unsqueeze(0)).mean(), of.w_star)
    return np.linalg.eigvalsh(hessian.numpy())


def gradient_variance(of: Problem) -> float:
    """The largest eigenvalue of the covariance of per-sample gradients at w*."""
    jacobian = torch.autograd.functional.jacobian(lambda w: of.losses(w.unsqueeze(0))[0], of.w_star)
    return float(np.linalg.eigvalsh(np.cov(jacobian.numpy().T, ddof=1))[-1])
