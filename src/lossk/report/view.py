"""The words and numbers of the page that can be read without its script: what the template fills in."""

from __future__ import annotations

from typing import Any

import numpy as np

from lossk.available import gigabytes
from lossk.diagnostics.diagnostics import Diagnostics
from lossk.diagnostics.verdict import BIAS_LIMIT, ESS_LIMIT, RELIABLE, RHAT_LIMIT, SIZE_LIMIT, STABILITY_LIMIT
from lossk.kernel.kernel import LossKernel
from lossk.report.findings import EIGENROWS, HEAVY, Findings
from lossk.report.payload import shorten, traces_of, unit_of
from lossk.report.samples import Samples, thumbnails
from lossk.report.sprites import Sprites, thumbnail_uri
from lossk.timings import duration

CARD = 56  # CSS pixels of a card's image, its longer side
STAGES = ("pilot", "prefix", "anchor", "fit", "gradient", "step", "probe", "update", "tiles", "store", "wait")


def make_view(
    kernel: LossKernel,
    samples: Samples,
    found: Findings,
    sprites: Sprites | None,
    *,
    title: str,
    config: str | None,
) -> dict[str, Any]:
    """Plain data for the template, every string of it unescaped."""
    diagnostics, traces = kernel.diagnostics, traces_of(kernel.meta)
    has_traces = traces["mean_loss"] is not None or traces["excess"] is not None
    return {
        "title": title,
        "subtitle": _subtitle(kernel, samples),
        "unit": unit_of(kernel),
        "verdict": "No verdict" if diagnostics is None else f"Verdict: {diagnostics.verdict}",
        "advice": "These numbers came without diagnostics." if diagnostics is None else diagnostics.advice,
        "good": diagnostics is not None and diagnostics.verdict == "good",
        "facts": facts(kernel, found),
        "map_note": _map_note(kernel, found, sprites),
        "lists": _lists(kernel, samples, found),
        "matrix_note": _matrix_note(found),
        "spectrum": _spectrum(samples, found),
        "classes": None if found.classes is None else {"text": CLASSES_TEXT},
        "traces": traces if has_traces else None,
        "chains_note": "" if has_traces else "The store keeps no traces of its chains.",
        "tables": [table for table in (_diagnostics(diagnostics), _sampler(kernel)) if table],
        "config": _config(kernel, config),
        "footer": _footer(kernel),
    }


CLASSES_TEXT = (
    "Mean correlation of two different samples, one of each class, and the tree that joins the most correlated classes "
    "first. Pointing at a cell shows its standard errors, over images and, where the store knows its chains, over "
    "chains. A negative mean is information: what helps one class hurts the other."
)


def number(value: float | None, digits: int = 3) -> str:
    """Four significant digits or so; "unknown" where it is."""
    if value is None or np.isnan(value):
        return "unknown"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{max(digits - 1, 0)}e}"
    if 0 < abs(value) < 1:
        return f"{value:.{max(digits, 1)}g}".replace("-", "\N{MINUS SIGN}")
    most = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else digits
    return f"{value:.{min(digits, most)}f}".replace("-", "\N{MINUS SIGN}")


def _subtitle(kernel: LossKernel, samples: Samples) -> str:
    parts = [f"{kernel.num_samples:,} {unit_of(kernel)}s"]
    if samples.notes:
        parts.insert(0, samples.notes.splitlines()[0])
    if samples.labels is not None:
        parts.append(f"{len(np.unique(samples.labels))} classes")
    if samples.held_out is not None:
        held = int(samples.held_out.sum())
        parts.append(f"{held:,} of them held out" if held < kernel.num_samples else "all held out from training")
    if kernel.sets:
        parts.append("sets " + ", ".join(f"{name} {s.start}–{s.stop - 1}" for name, s in kernel.sets.items()))
    return " \N{MIDDLE DOT} ".join(parts)


