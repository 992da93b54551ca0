"""A kernel as a notebook shows it: what it is, how far to trust it, and a small picture of its correlations."""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import torch

from lossk.diagnostics.table import Row, rows_of
from lossk.errors import DistributedError, StoreError

if TYPE_CHECKING:
    from lossk.kernel.kernel import LossKernel

CELLS = 64  # samples in the picture
POSITIVE, NEGATIVE = (201, 74, 58), (58, 110, 201)  # of R; their opacity is its size, so that any background will do
SHOWN = {
    "R-hat", "effective draws", "reliability of R", "reliability of K", "noise floor", "LLC",
}  # fmt: skip
STYLE = """<style>
.lossk-card{display:flex;flex-wrap:wrap;gap:1.2em;align-items:flex-start;padding:.6em .8em;max-width:60em;
border:1px solid #d0d0d0;border-radius:6px;background:#fff;color:#1c1c1c}
.lossk-card table{border-collapse:collapse;margin:.3em 0;background:none;color:inherit}
.lossk-card tr{background:none!important}
.lossk-card td,.lossk-card th{text-align:left;padding:.1em .8em .1em 0;border:0;background:none;color:inherit}
.lossk-card th{font-weight:normal;opacity:.75}
.lossk-card th,.lossk-card td:nth-child(2){white-space:nowrap}
.lossk-card>div:first-of-type{flex:1 1 20em;min-width:0}
.lossk-card img{width:160px;height:160px;image-rendering:pixelated;border:1px solid #8886}
.lossk-card small{opacity:.75}
@media (prefers-color-scheme: dark){.lossk-card{background:#1b1d21;color:#e6e6e6;border-color:#444}}
</style>"""


def card(kernel: LossKernel) -> str:
    """HTML. Reads one tile at most, and 64 x 64 correlations of it."""
    title = f"<b>LossKernel</b> {kernel.num_samples:,} x {kernel.num_samples:,} {kernel.unit}"
    known: list[Row] = []
    if kernel.diagnostics is not None:
        verdict, *numbers = rows_of(kernel.diagnostics)
        known = [verdict, *(row for row in numbers if row[0] in SHOWN)]
    known += [
        ("chains x draws", f"{kernel.num_chains} x {kernel.num_draws:,}", ""),
        ("held as", f"{kernel.form} in {kernel.dtype}", ""),
    ]
    dead = int(kernel.dead.sum())
    known += [("dead", f"{dead:,}", "their loss never varied")] if dead else []
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td><td><small>{escape(says)}</small></td></tr>"
        for name, value, says in known
    )
    return f"{STYLE}<div class='lossk-card'><div>{title}<table>{lines}</table></div>{_picture(kernel)}</div>"


def _picture(kernel: LossKernel) -> str:
    """The figure; empty where this process cannot read the entries."""
    first = min(kernel.num_samples, kernel.tile)
    rows = np.unique(np.linspace(0, first - 1, min(CELLS, first)).round().astype(np.int64))
    ordered = "in their order"
    if kernel.labels is not None:
        rows, ordered = rows[np.argsort(kernel.labels.numpy()[rows], kind="stable")], "sorted by class"
    try:
        block = kernel.correlation(torch.from_numpy(rows), torch.from_numpy(rows)).numpy()
    except (DistributedError, StoreError, MemoryError):
        return ""
    limit = color_limit(block)
    uri = base64.b64encode(png(colored(block / limit))).decode()
    said = (
        f"R of {len(rows)} of {kernel.num_samples:,} {kernel.unit}, {ordered}; "
        f"red positive, blue negative, full at {limit:.2g}"
    )
    return (
        f"<div><img alt='{escape(said)}' src='data:image/png;base64,{uri}'><br>"
        f"<small style='display:block;max-width:160px'>{escape(said)}</small></div>"
    )


def color_limit(block: np.ndarray) -> float:
    """|R| at which the colors end: that of 98 % of the entries off the diagonal, and at least 0.05."""
    off = block[~np.eye(len(block), dtype=bool)]
    return max(float(np.quantile(np.abs(off), 0.98)) if off.size else 1.0, 0.05)


def colored(shares: np.ndarray) -> np.ndarray:
    """[m, m, 4] uint8, red, green, blue and opacity, of values [m, m] that are full at 1 and -1."""
    strength = np.clip(np.abs(np.nan_to_num(shares)), 0.0, 1.0)[..., None]
    color = np.where(shares[..., None] >= 0, np.array(POSITIVE), np.array(NEGATIVE))
    return np.concatenate([color, 255 * strength], axis=-1).round().astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of [h, w, 4] uint8 (RFC 2083: header, one compressed block of unfiltered rows, end)."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)  # 8 bits, red green blue alpha
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
