"""Reader for IDX files, the format MNIST and Fashion-MNIST ship in, plain or gzipped.

Format (Y. LeCun's MNIST page): two zero bytes, a type byte, a byte with the number of axes, one big-endian uint32 per
axis, then the values, big-endian, in C order.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: str | Path) -> np.ndarray:
    """Read one IDX file into an array of its own shape, in native byte order.

    Gzip is recognised by content, not by name. Raises FileNotFoundError when there is no such file, and ValueError when
    it is not an IDX file or holds fewer or more bytes than its header announces.
    """
    path = Path(path)
    raw = _read_bytes(path)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _TYPES:
        raise ValueError(f"{path} is not an IDX file: it must start with 0, 0, type, axes; got {raw[:4].hex(' ')!r}")
    dtype = np.dtype(_TYPES[raw[2]])
    header = 4 + 4 * raw[3]
    if len(raw) < header:
        raise ValueError(f"{path} is truncated: its header needs {header} bytes, the file has {len(raw)}")
    shape = struct.unpack(f">{raw[3]}I", raw[4:header])
    expected = header + math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        fault = "truncated" if len(raw) < expected else "too long"
        raise ValueError(f"{path} is {fault}: shape {shape} needs {expected} bytes, the file has {len(raw)}")
    values = np.frombuffer(raw, dtype=dtype, offset=header).reshape(shape)
    return values.astype(dtype.newbyteorder("="))  # a copy: frombuffer's view is read-only


def find_idx(folder: str | Path, stem: str) -> Path | None:
    """The IDX file called `stem` or `stem`.gz in `folder` (plain first), or None."""
    for name in (stem, f"{stem}.gz"):
        path = Path(folder) / name
        if path.is_file():
            return path
    return None


def _read_bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    if not raw.startswith(_GZIP_MAGIC):
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged: gzip says {error}") from error
