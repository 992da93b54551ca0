"""The losses of all rows of the kernel at the present weights."""
