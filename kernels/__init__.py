"""GPU kernels, one Triton file per op of `lossk.ops`, packaged as `lossk.kernels`. None in this version."""
