"""Images as a few sheets, each a grid of thumbnails, for a page that carries them.

Sheets are PNG where all of them fit into the budget, else lossy WebP. Where that is still too much, images are thinned:
those of the page's lists stay, and of the others every m-th one.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lossk.report.samples import thumbnails

SHEET = 2048  # pixels of a sheet's side, which every browser can decode
BUDGET = 15_000_000  # bytes of all sheets, a third more in base64
TRIAL = 1024  # images encoded to learn what one takes
WEBP_QUALITY = 80


@dataclass(frozen=True)
class Sprites:
    """Thumbnail i is at (slot % per_sheet) of sheet (slot // per_sheet), row by row; slot -1 has none."""

    sheets: list[str]  # data URIs
    width: int  # of a thumbnail, pixels
    height: int
    columns: int  # of a full sheet
    per_sheet: int
    slot: np.ndarray  # [N] int32
    rule: str  # what was done to the images, in words


def make_sprites(images: np.ndarray, listed: np.ndarray, *, budget: int = BUDGET) -> Sprites:
    """Sheets of all images, or of as many as `budget` bytes hold. Needs Pillow.

    Args:
        images: [N, H, W] or [N, H, W, 3], uint8 or floats in [0, 1].
        listed: row numbers of images that must stay.
    """
    count = len(images)
    trial = thumbnails(images, np.unique(np.linspace(0, count - 1, min(count, TRIAL)).round().astype(np.int64)))
    height, width = trial.shape[1:3]
    columns, rows = max(SHEET // width, 1), max(SHEET // height, 1)
    each = {kind: len(_encode(_grid(trial, columns), kind)) / len(trial) for kind in ("PNG", "WEBP")}
    kind = "PNG" if each["PNG"] * count <= budget else "WEBP"
    fitting = min(int(budget / each[kind]), count)
    kept = _thin(count, listed, fitting)
    sheets = []
    for part in _split(kept, columns * rows):
        sheets.append(data_uri(_encode(_grid(thumbnails(images, part), columns), kind), kind))
    slot = np.full(count, -1, dtype=np.int32)
    slot[kept] = np.arange(len(kept))
    return Sprites(sheets, width, height, columns, columns * rows, slot, _rule(images, kept, kind, height, width))


def data_uri(content: bytes, kind: str) -> str:
    """An image file as a data URI."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"


def thumbnail_uri(image: np.ndarray) -> str:
    """One thumbnail [h, w] or [h, w, 3] uint8 as a PNG in a data URI."""
    return data_uri(_encode(image, "PNG"), "PNG")


def _thin(count: int, listed: np.ndarray, most: int) -> np.ndarray:
    """Row numbers, ascending: all, or the listed ones and evenly spaced others."""
    if most >= count:
        return np.arange(count)
    rest = np.setdiff1d(np.arange(count), listed)
    wanted = min(max(most - len(listed), 0), len(rest))
    spread = rest[np.linspace(0, len(rest) - 1, wanted).round().astype(np.int64)]
    return np.union1d(listed, spread).astype(np.int64)


def _split(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _grid(small: np.ndarray, columns: int) -> np.ndarray:
    """[n, h, w(, 3)] -> one picture of ceil(n / columns) rows."""
    count, height, width = small.shape[:3]
    across = min(columns, count)
    down = -(-count // across)
    grid = np.zeros((down * across, *small.shape[1:]), dtype=np.uint8)
    grid[:count] = small
    channels = small.shape[3:]
    return grid.reshape(down, across, height, width, *channels).swapaxes(1, 2).reshape(
        down * height, across * width, *channels
    )  # fmt: skip


def _encode(picture: np.ndarray, kind: str) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    settings = {"optimize": True} if kind == "PNG" else {"quality": WEBP_QUALITY, "method": 4}
    Image.fromarray(picture).save(out, kind, **settings)
    return out.getvalue()


def _rule(images: np.ndarray, kept: np.ndarray, kind: str, height: int, width: int) -> str:
    parts = []
    if images.shape[1:3] != (height, width):
        parts.append(f"reduced from {images.shape[2]} x {images.shape[1]} to {width} x {height} pixels")
    if kind == "WEBP":
        parts.append("compressed with loss (WebP)")
    if len(kept) < len(images):
        parts.append(
            f"thinned to {len(kept):,} of {len(images):,}: those of the lists on this page, and evenly spaced others"
        )
    return f"Images are {', '.join(parts)}." if parts else ""
