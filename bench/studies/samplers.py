"""The samplers at one and the same law: what an effective draw costs, and whether the kernel is the right one.

    python -m bench.studies.samplers [--out docs/samplers.md] [--seconds 2] [--seed 1]

Every sampler of p(w) ~ exp(-n_beta L_n - localization/2 |w - w*|^2) is given the same n_beta and localization and
chooses the rest itself. An effective draw is one of arviz's bulk ESS; its cost counts steps and probe passes after
burn-in, by the run's own timings. Correlations with a reference kernel show a law that is fast but wrong.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lossk
from bench.oracle_problems import Array, closed, float32
from lossk import provenance
from lossk.recipes import digits

CHAINS = 2
FEWEST, MOST = 20, 2000  # draws per chain
PROBE = 300  # samples of the digits' kernel


@dataclass(frozen=True)
class Case:
    """A problem, its law, and what the kernel should be."""

    title: str
    arguments: dict[str, Any]  # of sample_losses
    n_beta: float
    localization: float
    reference: tuple[str, Array]  # (how it was made, K [N, N])


@dataclass(frozen=True)
class Result:
    name: str
    steps: int  # per draw
    burnin: int
    draws: int
    milliseconds: float  # per draw, steps and probe
    sample_ess: float  # median sample
    mean_ess: float  # mean loss
    k_correlation: float  # with the reference's K, entries on and above the diagonal
    r_correlation: float  # with its R, entries above the diagonal
    trace_ratio: float

    @property
    def cost(self) -> float:
        """Milliseconds per effective draw of the median sample."""
        return self.milliseconds * self.draws / self.sample_ess


def samplers(n_beta: float, localization: float, batch_size: int, hmc: Sequence[lossk.HMC]) -> dict[str, Any]:
    law: dict[str, Any] = {"n_beta": n_beta, "localization": localization}
    sgld = {**law, "batch_size": batch_size}
    return {
        "SGLD": lossk.SGLD(**sgld, integrator="euler", control_variate=False),
        "SGLD, control variate": lossk.SGLD(**sgld, integrator="euler", control_variate=True),
        "SGLD, averaged noise": lossk.SGLD(**sgld, integrator="leimkuhler-matthews", control_variate=False),
        "SGLD, averaged noise, control variate": lossk.SGLD(
            **sgld, integrator="leimkuhler-matthews", control_variate=True
        ),
        "SGLD, rmsprop": lossk.SGLD(**sgld, preconditioner="rmsprop", control_variate=False),
        "SGLD, rmsprop-frozen": lossk.SGLD(**sgld, preconditioner="rmsprop-frozen", control_variate=False),
        "BAOAB": lossk.BAOAB(**sgld),
        "BAOAB, full gradient": lossk.BAOAB(**law, batch_size=None),
        "Laplace, kronecker": lossk.Laplace(**law),
        "Laplace, diagonal": lossk.Laplace(**law, structure="diagonal"),
        "Gaussian": lossk.Gaussian(sigma=localization**-0.5),
        **{("MALA" if s.num_leapfrog_steps == 1 else "HMC"): s for s in hmc},
    }


def measure(name: str, sampler: Any, case: Case, seconds: float, seed: int) -> Result:
    """One sampler for about `seconds` of drawing, burn-in not counted."""

    def run(draws: int) -> tuple[lossk.LossTraces, float, int, int]:
        traces = lossk.sample_losses(
            **case.arguments, sampler=sampler, num_chains=CHAINS, num_draws=draws, seed=seed, progress=False
        )
        spent, used = traces.meta["timings"], traces.meta["sampler"]
        burnin, steps = used.get("num_burnin_steps", 0), used.get("num_steps_bw_draws", 1)
        moves = CHAINS * (burnin + draws * steps)
        stepping = (spent.get("gradient", 0.0) + spent.get("step", 0.0)) / moves * steps
        return traces, stepping + spent["probe"] / (CHAINS * draws), steps, burnin

    _, each, _, _ = run(4)
    draws = int(np.clip(seconds / CHAINS / each, FEWEST, MOST))
    traces, each, steps, burnin = run(draws)
    kernel = lossk.LossKernel.from_traces(traces)
    found = kernel.diagnostics
    assert found is not None
    assert found.ess is not None
    assert found.sample_ess is not None
    k, truth = kernel.to_numpy().astype(np.float64), case.reference[1]
    on, above = np.triu_indices(len(k)), np.triu_indices(len(k), 1)
    return Result(
        name, steps, burnin, CHAINS * draws, 1e3 * each, found.sample_ess, found.ess,
        float(np.corrcoef(k[on], truth[on])[0, 1]),
        float(np.corrcoef(closed.correlation(k)[above], closed.correlation(truth)[above])[0, 1]),
        float(np.trace(k) / np.trace(truth)),
    )  # fmt: skip


def quadratic() -> tuple[Case, list[lossk.HMC]]:
    """Linear regression in 20 weights, curvatures over four decades, anchored at the fit; K is T1's."""
    rng = np.random.default_rng(5)
    scales = np.geomspace(3, 0.03, 20)
    n, n_beta, gamma = 600, 600 / np.log(600), 5.0
    x, probe = (float32(rng.standard_normal((rows, 20)) * scales) for rows in (n, 60))
    w = rng.standard_normal(20)
    y, answer = (float32(rows @ w + 0.5 * rng.standard_normal(len(rows))) for rows in (x, probe))
    fit = np.linalg.lstsq(x, y, rcond=None)[0]
    model = nn.Linear(20, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(fit)[None])
    a = closed.posterior_precision(x, 2 * n_beta, gamma)  # "mse" has no factor 1/2
    truth = 4 * closed.regression_covariance(probe, answer - probe @ fit, np.linalg.inv(a))
    step = float(1 / np.sqrt(np.linalg.eigvalsh(a)[-1]))
    arguments = {
        "model": model,
        "loader": (torch.tensor(probe).float(), torch.tensor(answer).float()),
        "train": (torch.tensor(x).float(), torch.tensor(y).float()),
        "loss": "mse",
    }
    title = f"Linear regression, 20 weights, n = {n}, condition number of A {np.linalg.cond(a):.0f}"
    case = Case(title, arguments, n_beta, gamma, ("T1, exact", truth))
    exact = {"n_beta": n_beta, "localization": gamma}
    hmc = lossk.HMC(step_size=step, num_leapfrog_steps=25, num_burnin_steps=20, **exact)
    mala = lossk.HMC(step_size=0.7 * step, num_leapfrog_steps=1, num_burnin_steps=1000, num_steps_bw_draws=50, **exact)
    return case, [hmc, mala]


