"""What a finished kernel says about the data. Reads a kernel, or arrays taken from one; never samples."""
