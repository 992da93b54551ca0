"""The numbers that the page's script draws: JSON, arrays as base64 of their bytes (little-endian)."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np

from lossk.analysis.neighbors import SignificantNeighbors
from lossk.kernel.card import color_limit
from lossk.kernel.kernel import LossKernel
from lossk.report.findings import NEAR, Findings
from lossk.report.matrix import edges_of
from lossk.report.samples import Samples
from lossk.report.sprites import Sprites

CORRELATION = 32767  # |R| = 1 as a 16-bit integer
MOST_DRAWS = 2000  # of a chain's trace; longer ones are drawn with every m-th draw
TEXT = 300  # characters of a sample's text


def make_payload(kernel: LossKernel, samples: Samples, found: Findings, sprites: Sprites | None) -> dict[str, Any]:
    """What `page/data.js` reads."""
    return {
        "num_samples": kernel.num_samples,
        "unit": unit_of(kernel),
        "class_names": list(samples.class_names),
        "texts": None if samples.texts is None else [shorten(text) for text in samples.texts],
        "first": first_shown(found),
        "samples": {
            "x": pack(found.coordinates[:, 0], "float32"),
            "y": pack(found.coordinates[:, 1], "float32"),
            "mean_loss": pack(kernel.mean_loss.numpy(), "float32"),
            "variance": pack(kernel.variance.numpy(), "float32"),
            "noise_floor": pack(found.near.noise_floor.numpy(), "float32"),
            "cluster": pack(found.clusters, "int32"),
            "label": pack(samples.labels, "int32"),
            "prediction": pack(samples.predictions, "int32"),
            "held_out": pack(samples.held_out, "uint8"),
            "tokens": None if kernel.tokens is None else pack(kernel.tokens.numpy(), "int32"),
        },
        "neighbors": {"near": _neighbors(found.near, NEAR), "far": _neighbors(found.far, found.far.index.shape[1])},
        "images": None if sprites is None else _images(sprites),
        "matrix": _matrix(samples, found),
        "spectrum": _spectrum(found),
        "classes": _classes(samples, found),
        "traces": traces_of(kernel.meta),
    }


def unit_of(kernel: LossKernel) -> str:
    """What a row is."""
    return "sample" if kernel.tokens is None else "token"


def first_shown(found: Findings) -> int:
    """The sample that the page opens with: the one of largest self-covariance."""
    return int(found.influential[0])


def pack(values: np.ndarray | None, dtype: str) -> dict[str, str] | None:
    """An array as the page reads it; None stays None."""
    if values is None:
        return None
    content = np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
    return {"dtype": dtype, "base64": base64.b64encode(content.tobytes()).decode()}


def shorten(text: str) -> str:
    """The beginning of a sample's text."""
    return text if len(text) <= TEXT else text[: TEXT - 1] + "\N{HORIZONTAL ELLIPSIS}"


def to_json(payload: dict[str, Any]) -> str:
    """JSON that may stand inside a script element: no character that could end it, or begin anything else."""
    text = json.dumps(payload, allow_nan=False, separators=(",", ":"))  # ASCII
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _neighbors(found: SignificantNeighbors, k: int) -> dict[str, Any]:
    error = found.standard_error[:, :k].nan_to_num(0.0).clamp(max=1.0)
    return {
        "k": min(k, found.index.shape[1]),
        "index": pack(found.index[:, :k].numpy(), "int32"),
        "correlation": pack((found.correlation[:, :k] * CORRELATION).round().numpy(), "int16"),
        "error": pack((error * CORRELATION).round().numpy(), "int16"),
        "significant": pack(found.significant[:, :k].numpy(), "uint8"),
    }


def _images(sprites: Sprites) -> dict[str, Any]:
    return {
        "sheets": sprites.sheets,
        "width": sprites.width,
        "height": sprites.height,
        "columns": sprites.columns,
        "per_sheet": sprites.per_sheet,
        "slot": pack(sprites.slot, "int32"),
    }


def _matrix(samples: Samples, found: Findings) -> dict[str, Any]:
    groups = found.clusters[found.order] if samples.labels is None else samples.labels[found.order]
    edges, numbers = edges_of(groups)
    if samples.labels is None:
        names = ["no cluster" if number < 0 else f"cluster {number}" for number in numbers]
    else:
        names = [samples.name_of(number) for number in numbers]
    return {
        "size": len(found.matrix),
        "levels": pack(np.round(found.matrix * 127.0), "int8"),
        "limit": color_limit(found.matrix),
        "order": pack(found.order, "int32"),
        "edges": edges,
        "groups": names,
        "sorted": "sorted by class, cluster and place on the map"
        if samples.labels is not None
        else "sorted by cluster and place on the map",
    }


def _spectrum(found: Findings) -> dict[str, Any]:
    values = np.maximum(found.spectrum.eigenvalues.numpy(), 0.0)
    shown = values[values > 1e-12 * max(float(values[0]), 1e-300)]
    return {"values": shown.tolist(), "share": (np.cumsum(shown) / found.spectrum.trace).tolist()}


def _classes(samples: Samples, found: Findings) -> dict[str, Any] | None:
    if found.classes is None:
        return None
    names = [samples.name_of(label) for label in found.classes.labels]
    return {
        "names": names,
        "means": _numbers(found.classes.means),
        "image_error": _numbers(found.classes.image_error),
        "chain_error": _numbers(found.classes.chain_error),
        "dendrogram": {
            "segments": found.classes.segments,
            "names": names,
            "distance": "distance \N{SQUARE ROOT}(2 (1 \N{MINUS SIGN} mean R)) (no unit), average linkage",
        },
    }


def _numbers(matrix: np.ndarray | None) -> list[list[float | None]] | None:
    """Rows of numbers to five decimals; None for NaN."""
    if matrix is None:
        return None
    return [[None if math.isnan(x) else round(x, 5) for x in row] for row in matrix.tolist()]


def traces_of(meta: dict[str, Any]) -> dict[str, Any]:
    """The chains' traces [C][T'] that a run kept, thinned to what a screen shows; None where there are none."""
    found: dict[str, Any] = {"every": 1}
    for name, key in (("mean_loss", "mean_loss_trace"), ("excess", "excess_trace")):
        chains = meta.get(key) or []
        usable = bool(chains) and all(isinstance(v, int | float) and math.isfinite(v) for row in chains for v in row)
        if usable:
            found["every"] = max(-(-len(chains[0]) // MOST_DRAWS), 1)
        found[name] = [row[:: found["every"]] for row in chains] if usable else None
    return found
