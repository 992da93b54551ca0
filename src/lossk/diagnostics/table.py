"""Diagnostics as a table of 3 to 4 digits, for a terminal and for a notebook."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossk.diagnostics.diagnostics import Diagnostics

Row = tuple[str, str, str]  # what it is called, its value, what it says

# The attribute, what it is called, what it says. Of an attribute with an error the value is "value +- error".
NUMBERS: tuple[tuple[str, str, str], ...] = (
    ("rhat", "R-hat", "mean loss; near 1 where chains agree"),
    ("sample_rhat", "R-hat, median sample", ""),
    ("sample_rhat_high", "R-hat, 95 % quantile", "over samples"),
    ("llc_rhat", "R-hat, LLC", ""),
    ("ess", "effective draws", "mean loss, over all chains"),
    ("sample_ess", "effective draws, median sample", ""),
    ("sample_ess_low", "effective draws, 5 % quantile", "over samples"),
    ("llc_ess", "effective draws, LLC", ""),
    ("reliability", "reliability of R", "correlation with another run of this length"),
    ("reliability_kernel", "reliability of K", "correlation with another run of this length"),
    ("noise_floor", "noise floor", "correlation that chance alone would show"),
    ("llc", "LLC", "local learning coefficient"),
    ("mean_loss", "mean loss", "nats, over draws and samples"),
    ("functional_variance", "functional variance", "nats^2"),
    ("singular_fluctuation", "singular fluctuation", ""),
    ("waic", "WAIC", "nats, of log losses"),
    ("wbic", "WBIC", "nats"),
    ("size_error", "error of the size", "relative, of the total variance"),
    ("drift_z", "drift", "of the mean loss, in standard errors"),
    ("growth_z", "growth", "of |w - w*|^2, in standard errors"),
    ("distance", "distance", "mean |w - w*|"),
    ("gradient_noise_ratio", "gradient noise ratio", "minibatch noise over injected noise; well below 1 is right"),
    ("discretisation", "discretization", "excess variance of the stiffest direction"),
    ("foreseen_bias", "foreseen bias", "of the variance of the worst direction, relative"),
    ("burnin_completeness", "burn-in completeness", "of a flat direction's variance"),
    ("effective_dimension", "effective dimension", "directions in which the data beat the pull"),
    ("acceptance", "acceptance", "Metropolis test"),
    ("dead_share", "dead share", "samples whose loss never varied"),
)  # fmt: skip


def short(value: float | None) -> str:
    """A number in 4 digits: 1.003, 812, 1.25e+06; "unknown" of None."""
    if value is None:
        return "unknown"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def rows_of(diagnostics: Diagnostics) -> list[Row]:
    """The verdict, its advice, and every number that is known."""
    rows: list[Row] = [("verdict", diagnostics.verdict, diagnostics.advice)]
    for attribute, name, says in NUMBERS:
        value: Any = getattr(diagnostics, attribute)
        if value is None:
            continue
        number, error = (value.value, value.se) if hasattr(value, "se") else (value, None)
        error = diagnostics.llc_se if attribute == "llc" else error
        rows.append((name, short(number) if error is None else f"{short(number)} +- {short(error)}", says))
    return rows


def as_text(diagnostics: Diagnostics) -> str:
    """A row a line, in aligned columns."""
    rows = rows_of(diagnostics)
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{name:{first}}  {value:{second}}  {says}".rstrip() for name, value, says in rows)


def as_html(diagnostics: Diagnostics) -> str:
    """A table; its colors are those of the page that it stands in."""
    lines = [
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(value)}</td>"
        f"<td style='text-align:left;opacity:.7'>{escape(says)}</td></tr>"
        for name, value, says in rows_of(diagnostics)
    ]
    return f"<table>{''.join(lines)}</table>"