def digits_case(seconds: float, seed: int) -> Case:
    """The digits network at the law that SGLD's pilot picks; the reference is BAOAB with the full gradient."""
    task = digits.make_task(seed=0)
    probe = tuple(part[:: len(part) // PROBE + 1] for part in task.samples)
    arguments = {"model": task.model, "loader": probe, "train": task.train, "loss": "cross_entropy"}
    pilot = lossk.sample_losses(**arguments, num_chains=1, num_draws=2, sampler=lossk.SGLD(num_burnin_steps=0,
        num_steps_bw_draws=1), progress=False)  # fmt: skip
    law = {key: pilot.meta["sampler"][key] for key in ("n_beta", "localization")}
    blank = Case("", arguments, reference=("", np.eye(len(probe[0]))), **law)
    full = lossk.BAOAB(**law, batch_size=None)
    each = measure("", full, blank, 0.0, seed).milliseconds / 1e3
    draws = int(np.clip(seconds / CHAINS / each, FEWEST, MOST))
    traces = lossk.sample_losses(
        **arguments, sampler=full, num_chains=CHAINS, num_draws=draws, seed=seed + 1, progress=False
    )
    kernel = lossk.LossKernel.from_traces(traces)
    assert kernel.diagnostics is not None
    how = f"BAOAB with the full gradient, {kernel.diagnostics.sample_ess:.0f} effective draws"
    title = f"Digits, {sum(p.numel() for p in task.model.parameters()):,} weights, {len(probe[0])} probe samples"
    return Case(title, arguments, reference=(how, kernel.to_numpy().astype(np.float64)), **law)


def table(case: Case, results: list[Result]) -> list[str]:
    lines = [
        f"## {case.title}", "",
        f"n_beta {case.n_beta:.4g}, localization {case.localization:.4g}. Reference: {case.reference[0]}.", "",
        "| sampler | burn-in | steps per draw | draws | ms per draw | ESS, median sample | ESS, mean loss "
        "| **ms per effective draw** | effective draws per s | corr. of K | corr. of R | trace K / reference |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for r in results:
        lines.append(
            f"| {r.name} | {r.burnin} | {r.steps} | {r.draws} | {r.milliseconds:.3g} | {r.sample_ess:.0f} "
            f"| {r.mean_ess:.0f} | **{r.cost:.3g}** | {1e3 / r.cost:.3g} | {r.k_correlation:.3f} "
            f"| {r.r_correlation:.3f} | {r.trace_ratio:.2f} |"
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of an effective draw and rightness of the kernel, per sampler.")
    parser.add_argument("--out", type=Path, help="Markdown file to write (docs/samplers.md)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of drawing per sampler, burn-in not counted")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, sha = time.perf_counter(), provenance.git_sha()
    lines = ["# Samplers", "", *(__doc__ or "").split("\n\n")[2].strip().splitlines(), ""]
    regression, exact = quadratic()
    for case, hmc, batch in ((regression, exact, 64), (digits_case(4 * arguments.seconds, arguments.seed), [], 256)):
        results = []
        for name, sampler in samplers(case.n_beta, case.localization, batch, hmc).items():
            results.append(measure(name, sampler, case, arguments.seconds, arguments.seed))
            print(f"{name}: {results[-1].cost:.3g} ms per effective draw", flush=True)
        lines += table(case, results)
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions().items())
    lines += [
        f"`python -m bench.studies.samplers --seconds {arguments.seconds:g}`: {CHAINS} chains, seed {arguments.seed}, "
        f"{time.perf_counter() - start:.0f} s on 1 thread ({platform.machine()}); {versions}; git {sha or 'unknown'}.",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
