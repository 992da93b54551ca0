"""lossk's engine under devinterp: change the import, keep the call.

With devinterp 2.x, whose results are trees of arrays:

    sample        their `devinterp.slt.sampling.sample`, run by lossk's chain and probe
    compute_bif   their `devinterp.slt.bif.compute_bif`, in the memory of its result
    bif           both
    read_traces   their tree or Zarr store as `lossk.LossTraces`
    to_datatree   `lossk.LossTraces` as their tree

With devinterp 1.3.x, whose sampler takes an optimizer and calls back:

    sgld, rmsprop_sgld    to be passed as `sampling_method=`
    LossKernelCallback    a loss kernel while their sampler runs

devinterp itself is not needed by any of them. Their conventions were read from releases 1.3.2 and 2.0.1.
"""

from lossk.interop.devinterp1_callback import LossKernelCallback
from lossk.interop.devinterp1_sgld import LangevinOptimizer, rmsprop_sgld, sgld
from lossk.interop.devinterp2_bif import bif, compute_bif
from lossk.interop.devinterp2_sample import sample
from lossk.interop.devinterp2_tree import read_traces, to_datatree

__all__ = [
    "LangevinOptimizer",
    "LossKernelCallback",
    "bif",
    "compute_bif",
    "read_traces",
    "rmsprop_sgld",
    "sample",
    "sgld",
    "to_datatree",
]
