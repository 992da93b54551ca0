"""lossk: the loss kernel of a trained network, and what it says about the data.

kernel = lossk.build_kernel(model, loader)
index, correlation, noise_floor = kernel.neighbors(k=10)
"""

from lossk.baoab import BAOAB
from lossk.build import build_kernel, sample_losses
from lossk.cross import CrossKernel, cross_kernel
from lossk.errors import BackendError, DistributedError, DivergedError, LosskError, StoreError
from lossk.from_store import open_kernel as open  # noqa: F401 - `lossk.open`, see below
from lossk.gaussian import Gaussian
from lossk.hmc import HMC
from lossk.kernel import LossKernel
from lossk.laplace import Laplace
from lossk.neighbors import Neighbors
from lossk.passes import Passes
from lossk.predicted import predicted_labels
from lossk.probe_sets import ProbeSets
from lossk.sgld import SGLD
from lossk.trace_writer import TraceWriter
from lossk.traces import LossTraces

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
