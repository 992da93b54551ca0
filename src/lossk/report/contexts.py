"""Nearest tokens (or sequences) shown in context: as text, and as an HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lossk.kernel.kernel import LossKernel
from lossk.kernel.neighbors import Neighbors

BEFORE, AFTER = 8, 3  # tokens of context
WIDEST = 100  # characters of a sequence
NUM_QUERIES, NUM_NEIGHBORS = 12, 6


@dataclass(frozen=True)
class Shown:
    """A row of the kernel in context: the text before it, its own, and after it."""

    before: str
    own: str
    after: str

    def __str__(self) -> str:
        if not (self.before or self.after):
            return self.own
        return f"{self.before}[{self.own}]{self.after}"


@dataclass(frozen=True)
class Line:
    """A row with its neighbors above and below the noise floor, best first."""

    row: int
    mean_loss: float  # nats
    std: float  # nats
    noise_floor: float
    neighbors: Sequence[tuple[int, float]]  # row, correlation


def in_context(row: int, row_texts: Sequence[str], tokens: Tensor | None) -> Shown:
    """A token with its neighbors in the text, or a sequence's beginning.

    Args:
        row_texts: [N], the text of each row.
        tokens: [N, 2] (sample, position), as `kernel.tokens`; None where a row is a sequence.
    """
    if tokens is None:
        text = _flat(row_texts[row])
        return Shown("", text if len(text) <= WIDEST else text[:WIDEST].rstrip() + " ...", "")
    sample = int(tokens[row, 0])
    first = max(row - BEFORE, 0)
    last = min(row + AFTER, len(row_texts) - 1)
    near = [other for other in range(first, last + 1) if int(tokens[other, 0]) == sample]
    before = "".join(row_texts[other] for other in near if other < row)
    after = "".join(row_texts[other] for other in near if other > row)
    return Shown(_marked(before), _marked(row_texts[row]), _marked(after))


def choose_rows(kernel: LossKernel, count: int = NUM_QUERIES) -> list[int]:
    """Half: the largest self-covariances; the rest: rows evenly spread over those of middling self-covariance."""
    order = torch.argsort(kernel.variance, descending=True).tolist()
    alive = [row for row in order if not bool(kernel.dead[row])]
    largest, rest = alive[: count // 2], alive[count // 2 :]
    middle = rest[len(rest) // 4 : max(3 * len(rest) // 4, 1)] or rest
    wanted = min(count - len(largest), len(middle))
    return largest + [middle[i * len(middle) // wanted] for i in range(wanted)]


def gather(kernel: LossKernel, neighbors: Neighbors, rows: Sequence[int]) -> list[Line]:
    """What is shown of these rows."""
    found = []
    for row in rows:
        pairs = zip(neighbors.index[row].tolist(), neighbors.correlation[row].tolist(), strict=True)
        found.append(
            Line(
                row,
                float(kernel.mean_loss[row]),
                float(kernel.variance[row]) ** 0.5,
                float(neighbors.noise_floor[row]),
                [(other, value) for other, value in pairs if other >= 0][:NUM_NEIGHBORS],
            )
        )
    return found


def describe_contexts(kernel: LossKernel, row_texts: Sequence[str], neighbors: Neighbors) -> str:
    """Some rows and their nearest neighbors in context, as lines of text."""
    lines = [f"Nearest {_unit(kernel)}, in context (* above the row's noise floor):"]
    for line in gather(kernel, neighbors, choose_rows(kernel)):
        lines.append(f"{in_context(line.row, row_texts, kernel.tokens)}")
        lines.append(f"    loss {line.mean_loss:.3f}, std {line.std:.3f} nats; noise floor {line.noise_floor:.2f}")
        for other, value in line.neighbors:
            mark = "*" if value > line.noise_floor else " "
            lines.append(f"  {mark} {value:5.2f}  {in_context(other, row_texts, kernel.tokens)}")
    return "\n".join(lines)


def write_page(kernel: LossKernel, row_texts: Sequence[str], neighbors: Neighbors, path: Path, *, title: str) -> None:
    """An HTML page of some rows and their nearest neighbors in context; no script, nothing loaded from elsewhere.

    Of a token, its whole sequence follows, each token shaded by its correlation with it.
    """
    parts = [_query(kernel, row_texts, line) for line in gather(kernel, neighbors, choose_rows(kernel))]
    unit = _unit(kernel)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n"
        f"<p>{kernel.num_samples:,} {unit}, {kernel.num_chains} chains &times; {kernel.num_draws} draws. Each block: "
        f"one of the {unit}, and those whose losses move most with its own, with their correlations R. Pale: not above "
        "the noise floor, what the best of as many unrelated ones would reach. Red: losses rise together; blue: one "
        f"rises as the other falls.</p>\n{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}"
    "section{border-top:1px solid #ccc;padding:.6em 0}table{border-collapse:collapse}td{padding:.05em .6em;"
    "vertical-align:top}td.r{text-align:right;font-variant-numeric:tabular-nums}b{background:#ffe08a;padding:0 .15em}"
    ".pale{color:#999}.pale b{background:#f3ecd6}.note{color:#666;font-size:13px}"
    ".seq{font-size:13px;background:#fafafa;padding:.4em .6em;margin:.5em 0}.own{outline:2px solid #222}"
)


def _query(kernel: LossKernel, row_texts: Sequence[str], line: Line) -> str:
    rows = []
    for other, value in line.neighbors:
        pale = "" if value > line.noise_floor else ' class="pale"'
        shown = _html(in_context(other, row_texts, kernel.tokens))
        rows.append(f'<tr{pale}><td class="r">{value:.2f}</td><td>{shown}</td></tr>')
    return (
        f"<section><div>{_html(in_context(line.row, row_texts, kernel.tokens))}</div>\n"
        f'<div class="note">row {line.row}, mean loss {line.mean_loss:.3f} nats, standard deviation {line.std:.3f}, '
        f"noise floor {line.noise_floor:.2f}</div>\n<table>{''.join(rows)}</table>\n{_shaded(kernel, row_texts, line)}"
        "</section>\n"
    )


def _shaded(kernel: LossKernel, row_texts: Sequence[str], line: Line) -> str:
    if kernel.tokens is None:
        return ""
    same = (kernel.tokens[:, 0] == kernel.tokens[line.row, 0]).nonzero().squeeze(1)
    if kernel.sets:  # numbers are those within a set
        own = next(rows for rows in kernel.sets.values() if rows.start <= line.row < rows.stop)
        same = same[(same >= own.start) & (same < own.stop)]
    values = kernel.correlation([line.row], same)[0].tolist()
    spans = []
    for row, value in zip(same.tolist(), values, strict=True):
        color = "214,39,40" if value > 0 else "31,119,180"
        strength = 0.0 if abs(value) <= line.noise_floor else min(abs(value), 1.0)
        own_mark = ' class="own"' if row == line.row else ""
        style, text = f"background:rgba({color},{0.75 * strength:.2f})", html.escape(_marked(row_texts[row]))
        spans.append(f'<span{own_mark} style="{style}" title="{value:.2f}">{text}</span>')
    return f'<div class="seq">{"".join(spans)}</div>\n'


def _html(shown: Shown) -> str:
    if not (shown.before or shown.after):
        return html.escape(shown.own)
    return f"{html.escape(shown.before)}<b>{html.escape(shown.own)}</b>{html.escape(shown.after)}"


def _unit(kernel: LossKernel) -> str:
    return "sequences" if kernel.tokens is None else "tokens"


def _flat(text: str) -> str:
    return " ".join(text.split())


def _marked(text: str) -> str:
    """Line breaks as a visible sign, so that a token that is one can be seen."""
    return text.replace("\r", "").replace("\n", "⏎").replace("\t", " ")
