"""GPU kernels, one Triton file per op of `lossk.ops`, packaged as `lossk.kernels`. Triton is imported
by these files only; `lossk.ops.triton_kernels` loads them at first use."""
