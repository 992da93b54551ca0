"""Coverage of nominal 95 % intervals: K_ij, K_ii, R_ij by every method, and scalars, on six problems and bare traces.

The law is known without sampling: weights are AR(1) normals about w*, each direction with a memory of its own, and the
losses are those of six models (linear, badly scaled linear, ReLU network, logistic, softmax, f = a b x); beside them
traces that are AR(1), sums of memories, squares and exponentials. The truth is that of 40,000 independent draws, whose
own error is a fifteenth of a run's. `coverage_table` is also what `bench.calibration` calls.

    python -m bench.calibration_errors --seeds 20
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lossk.accumulate.tiles import TileAccumulator
from lossk.diagnostics.information import Criteria, Estimate, lost_variance, mean_over_draws, reach_of_variance
from lossk.forms.blocks import FactorBlocks
from lossk.forms.centering import center, degrees_of_freedom, empty_moments, note
from lossk.forms.watched import Watched, watched_samples
from lossk.kernel.kernel import LossKernel

Array = np.ndarray
N, READ, CHAINS, DRAWS = 320, 24, 4, 200  # samples, those whose entries are read, chains, draws of each
EXACT, AT_A_TIME = 40_000, 4_000
METHODS = {"lag1": "tiles", "watched": "tiles", "products": "factor", "interval": "factor", "chains": "factor"}
T3 = 3.182446305284263  # 97.5 % quantile of Student's t with C - 1 degrees of freedom


def ar1(rng: np.random.Generator, shape: tuple[int, int, int], memory: Array) -> Array:
    """Normal AR(1) series [C, T, p] of unit variance, each of the last axis with its own memory."""
    noise, x = rng.standard_normal(shape), np.empty(shape)
    x[:, 0] = noise[:, 0]
    for t in range(1, shape[1]):
        x[:, t] = memory * x[:, t - 1] + np.sqrt(1 - memory**2) * noise[:, t]
    return x


def _softplus(z: Array) -> Array:
    return np.logaddexp(0.0, z)


def _networks(rng: np.random.Generator) -> dict[str, tuple[int, Callable[[Array], Array]]]:
    """name -> (weights, (w [..., p] in units of their deviation) -> losses [..., N])."""
    x, y = rng.standard_normal((N, 4)), rng.standard_normal(N)
    label, sign = rng.integers(0, 3, N), rng.choice([-1.0, 1.0], N)
    hidden, scales = rng.standard_normal((6, 5)), np.array([1.0, 0.3, 0.1, 0.03])
    first = rng.standard_normal((4, 6))

    def relu(w: Array) -> Array:
        inner = x @ (first + 0.2 * w[..., :24].reshape(*w.shape[:-1], 4, 6))
        return 0.5 * ((np.maximum(inner, 0) @ (hidden[:, 0] + 0.2 * w[..., 24:])[..., None])[..., 0] - y) ** 2

    def softmax(w: Array) -> Array:
        z = x @ (0.3 * w.reshape(*w.shape[:-1], 4, 3))
        z = z - z.max(axis=-1, keepdims=True)
        return np.log(np.exp(z).sum(axis=-1)) - z[..., np.arange(N), label]

    return {
        "linear": (4, lambda w: 0.5 * (0.2 * w @ x.T - y) ** 2),
        "ill-scaled linear": (4, lambda w: 0.5 * (w * scales @ x.T - y) ** 2),
        "ReLU network": (30, relu),
        "logistic": (4, lambda w: _softplus(-sign * (0.4 * w @ x.T))),
        "softmax": (12, softmax),
        "a b x": (2, lambda w: 0.5 * (0.5 * (w[..., :1] * w[..., 1:]) * x[:, 0] - y) ** 2),
    }  # fmt: skip


def _memories(rng: np.random.Generator, count: int) -> Array:
    return rng.choice([0.0, 0.3, 0.6, 0.9], count)


def problems(names: list[str] | None = None) -> dict[str, tuple[Callable[..., Array], Callable[..., Array]]]:
    """name -> (rng -> losses [C, T, N] of a run, (rng, k) -> losses [k, N] of independent draws)."""
    rng, found = np.random.default_rng(20), {}
    for name, (count, losses) in _networks(rng).items():
        memory = _memories(rng, count)
        found[name] = (
            lambda r, f=losses, m=memory: f(ar1(r, (CHAINS, DRAWS, len(m)), m)),
            lambda r, k, f=losses, p=count: f(r.standard_normal((k, p))),
        )
    laws: dict[str, tuple[tuple[float, ...], Callable[[Array], Array]]] = {
        "AR(0)": ((0.0,), lambda z: z),
        "AR(.5)": ((0.5,), lambda z: z),
        "AR(.9)": ((0.9,), lambda z: z),
        "AR(0) + AR(.9)": ((0.0, 0.9), lambda z: z),
        "z^2 of AR(.5)": ((0.5,), np.square),
        "exp(z / 2) of AR(.5)": ((0.5,), lambda z: np.exp(z / 2)),
    }
    for name, (memories, law) in laws.items():
        found[name] = (
            lambda r, m=memories, f=law: f(
                sum(ar1(r, (CHAINS, DRAWS, N), np.full(N, each)) for each in m) / len(m) ** 0.5
            ),
            lambda r, k, f=law: f(r.standard_normal((k, N))),
        )
    return {name: each for name, each in found.items() if names is None or name in names}


def _kernels(losses: Array) -> dict[str, LossKernel]:
    """Both forms of a run's kernel, without diagnostics."""
    given = torch.from_numpy(losses.astype(np.float32))
    moments, centered = empty_moments(CHAINS, DRAWS, N, "chain"), center(given, "chain")
    note(moments, slice(0, N), centered)
    tiles = TileAccumulator(N, 64, num_chains=CHAINS, num_draws=DRAWS)
    for chain, panel in enumerate(given):
        tiles.update(chain, panel)
    blocks, own = tiles.finalize()
    index = watched_samples(N, CHAINS * DRAWS)
    return {
        "factor": LossKernel(FactorBlocks(centered.factor, degrees_of_freedom(CHAINS, DRAWS, "chain")), moments),
        "tiles": LossKernel(blocks, own, watched=Watched(index, given[:, :, index])),
    }


