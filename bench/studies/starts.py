"""Chains that all start at w* beside chains dispersed by a Laplace step: what the verdict sees, and what is wrong.

python -m bench.studies.starts [--runs 20] [--out docs/samplers.md]

Without the engine's samplers: Langevin dynamics with averaged noise and full gradients, float64; the verdict is the
engine's. A Laplace step is a draw of N(w*, (n_beta H + localization)^-1), H the Hessian at w*; it costs a run most of
its curvature's eigenvectors. Truth: the same dynamics in 400 chains, dispersed, after 20 times the burn-in.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.machine import ROOT
from bench.markdown import replace_between, table
from lossk.diagnostics.diagnostics import Diagnostics, diagnose

MARKS = ("<!-- starts -->", "<!-- end of starts -->")
CHAINS, DRAWS, SAMPLES, N_BETA = 4, 100, 16, 15.0
REFERENCE, LONGER = 400, 20  # chains, and times the burn-in


@dataclass(frozen=True)
class Law:
    """What is sampled, and how well."""

    name: str
    losses: Callable[[Tensor], Tensor]  # [C, p] -> [C, n], nats
    w_star: Tensor  # [p]
    localization: float
    lr: float
    burnin: int  # steps
    spacing: int  # steps

    def force(self, w: Tensor) -> Tensor:
        w = w.detach().requires_grad_()
        pull = self.localization / 2 * (w - self.w_star).square().sum()
        return torch.autograd.grad(N_BETA * self.losses(w).mean(dim=1).sum() + pull, w)[0]


def laws() -> list[Law]:
    g = torch.Generator().manual_seed(0)
    x, e = torch.randn(60, 3, generator=g).double(), torch.randn(60, generator=g).double()
    e = e - x @ torch.linalg.lstsq(x, e.unsqueeze(1)).solution.squeeze(1)
    scales = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)
    side = torch.randn(60, generator=g).double()
    side = side - side.mean()

    def linear(w: Tensor) -> Tensor:
        return (w @ (x * scales).T - e).square() / 2

    def product(w: Tensor) -> Tensor:
        return (w.prod(dim=1, keepdim=True) * x[:, 0] - e).square() / 2

    def wells(height: float) -> Callable[[Tensor], Tensor]:
        return lambda w: height / N_BETA * (w.square() - 1).square() + 0.2 * side * (w - 1)

    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return [
        Law("linear, burned in", linear, zero, 1.0, 0.05, 120, 20),
        Law("linear, a twentieth of the burn-in", linear, zero, 0.1, 0.05, 50, 4),
        Law("f = a b x, burned in", product, zero[:2], 2.0, 0.02, 150, 25),
        Law("f = a b x, a twentieth of the burn-in", product, zero[:2], 0.5, 0.01, 46, 5),
        Law("two wells, barrier 2", wells(2.0), one, 0.05, 0.05, 200, 20),
        Law("two wells, barrier 4", wells(4.0), one, 0.05, 0.03, 300, 20),
        Law("two wells, barrier 8", wells(8.0), one, 0.05, 0.015, 600, 20),
    ]


def laplace(law: Law, count: int, generator: torch.Generator) -> Tensor:
    """[count, p] draws of the Gaussian at w*."""
    hessian = torch.autograd.functional.hessian(lambda w: N_BETA * law.losses(w.unsqueeze(0)).mean(), law.w_star)
    values, vectors = torch.linalg.eigh(hessian + law.localization * torch.eye(len(law.w_star), dtype=torch.float64))
    xi = torch.randn(count, len(law.w_star), generator=generator, dtype=torch.float64)
    return law.w_star + xi * values.clamp(min=law.localization).rsqrt() @ vectors.T


def sample(law: Law, w: Tensor, burnin: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(losses [C, T, n], |w - w*| [C, T])."""
    noise, losses, distance = torch.randn(w.shape, generator=generator, dtype=torch.float64), [], []
    for step in range(1, burnin + DRAWS * law.spacing + 1):
        fresh = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        w = w - law.lr / 2 * law.force(w) + law.lr**0.5 * (noise + fresh) / 2
        noise = fresh
        if step > burnin and (step - burnin) % law.spacing == 0:
            losses.append(law.losses(w))
            distance.append((w - law.w_star).norm(dim=1))
    return torch.stack(losses, dim=1), torch.stack(distance, dim=1)


def judged(losses: Tensor, distance: Tensor) -> Diagnostics:
    return diagnose(
        mean_loss=losses.mean(dim=2), watched=losses[..., :SAMPLES].float(), dead_share=0.0, noise_floor=None,
        excess=None, n_beta=None, criteria=None, pilot=None, sampler=None, distance=distance,
    )  # fmt: skip


def row(law: Law, runs: int) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    long, _ = sample(law, laplace(law, REFERENCE, generator), LONGER * law.burnin, generator)
    truth = float(long.flatten(0, 1).var(dim=0).sum())
    cells = [law.name]
    for start in (law.w_star.expand(CHAINS * runs, -1), laplace(law, CHAINS * runs, generator)):
        losses, distance = (part.unflatten(0, (runs, CHAINS)) for part in sample(law, start, law.burnin, generator))
        sizes = losses.var(dim=2).sum(dim=2).mean(dim=1) / truth
        found = [judged(*run) for run in zip(losses, distance, strict=True)]
        high = sum((one.rhat or 0.0) > 1.1 or (one.sample_rhat or 0.0) > 1.1 for one in found)
        words = ", ".join(f"{word} {count}" for word, count in Counter(one.verdict for one in found).most_common())
        off = sum(one.verdict == "good" and abs(float(size) - 1) > 0.3 for one, size in zip(found, sizes, strict=True))
        cells += [f"{float(sizes.median()):.2f}", f"{high}", words, f"{off}"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies.starts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "samplers.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    side = ["trace K / truth", "R-hat > 1.1", "verdicts", "good, off by 30 %"]
    text = table(["law", *(f"{start}: {head}" for start in ("from w\\*", "dispersed") for head in side)],
                 [row(law, options.runs) for law in laws()])  # fmt: skip
    options.out.write_text(replace_between(options.out.read_text(), MARKS, text))
    print(text)


if __name__ == "__main__":
    main()
