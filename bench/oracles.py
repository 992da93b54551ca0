"""The sampler against closed forms, through the public API: one table.

    python -m bench.oracles [--out docs/oracles.md] [--quick] [--seed 1]

z is (estimate - truth) / standard error. Standard errors come from the spread over independent chains; the bias of a
finite step, of minibatches and of centering is part of the truth, so that |z| is small for the right law only.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench import oracles_hmc as hmc
from bench import oracles_linear as linear
from bench import oracles_logistic as logistic
from bench import oracles_nonlinear as nonlinear
from bench.oracle_problems import Row, Size
from lossk import provenance

Case = Callable[[Size], list[Row]]

CASES: dict[Case, str] = {
    linear.t1: "linear regression, w* off the fit, full batch; T1 at every lag, T2's covariance and T4's centering",
    linear.t2: "the same with eps a_max = 2.4 of 4; then linear probe losses, whose K is x S x', at two steps",
    linear.t2_frozen: "S = (A - eps/4 A G A)^-1 with every chain's own G, from a float64 replay of its burn-in",
    linear.t3: "m = 10 of n = 20 without replacement, anchored at the least-squares fit; the linear equation for S",
    linear.t4: "one weight whose trace is AR(1) with rho = 0.9; T = 50; the pooled row's error is over copies",
    linear.t5: "64 unrelated weights, kernels of 2 chains x 60 draws; exact tails of R given one trace (Imhof 1961)",
    linear.t6: "two tasks of three inputs each, on weights of their own or on all; T1 with T2's covariance. Coupling: "
    "weights of their own, but minibatches of 4 of 24, w* far off the fit; T3's equation around the posterior mean",
    nonlinear.t7: "Bessel functions, with the step's first-order effect by quadrature (up to 5 %)",
    nonlinear.t8: "Gamma law, with the step's effect by quadrature (k = 1: exactly); no localization",
    nonlinear.t8_rank: "n_beta = 100, gamma = 10: quadrature over A's singular values, B integrated exactly",
    logistic.t9: "logistic regression in two dimensions, gamma / n_beta = 0.1; exact K by quadrature. The step's "
    "first-order effect on K is taken off the estimate, whose error is projected on the exact n_beta K - IF",
    nonlinear.t10: "w^4, with other noise; with the same noise the two LLCs agree to rounding",
    hmc.t7_sharp: "Bessel functions; `HMC`, whose law has no step: trajectories of about 300 leapfrog steps",
    hmc.t7_sharper: "the same with trajectories of about 3,000 leapfrog steps",
    hmc.t8_rank_zero: "n_beta = 100, gamma = 1, `HMC`: quadrature over A's singular values (a Pfaffian), B integrated "
    "exactly; for n_beta from 1e6 to 1e36 the quadrature tends to the limit",
    hmc.t8_rank_hmc: "n_beta = 100, gamma = 10, `HMC`: quadrature over the 2 x 2 matrix A, B integrated exactly",
}


def run(size: Size, say: Callable[[str], None] = print) -> list[Row]:
    """All rows; `say` gets each case's time and worst z."""
    out: list[Row] = []
    for number, case in enumerate(CASES):
        start = time.perf_counter()
        found = case(size.part(number))
        worst = max(abs(row.z) for row in found)
        say(f"{found[0].oracle}: {len(found)} rows, max |z| {worst:.2f}, {time.perf_counter() - start:.1f} s")
        out += found
    return out


def rms(rows: list[Row]) -> float:
    """Root mean square z; NaN if any is."""
    return float(np.sqrt(np.mean([row.z**2 for row in rows])))


def full(seed: int = 1) -> Size:
    return Size(chains=32, draws=80, seed=seed, long=True)


def quick(seed: int = 1) -> Size:
    return Size(chains=12, draws=20, seed=seed, long=False)


def page(rows: list[Row], size: Size, seconds: float, sha: str | None = None) -> str:
    """The table as Markdown; sha: the commit that was run."""
    z = np.array([row.z for row in rows])
    lines = [
        "# Oracles",
        "",
        "The sampler through its public API (`sample_losses`, `build_kernel`, `LossKernel.from_traces`) against laws "
        "known in closed form or by quadrature. z = (estimate - truth) / standard error. Standard errors come from the "
        "spread over independent chains. A finite step, minibatches and centering are part of the truth.",
        "",
        f"**{len(rows)} rows, max |z| = {np.abs(z).max():.2f}, root mean square z = {rms(rows):.2f}** "
        "(targets: below 3.5; between 0.7 and 1.3). Rows of one case share their chains.",
        "",
        "| oracle | quantity | truth | estimate | standard error | z |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        quantity = row.quantity.replace("|", "\\|")
        lines.append(
            f"| {row.oracle} | {quantity} | {row.truth:.5g} | {row.estimate:.5g} | {row.se:.2g} | {row.z:+.2f} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions().items())
    lines += ["", "How each is made:", ""]
    lines += [f"- **{label(case)}**: {how}." for case, how in CASES.items()]
    lines += [
        "",
        f"`python -m bench.oracles`: {size.chains} chains x {size.draws} draws (T4, T5, T7 (100, 1): their own), "
        f"seed {size.seed}, {seconds:.0f} s on {torch.get_num_threads()} thread of {os.cpu_count()} cores "
        f"({platform.machine()}); {versions}; git {sha or 'unknown'}.",
        "",
    ]
    return "\n".join(lines)


def label(case: Case) -> str:
    return case.__name__.capitalize().replace("_", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the sampler with closed forms and write the table.")
    parser.add_argument("--out", type=Path, help="Markdown file to write (docs/oracles.md)")
    parser.add_argument("--quick", action="store_true", help="a shorter table, without the chains that mix slowly")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = quick(arguments.seed) if arguments.quick else full(arguments.seed)
    start = time.perf_counter()
    sha = provenance.git_sha()  # now: others may commit while this runs
    rows = run(size)
    text = page(rows, size, time.perf_counter() - start, sha)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