def _scalars(losses: Array) -> dict[str, tuple[Estimate, float]]:
    """name -> (estimate, quantile that it is read with), of all samples as training set."""
    wide = torch.from_numpy(losses)
    within = wide.var(dim=1).sum(dim=1)
    likelihood = (torch.logsumexp(-wide, dim=1) - np.log(DRAWS)).sum(dim=1)
    mean = wide.mean(dim=2)
    lost = lost_variance(wide.mean(dim=1), wide.var(dim=1).mean(dim=0), DRAWS)
    reach = reach_of_variance(wide[:, :, watched_samples(N, CHAINS * DRAWS)])
    criteria = Criteria(within, likelihood, mean.mean(dim=1), N, N / np.log(N), DRAWS, lost, reach)
    draws, wbic = mean_over_draws(mean), criteria.wbic
    assert wbic is not None
    return {
        "mean loss, LLC": (draws, 1.96),
        "V, nu": (criteria.functional_variance, T3),
        "WAIC": (criteria.waic, T3),
        "WBIC": (wbic, T3),
    }


def _truth(draw: Callable[..., Array], rows: Array) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    parts = [draw(rng, AT_A_TIME) for _ in range(EXACT // AT_A_TIME)]
    losses = np.concatenate([part[:, rows] for part in parts])
    k = np.cov(losses.T)
    mean = float(np.mean([part.mean() for part in parts]))
    center = np.mean([part.mean(axis=0) for part in parts], axis=0)
    variance = float(np.mean([np.square(part - center).sum(axis=1).mean() for part in parts]))
    likelihood = float(np.log(np.mean([np.exp(-part).mean(axis=0) for part in parts], axis=0)).sum())
    n_beta = N / np.log(N)
    scalars = {"mean loss, LLC": mean, "V, nu": variance, "WBIC": mean * N,
               "WAIC": (n_beta / N * variance - likelihood) / N}  # fmt: skip
    return {"K": k, "R": np.corrcoef(losses.T), "scalars": scalars}


def coverage_table(seeds: int, names: list[str] | None = None) -> list[dict[str, Any]]:
    """Rows of problem, quantity, method, coverage, and the mean error over the spread of the runs' own estimates."""
    rows: list[dict[str, Any]] = []
    for problem, (run, draw) in problems(names).items():
        # Of the tiles' samples those are read whose traces are not kept.
        kept = set(watched_samples(N, CHAINS * DRAWS).tolist())
        read = np.array([i for i in range(N) if i not in kept])[:READ]
        truth, found = _truth(draw, read), {}
        for seed in range(seeds):
            losses = run(np.random.default_rng([seed, 1]))
            kernels = _kernels(losses)
            for method, form in METHODS.items():
                for letter in ("K", "R"):
                    kernel, correlation = kernels[form], letter == "R"
                    value = (kernel.correlation(read, read) if correlation else kernel[read, read]).double().numpy()
                    error = kernel.standard_error(read, read, correlation=correlation, method=method).double().numpy()
                    found.setdefault((letter, method), []).append((value, error))
            for name, (estimate, quantile) in _scalars(losses).items():
                given = np.array(estimate.value), np.array(estimate.se) * quantile / 1.96
                found.setdefault((name, "batches" if quantile < 2 else "chains"), []).append(given)
        for (quantity, method), runs in found.items():
            value, error = (np.stack(part) for part in zip(*runs, strict=True))
            if quantity in ("K", "R"):
                off = ~np.eye(len(read), dtype=bool)
                wide = T3 / 1.96 if method == "chains" else 1.0
                for label, where in (("ij", off), ("ii", ~off))[: 2 if quantity == "K" else 1]:
                    known = truth[quantity][where]
                    given = value[:, where], wide * error[:, where]
                    rows.append(_row(problem, f"{quantity}_{label}", method, *given, known))
            else:
                rows.append(_row(problem, quantity, method, value, error, truth["scalars"][quantity]))
    return rows


def _row(problem: str, quantity: str, method: str, value: Array, error: Array, truth: Any) -> dict[str, Any]:
    """Coverage of +- 1.96 errors, and the mean error over the root mean square of the runs' misses."""
    off = value - truth
    return {
        "problem": problem,
        "quantity": quantity,
        "method": method,
        "coverage": float((np.abs(off) <= 1.96 * error).mean()),
        "width": float(error.mean() / max(np.sqrt(np.square(off).mean()), 1e-300)),
    }


def section(rows: list[dict[str, Any]]) -> str:
    """Markdown: problems down, quantities and methods across; coverage in per cent."""
    kinds = list(dict.fromkeys((row["quantity"], row["method"]) for row in rows))
    cells = {(row["problem"], row["quantity"], row["method"]): row["coverage"] for row in rows}
    lines = ["| problem | " + " | ".join(f"{q} {m}" for q, m in kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        values = [cells.get((problem, *kind)) for kind in kinds]
        lines.append(f"| {problem} | " + " | ".join("" if v is None else f"{100 * v:.0f}" for v in values) + " |")
    return (
        'Coverage in per cent of nominal 95 % intervals: +- 1.96 errors, of "chains" +- 3.18 (Student\'s t with 3 '
        f"degrees of freedom); {CHAINS} chains of {DRAWS} draws.\n\n" + "\n".join(lines)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", nargs="+")
    given = parser.parse_args()
    print(section(coverage_table(given.seeds, given.only)))


if __name__ == "__main__":
    main()