def _fact(name: str, value: str, note: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def facts(kernel: LossKernel, found: Findings) -> list[dict[str, str]]:
    """What it is, whether to trust it, and what it cost."""
    meta, d = kernel.meta, kernel.diagnostics
    out = [_fact("chains × draws", f"{kernel.num_chains} × {kernel.num_draws}", f"{kernel.form} in {kernel.dtype}")]
    if d is not None:
        out.append(_fact("R-hat", number(d.rhat), f"mean loss; at most {RHAT_LIMIT}"))
        out.append(_fact("effective draws", number(d.sample_ess, 0), f"median sample; at least {ESS_LIMIT:.0f}"))
        if d.reliability is not None:
            note = f"R's correlation with another such run's; K's is {number(d.reliability_kernel, 2)}"
            out.append(_fact("reliability", number(d.reliability, 2), f"{note}; at least {RELIABLE}"))
        if d.llc is not None and not d.no_minimum:
            out.append(_fact("LLC", f"{number(d.llc, 1)} ± {number(d.llc_se, 1)}", "local learning coefficient"))
        out.append(_fact("noise floor", f"R = {number(d.noise_floor, 2)}", "what chance alone would show"))
    share, k = found.near.share, found.near.index.shape[1]
    out.append(_fact("significant neighbors", f"{share:.1%}", f"of {k} each; unrelated: about {1 / k:.0%}"))
    dead = int(kernel.dead.sum())
    if dead:
        out.append(_fact("dead", f"{dead:,}", "their loss never varied"))
    seconds = meta.get("timings", {})
    if "total" in seconds:
        stages = sorted((s for s in STAGES if seconds.get(s, 0) >= 0.05 * seconds["total"]), key=lambda s: -seconds[s])
        split = ", ".join(f"{stage} {seconds[stage] / seconds['total']:.0%}" for stage in stages[:3])
        out.append(_fact("time", duration(seconds["total"]), split))
    if "peak_rss_bytes" in meta:
        out.append(_fact("peak memory", gigabytes(meta["peak_rss_bytes"]), "whole process"))
    return out


def _map_note(kernel: LossKernel, found: Findings, sprites: Sprites | None) -> str:
    k = found.near.index.shape[1]
    notes = [f"UMAP of the {k} nearest neighbors in √(2 (1 − R)); clusters by HDBSCAN on the map."]
    dead = int(kernel.dead.sum())
    if dead:
        notes.append(f"{dead:,} of no variance are not on it.")
    if sprites is not None and sprites.rule:
        notes.append(sprites.rule)
    return " ".join(notes)


def _matrix_note(found: Findings) -> str:
    count, bins = len(found.order), len(found.matrix)
    what = (
        f"Each of {bins:,} × {bins:,} cells is the mean R of {count / bins:.3g} by {count / bins:.3g} samples"
        if bins < count
        else "Each cell is one pair of samples"
    )
    return f"{what}, computed from all pairs, shown to ± 0.004. Colors end at the 98 % quantile of |R|."


def _lists(kernel: LossKernel, samples: Samples, found: Findings) -> list[dict[str, Any]]:
    variance, loss, top = kernel.variance.numpy(), kernel.mean_loss.numpy(), found.influential
    lists = [
        {
            "title": "Most self-influential",
            "text": "Largest self-covariance: their losses move most when the weights are jiggled, so the network "
            "holds them least firmly; often rare, ambiguous or memorised ones.",
            "cards": _cards(samples, top, [f"K = {number(v)} nats²" for v in variance[top]]),
        }
    ]
    if found.suspicious is not None and found.disagreement is not None:
        rows = found.suspicious
        words = [
            f"{_percent(share)} differ, loss {number(value, 2)}"
            for share, value in zip(found.disagreement[rows], loss[rows], strict=True)
        ]
        lists.append(
            {
                "title": "Most suspicious labels",
                "text": f"Those whose significant neighbors (of the {found.near.index.shape[1]} nearest) most often "
                "carry another label; among equals, those of larger mean loss in nats. A reason to look, no more.",
                "cards": _cards(samples, rows, words),
            }
        )
    return lists


def _percent(share: float) -> str:
    return "none" if np.isnan(share) else f"{share:.0%}"


def _cards(samples: Samples, rows: np.ndarray, numbers: list[str]) -> list[dict[str, Any]]:
    pictures = None if samples.images is None else thumbnails(samples.images, rows)
    cards = []
    for place, (sample, words) in enumerate(zip(rows.tolist(), numbers, strict=True)):
        card: dict[str, Any] = {"sample": sample, "number": words, "label": _label(samples, sample), "image": None}
        card["text"] = "" if samples.texts is None else shorten(samples.texts[sample])
        if pictures is not None:
            height, width = pictures.shape[1:3]
            scale = CARD / max(height, width)
            card |= {"image": thumbnail_uri(pictures[place]), "width": round(width * scale)}
            card["height"] = round(height * scale)
        cards.append(card)
    return cards


def _label(samples: Samples, sample: int) -> str:
    if samples.labels is None:
        return ""
    label = samples.name_of(int(samples.labels[sample]))
    if samples.predictions is None or samples.predictions[sample] == samples.labels[sample]:
        return label
    return f"{label}, predicted {samples.name_of(int(samples.predictions[sample]))}"


def _spectrum(samples: Samples, found: Findings) -> dict[str, Any]:
    spectrum, rows = found.spectrum, []
    for r in range(min(EIGENROWS, len(spectrum.eigenvalues))):
        if not spectrum.eigenvalues[r] > 0:
            break
        heavy = spectrum.eigen_samples(r, HEAVY)
        ones = [
            {"sample": i, "sign": "+" if entry > 0 else "\N{MINUS SIGN}", "label": _label(samples, i)}
            for i, entry in zip(heavy.index.tolist(), heavy.entry.tolist(), strict=True)
        ]
        value, share = number(float(spectrum.eigenvalues[r])), f"{float(spectrum.share[r]):.1%}"
        rows.append({"value": value, "share": share, "samples": ones})
    text = (
        "The leading eigenvalues of K: few large ones say that the losses move together along few directions. "
        f"The variance lies in about {spectrum.participation_ratio:.1f} of them (participation ratio, (tr K)² / |K|²); "
        f"the trace, the sum of all eigenvalues, is {number(spectrum.trace)} nats²."
    )
    return {"text": text, "rows": rows}


def _diagnostics(d: Diagnostics | None) -> dict[str, Any] | None:
    if d is None:
        return None
    rows = [
        ("R-hat, mean loss", number(d.rhat), f"rank-normalised, split; at most {RHAT_LIMIT}"),
        ("R-hat, median sample", number(d.sample_rhat), "over up to 256 samples"),
        ("ESS, mean loss", number(d.ess, 0), f"bulk effective draws; at least {ESS_LIMIT:.0f}"),
        ("ESS, median sample", number(d.sample_ess, 0), "over the same samples"),
        ("reliability of R", number(d.reliability), f"correlation with another such run's; at least {RELIABLE}"),
        ("reliability of K", number(d.reliability_kernel), f"the same; at least {RELIABLE}"),
        ("size error", number(d.size_error), f"of the total variance, relative standard error; at most {SIZE_LIMIT}"),
        _llc_row(d),
        ("acceptance", number(d.acceptance), "of a Metropolis test, mean over draws"),
        ("distance |w − w*|", number(d.distance), "mean over draws"),
        ("effective dimension", number(d.effective_dimension), "directions at w* in which the data beat the pull"),
        (
            "gradient noise ratio",
            number(d.gradient_noise_ratio),
            "minibatch over injected, worst direction",
        ),
        ("foreseen bias", number(d.foreseen_bias), f"of a variance, step and minibatch noise; at most {BIAS_LIMIT}"),
        ("discretisation", number(d.discretisation), "excess variance of the stiffest direction, relative"),
        (
            "step",
            number(d.stability),
            f"of the longest stable at the steepest of 1,000 draws; at most {STABILITY_LIMIT:.0f}",
        ),
        ("unevenness", number(d.unevenness, 1), "curvature at the steepest of 1,000 draws over its mean"),
        ("burn-in completeness", number(d.burnin_completeness), "share of a flat direction's stationary variance"),
        ("growth", number(d.growth, 2), "of |w − w*|², first third to last, relative"),
        ("drift", number(d.drift, 2), "of the mean loss, first third to last, standard deviations"),
        ("noise floor", number(d.noise_floor), "correlation that chance alone reaches, median row"),
        ("dead share", number(d.dead_share), "samples whose loss never varied"),
    ]
    known = [row for row in rows if not row[1].startswith("unknown")]
    return {"title": "Diagnostics", "heads": ("", "value", "what it is"), "rows": known}


def _llc_row(d: Diagnostics) -> tuple[str, str, str]:
    if d.no_minimum:
        return "LLC", "none", f"w* is no minimum at this scale: n_beta times the rise is {number(d.llc, 2)}"
    return "LLC", f"{number(d.llc, 2)} ± {number(d.llc_se, 2)}", "n_beta (E[L_n] − L_n(w*)), with its standard error"


def _sampler(kernel: LossKernel) -> dict[str, Any] | None:
    settings = kernel.meta.get("sampler") or {}
    reasons = {}
    for line in (*kernel.meta.get("reasons", ()), *kernel.meta.get("passes_reasons", ())):
        head, _, why = str(line).partition(": ")
        reasons[head.partition(" = ")[0].strip()] = why
    rows = [(name, str(value), reasons.get(name, "")) for name, value in settings.items() if value is not None]
    return {"title": "Sampler", "heads": ("setting", "value", "why"), "rows": rows} if rows else None


def _config(kernel: LossKernel, config: str | None) -> dict[str, str]:
    if config is not None:
        return {"text": "Save this as a .yaml file; lossk run FILE.yaml does the same again.", "yaml": config}
    import yaml

    request = kernel.meta.get("config")
    if not request:
        return {"text": "This kernel came without the config of a run.", "yaml": ""}
    text = "No config was saved beside the kernel. This is what its run was asked for; model and data are yours to add."
    return {"text": text, "yaml": yaml.safe_dump(request, sort_keys=False)}


def _footer(kernel: LossKernel) -> str:
    meta = kernel.meta
    versions = ", ".join(f"{name} {version}" for name, version in meta.get("versions", {}).items())
    parts = [f"Kernel made by {versions}"] if versions else []
    parts += [f"backend {meta['backend']}"] if meta.get("backend") else []
    parts += [f"commit {str(meta['git_sha'])[:12]}"] if meta.get("git_sha") else []
    return ", ".join(parts)
