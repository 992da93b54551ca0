"""The compiled extension `lossk._C`: loaded at first use, and used only after it has reproduced known numbers.

Importing lossk never imports the extension; a machine without it has the torch reference of every op.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from lossk.errors import BackendError
from lossk.ops import philox


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether `backend="cpp"` can run here, and if not why."""

    available: bool
    reason: str  # "" when available
    simd: str  # "avx512" | "avx2" | "baseline"; "" when not available


def status() -> ExtensionStatus:
    """Load and test the extension (once per process); never raises."""
    return _load()[0]


def load() -> ModuleType:
    """The extension module.

    Raises:
        BackendError: it is missing, fails to import, or fails its self-test; the message says which.
    """
    found, module = _load()
    if module is None:
        raise BackendError(f'backend "cpp" cannot run here: {found.reason}; available: "torch"')
    return module


@functools.cache
def _load() -> tuple[ExtensionStatus, ModuleType | None]:
    try:
        module = importlib.import_module("lossk._C")
    except ImportError as error:
        return ExtensionStatus(False, f"lossk._C does not import ({error})", ""), None
    try:
        problem = self_test(module)
    except Exception as error:  # whatever a stale or broken build does, the reference still runs
        problem = f"{type(error).__name__}: {error}"
    if problem:
        return ExtensionStatus(False, f"lossk._C fails its self-test ({problem})", ""), None
    return ExtensionStatus(True, "", module.simd()), module


def self_test(module: ModuleType) -> str:
    """Compare a few hundred values with the numpy reference; returns what differs, or ""."""
    seed, chain, step = 0xDEADBEEF, 3, 7
    stream = {"seed": seed, "chain": chain, "step": step}
    count = 64 * 5 + 3  # whole groups and a ragged end
    words = np.zeros(count, dtype=np.uint32)
    module.philox_fill(out=words.ctypes.data, count=count, **stream)
    if not np.array_equal(words, philox.uint32_stream(seed, chain, step, 0, count)):
        return "Philox words differ from the reference"

    xi = np.full(count, np.nan, dtype=np.float32)
    module.normals(out=xi.ctypes.data, count=count, **stream)
    expected_xi = philox.normals(seed, chain, step, count).numpy()
    if not np.allclose(xi, expected_xi, rtol=2.5e-7, atol=0.0):  # 2 ulp
        return "normals differ from the reference"

    w, grad, anchor = np.linspace(-1.0, 1.0, 3 * count, dtype=np.float32).reshape(3, count).copy()
    expected = w - 0.005 * (30.0 * grad + 2.0 * (w - anchor)) + 0.1 * expected_xi.astype(np.float64)
    module.sgld_step(
        w=w.ctypes.data,
        grad=grad.ctypes.data,
        anchor=anchor.ctypes.data,
        square_avg=0,
        count=count,
        lr=0.01,
        n_beta=30.0,
        localization=2.0,
        alpha=0.99,
        stability=0.1,
        update_square_avg=False,
        **stream,
    )
    if not np.allclose(w, expected, rtol=0.0, atol=1e-6):
        return "sgld_step differs from the reference"

    logits = np.array([[0.0, 40.0, 1.0], [5.0, 5.0, -3.0], [0.0, -9.0, 80.0]], dtype=np.float32)
    targets, losses = np.array([1, 0, 1]), np.full(3, np.nan, dtype=np.float32)
    module.sample_loss(
        logits=logits.ctypes.data, targets=targets.ctypes.data, out=losses.ctypes.data, rows=3, classes=3, stride=3
    )
    small = np.exp(-40.0) + np.exp(-39.0)
    exact = [np.log1p(small), np.log1p(1.0 + np.exp(-8.0)), 89.0]
    return "" if np.allclose(losses, exact, rtol=1e-6, atol=0.0) else "sample_loss differs from the reference"
