"""What a kernel's methods take of memory beyond the kernel held, foreseen from its shape, and refused in words."""

from __future__ import annotations

from lossk.available import available, gigabytes
from lossk.forms.blocks import Blocks

FREE_SHARE = 0.9  # of the free memory, that a call may take
SMALL = 2**24  # bytes that are there: blocks are read by the thousand, and asking takes longer than reading
INSIDE = 6_000_000  # bytes that BLAS and LAPACK work in and keep, and holes that the C library leaves in its heap
BAND = 512  # rows that are ranked, or multiplied in float64, at a time
PAGE_BYTES = 40_000_000  # the plotting script, thrice, and the page around it
MOST_GROUPS = 1000  # of samples, whose sums of R a bootstrap draws from; more only where there are more classes
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
    """Running neighbors of all samples, or of some; a tile and what is made of it."""
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


def check_class_means(num_samples: int, side: int, classes: int, replicates: int) -> None:
    """Sums of R between classes from blocks of `side` samples, and the replicates of their means."""
    needed = _class_means_bytes(num_samples, side, classes) + 8 * replicates * classes * classes
    refuse(needed, f"means between {classes} classes need", "fewer classes, or replicates, need less")


def _class_means_bytes(num_samples: int, side: int, classes: int) -> int:
    """[groups, groups] sums in float64 and their halves; a block in float64, what it is made of, its sums by row."""
    side, groups = min(side, num_samples), min(max(MOST_GROUPS, 2 * classes), num_samples)
    return 80 * groups * groups + 24 * side * side + 16 * groups * side


def check_report(num_samples: int, side: int, draws: int, bins: int, classes: int) -> None:
    """What a page shows of each sample, the dearest of its steps, and the page.

    Args:
        side: of a tile.
        draws: rows of the factor; 0 of a kernel in tiles.
        bins: a side of the matrix.
        classes: 0 where there are no labels.
    """
    n, side = num_samples, min(side, num_samples)
    matrix = 48 * bins * bins + 12 * side * side + 8 * bins * side
    sums = _class_means_bytes(n, side, classes) + 4 * bins * bins if classes else 0
    needed = 2_000 * n + max(matrix, sums) + 8 * draws * side + PAGE_BYTES
    refuse(needed, f"a report on {n} samples needs", "a kernel of fewer samples needs less")


def _stripes(blocks: Blocks, count: int) -> int:
    """Stripes of a factor, in float32."""
    rows = getattr(blocks, "num_rows", 0)
    return 4 * count * rows * min(blocks.tile, blocks.num_samples)
