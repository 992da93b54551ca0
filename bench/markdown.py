"""Tables and numbers of the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all but the first column align to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seconds(value: float) -> str:
    """A time for people."""
    if value < 1e-3:
        return f"{value * 1e6:.3g} us"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.4g} s"


def spread(found: Mapping[str, float], unit: str = "") -> str:
    """A median with its 20 and 80 percentiles; `unit` "s" writes them as times."""
    parts = [found[key] for key in ("median", "p20", "p80")]
    texts = [seconds(part) if unit == "s" else f"{part:.3g}{unit}" for part in parts]
    return f"{texts[0]} ({texts[1]} to {texts[2]})"


def megabytes(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:,.0f} MB"


def replace_between(old: str, marks: tuple[str, str], text: str) -> str:
    """A page with what stands between two marks replaced; the rest of it is written by hand."""
    before, rest = old.split(marks[0])
    return f"{before}{marks[0]}\n\n{text}\n{marks[1]}{rest.split(marks[1], 1)[1]}"
