"""lossk: the loss kernel of a trained network, and what it says about the data.

kernel = lossk.build_kernel(model, loader)
index, correlation, noise_floor = kernel.neighbors(k=10)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossk.build import build_kernel, sample_losses
    from lossk.cross import CrossKernel, cross_kernel
    from lossk.data.probe_sets import ProbeSets
    from lossk.errors import BackendError, DistributedError, DivergedError, LosskError, StoreError
    from lossk.kernel.from_store import open_kernel as open  # noqa: F401 - `lossk.open`, see below
    from lossk.kernel.kernel import LossKernel
    from lossk.kernel.neighbors import Neighbors
    from lossk.kernel.trace_writer import TraceWriter
    from lossk.kernel.traces import LossTraces
    from lossk.probe.predicted import predicted_labels
    from lossk.samplers.baoab import BAOAB
    from lossk.samplers.gaussian import Gaussian
    from lossk.samplers.hmc import HMC
    from lossk.samplers.laplace import Laplace
    from lossk.samplers.sgld import SGLD
    from lossk.task.passes import Passes

__version__ = "0.1.0"

# `open` is public too, but stays out of a star import, where it would hide the built-in.
__all__ = [
    "BAOAB",
    "HMC",
    "SGLD",
    "BackendError",
    "CrossKernel",
    "DistributedError",
    "DivergedError",
    "Gaussian",
    "Laplace",
    "LossKernel",
    "LossTraces",
    "LosskError",
    "Neighbors",
    "Passes",
    "ProbeSets",
    "StoreError",
    "TraceWriter",
    "build_kernel",
    "cross_kernel",
    "predicted_labels",
    "sample_losses",
]

# Names are imported when they are asked for: who reads a kernel needs no sampler.
MODULES = {
    "lossk.samplers.baoab": ("BAOAB",),
    "lossk.build": ("build_kernel", "sample_losses"),
    "lossk.cross": ("CrossKernel", "cross_kernel"),
    "lossk.errors": ("BackendError", "DistributedError", "DivergedError", "LosskError", "StoreError"),
    "lossk.kernel.from_store": ("open_kernel",),
    "lossk.samplers.gaussian": ("Gaussian",),
    "lossk.samplers.hmc": ("HMC",),
    "lossk.kernel.kernel": ("LossKernel",),
    "lossk.samplers.laplace": ("Laplace",),
    "lossk.kernel.neighbors": ("Neighbors",),
    "lossk.task.passes": ("Passes",),
    "lossk.probe.predicted": ("predicted_labels",),
    "lossk.data.probe_sets": ("ProbeSets",),
    "lossk.samplers.sgld": ("SGLD",),
    "lossk.kernel.trace_writer": ("TraceWriter",),
    "lossk.kernel.traces": ("LossTraces",),
}
WHERE = {name: module for module, names in MODULES.items() for name in names}
PACKAGES = ("analysis", "interop", "kernels", "ops", "recipes", "report")


def __getattr__(name: str) -> Any:
    if name in PACKAGES:
        return importlib.import_module(f"lossk.{name}")
    inside = "open_kernel" if name == "open" else name
    if inside not in WHERE or name == "open_kernel":
        raise AttributeError(f"module 'lossk' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(WHERE[inside]), inside)
    return found


def __dir__() -> list[str]:
    return sorted({*__all__, *PACKAGES, "open", "__version__"})
