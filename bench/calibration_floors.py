"""Noise floors and `by_chance` where nothing is to be found: how often chance passes them, over what they promise.

Losses of exact laws, so that unrelated pairs are known: 40 blocks of losses with weights of their own (squared errors
of linear models whose weights are AR(1)), and z, exp(z), exp(2z), z^2 of independent AR(1) normals z, of one memory or
two. The laws of 400 rows are asked about 1,600 fresh samples besides, which are none of those that the laws were learnt
from; the formula about the 400 themselves. Beside them the power: the part of truly related pairs found at `by_chance`
below 0.1. Of the z twenty pairs have a correlation of 0.6; within blocks all pairs are related.

    python -m bench.calibration_floors --seeds 8
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

import lossk
from lossk.kernel.chance import Chance, LagLaws, RowLaws

N, BLOCKS, PAIRS, RELATED = 400, 40, 20, 0.6
LEVELS = (0.1, 0.01, 0.001)  # of by_chance
MIXED = np.where(np.arange(N) % 4 < 2, 0.0, 0.98)  # both samples of a pair have the same memory
Array = np.ndarray
CASES: dict[str, tuple[Any, Any]] = {
    "blocks": (None, None),
    "z": (0.0, lambda z: z),
    "exp(z)": (0.0, np.exp),
    "exp(2z)": (0.0, lambda z: np.exp(2 * z)),
    "z^2": (0.0, np.square),
    "exp(z), AR(.9)": (0.9, np.exp),
    "exp(2z), AR(.9)": (0.9, lambda z: np.exp(2 * z)),
    "z^2, AR(.9)": (0.9, np.square),
    "z, half AR(.98)": (MIXED, lambda z: z),
    "exp(z), half AR(.98)": (MIXED, np.exp),
    "z, AR(.98)": (0.98, lambda z: z),
}
SIZES = ((2, 400), (4, 200), (8, 50), (2, 60))  # chains, draws
FRESH = 4  # times as many unrelated samples


def losses_of(case: str, rng: np.random.Generator, chains: int, draws: int) -> tuple[Array, Array]:
    """Losses [C, T, N] float32, and which pairs [N, N] are related (a sample to itself too)."""
    memory, law = CASES[case]
    if law is None:
        of_block = np.arange(N) // (N // BLOCKS)
        return _blocks(rng, chains, draws), of_block[:, None] == of_block
    z, related = _ar1(rng, (chains, draws, N), memory), np.eye(N, dtype=bool)
    for i in range(0, 2 * PAIRS, 2):
        z[:, :, i + 1] = RELATED * z[:, :, i] + (1 - RELATED**2) ** 0.5 * z[:, :, i + 1]
        related[i, i + 1] = related[i + 1, i] = True
    return law(z).astype(np.float32), related


def _blocks(rng: np.random.Generator, chains: int, draws: int) -> Array:
    size, weights = N // BLOCKS, 3
    memory = np.repeat(rng.choice([0.0, 0.3, 0.6, 0.9], BLOCKS), weights)
    w = _ar1(rng, (chains, draws, BLOCKS * weights), memory).reshape(chains, draws, BLOCKS, weights)
    x, y = rng.standard_normal((BLOCKS, size, weights)), 0.3 * rng.standard_normal((BLOCKS, size))
    output = np.einsum("ctbk,bnk->ctbn", w, x)
    return (0.5 * np.square(output - y)).reshape(chains, draws, N).astype(np.float32)


def _ar1(rng: np.random.Generator, shape: tuple[int, int, int], memory: Any) -> Array:
    rho = np.broadcast_to(np.asarray(memory, dtype=np.float64), shape[2:])
    z = rng.standard_normal(shape)
    for t in range(1, shape[1]):
        z[:, t] = rho * z[:, t - 1] + np.sqrt(1 - rho**2) * z[:, t]
    return z


def measure(case: str, chains: int, draws: int, seed: int) -> dict[str, Array]:
    """By way: unrelated ones above the floor and below each level, over the promised; the related ones' share found."""
    rng = np.random.default_rng([seed, chains, draws])
    losses, related = losses_of(case, rng, chains, draws)
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(torch.from_numpy(losses)))
    moments, rows = kernel.contents.moments, torch.arange(N)
    r = torch.from_numpy(kernel.to_numpy(correlation=True)).clamp(max=1 - 1e-7)
    laws: dict[str, RowLaws | LagLaws] = {
        "formula": LagLaws(moments, rows, moments.variance > 0, N),
        "rows": Chance(kernel.contents.blocks, moments, kernel._watched).of(rows),
        "watched": Chance(None, moments, kernel._watched).of(rows),
    }
    more = np.concatenate([losses_of(case, rng, chains, draws)[0] for _ in range(FRESH)], axis=2)
    fresh = torch.from_numpy(_unit(losses).T @ _unit(more)).clamp(max=1 - 1e-7)
    real, promised = related & ~np.eye(N, dtype=bool), (~related).sum() / (N - 1)
    found = {}
    for way, law in laws.items():
        chance, floor = (N - 1) * law.share_above(r, rows.expand(N, N)).numpy(), law.floor().unsqueeze(1)
        power = float((chance[real] < LEVELS[0]).mean())
        if way == "formula":
            passes = float(((r > floor).numpy() & ~related).sum() / promised)
            below = [float(((chance < level) & ~related).sum() / promised / level) for level in LEVELS]
        else:
            passes = float((fresh > floor).double().mean()) * (N - 1)
            chance = (N - 1) * law.share_above(fresh, torch.zeros_like(fresh, dtype=torch.int64)).numpy()
            below = [float((chance < level).mean()) * (N - 1) / level for level in LEVELS]
        found[way] = np.array([passes, *below, power])
    return found


def _unit(losses: Array) -> Array:
    """[C T, N], each chain centered, of length 1."""
    centered = (losses - losses.mean(axis=1, keepdims=True)).reshape(-1, losses.shape[2])
    return centered / np.linalg.norm(centered, axis=0)


def floors_table(seeds: int, cases: tuple[str, ...] = tuple(CASES)) -> list[dict[str, Any]]:
    """A row for each case, size and way: means over seeds."""
    rows = []
    for case in cases:
        for chains, draws in SIZES:
            each = [measure(case, chains, draws, seed) for seed in range(seeds)]
            for way in each[0]:
                mean = np.mean([one[way] for one in each], axis=0)
                names = ("floor", *(f"by_chance < {level}" for level in LEVELS), "found")
                values = dict(zip(names, mean.tolist(), strict=True))
                rows.append({"losses": case, "draws": f"{chains} x {draws}", "way": way, **values})
    return rows


def section(rows: list[dict[str, Any]]) -> str:
    """A line for each case and size."""
    names = [name for name in rows[0] if name not in ("losses", "draws", "way")]
    what = (
        'How often unrelated samples pass, over what is promised, by three ways: "formula / rows / watched"; and the '
        "part of related pairs found at by_chance < 0.1 (the formula's is bought with false ones)."
    )
    lines = [what, "", "| losses | draws | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for start in range(0, len(rows), 3):
        three = rows[start : start + 3]
        cells = [" / ".join(f"{row[name]:.{2 if row[name] < 10 else 0}f}" for row in three) for name in names]
        lines.append(f"| {three[0]['losses']} | {three[0]['draws']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--case", action="append", choices=list(CASES))
    options = parser.parse_args()
    print(section(floors_table(options.seeds, tuple(options.case or CASES))))
