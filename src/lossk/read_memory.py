"""What a kernel's methods take of memory beyond the kernel held, foreseen from its shape, and refused in words."""

from __future__ import annotations

from lossk.available import available, gigabytes
from lossk.blocks import Blocks

FREE_SHARE = 0.9  # of the free memory, that a call may take
SMALL = 2**24  # bytes that are there: blocks are read by the thousand, and asking takes longer than reading
INSIDE = 6_000_000  # bytes that BLAS and LAPACK work in and keep, and holes that the C library leaves in its heap
BAND = 512  # rows that are ranked, or multiplied in float64, at a time
RANKED = 40  # bytes an entry of a band that is ranked: its keys, copies of them, the sorted ones


def refuse(needed: int, what: str, instead: str) -> None:
    """Raise MemoryError, with the sizes, where `needed` bytes are more than a call may take.

    Args:
        what: the subject of the message, with its verb.
        instead: what would need less.
    """
    if needed < SMALL:
        return
    room, needed = available(), needed + INSIDE
    if needed > FREE_SHARE * room.count:
        raise MemoryError(f"{what} {gigabytes(needed)} and {room.in_words()}; {instead}")


def check_block(blocks: Blocks, rows: int, columns: int) -> None:
    """A block that is read at once, where it is diagonal, and a tile's part of it with its cast; or the factor's."""
    side = min(blocks.tile, blocks.num_samples)
    part = 8 * min(rows, side) * min(columns, side) if blocks.kind == "tiles" else 0
    factor = 8 * getattr(blocks, "num_rows", 0) * (rows + columns)
    refuse(6 * rows * columns + part + factor, f"a block of {rows} x {columns} needs", "read smaller blocks")


def check_dense(blocks: Blocks) -> None:
    """The whole matrix, and a tile on its way into it."""
    n, side = blocks.num_samples, min(blocks.tile, blocks.num_samples)
    refuse(4 * n * n + 8 * side * side + _stripes(blocks, 2), f"the {n} x {n} matrix needs", "read smaller blocks")


def check_neighbors(blocks: Blocks, k: int, rows: int | None) -> None:
    """Running neighbours of all samples, or of some; a tile and what is made of it."""
    count = blocks.num_samples if rows is None else rows
    side = min(blocks.tile, blocks.num_samples)
    height = side if rows is None else min(rows, 4096)
    working = 13 * height * side + RANKED * min(BAND, height) * (side + k) + _stripes(blocks, 2)
    fewer = "" if rows is not None else "rows= of fewer samples, or "
    refuse(48 * count * k + working, f"{k} neighbors of {count} samples need", f"{fewer}a smaller k would need less")


def matvec_bytes(blocks: Blocks, vectors: int) -> int:
    """The scaled vectors, their products, and a tile or stripe in float64."""
    side = min(blocks.tile, blocks.num_samples)
    tile = 8 * side * side + 16 * min(2 * BAND, side) * side if blocks.kind == "tiles" else _stripes(blocks, 3)
    return 40 * blocks.num_samples * vectors + tile


def check_matvec(blocks: Blocks, vectors: int) -> None:
    """K v of some vectors."""
    refuse(
        matvec_bytes(blocks, vectors), f"a product with {vectors} vectors needs", "fewer vectors at a time need less"
    )


def check_eigenpairs(blocks: Blocks, k: int, way: str) -> None:
    """The k largest eigenvalues and their vectors.

    Args:
        way: "gram", "dense" or "iterative".
    """
    n, draws = blocks.num_samples, getattr(blocks, "num_rows", 0)
    needed = {
        "gram": 8 * 6 * draws * draws + 56 * n * k + _stripes(blocks, 3),
        "dense": 8 * 5 * n * n + matvec_bytes(blocks, n),
        "iterative": 8 * 3 * n * max(2 * k + 1, 20) + matvec_bytes(blocks, 1),
    }[way]
    refuse(needed, f"{k} eigenvectors of {n} samples need", "a smaller k needs less")


def _stripes(blocks: Blocks, count: int) -> int:
    """Stripes of a factor, in float32."""
    rows = getattr(blocks, "num_rows", 0)
    return 4 * count * rows * min(blocks.tile, blocks.num_samples)
