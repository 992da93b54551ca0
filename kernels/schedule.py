"""The order in which a persistent kernel visits the blocks of a triangle or a rectangle: no program without work.

Columns of blocks are taken GROUP at a time, and in a group row by row: the GROUP blocks that share rows run together,
as do rows that share the group's columns, so both come out of the L2 cache. For block columns [c, c + GROUP) of a
triangle the rows [0, c) come first, then the group's own small triangle. Block t of n (n + 1) / 2:

    GROUP = 2, n = 5:    0  1  3  5  .        (numbers are t, row by row; the last group is one column wide)
                            2  4  6  .
                               7  8  .
                                  9  .
                                     14
"""

import triton
import triton.language as tl


@triton.jit
def corner(t):
    """(row, column) of entry t of an upper triangle counted column by column: t = column (column + 1) / 2 + row."""
    column = ((tl.sqrt((8 * t + 1).to(tl.float64)) - 1.0) * 0.5).to(tl.int32)
    # The square root is rounded: it can be one off at the ends of a column.
    column = tl.where(column * (column + 1) // 2 > t, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= t, column + 1, column)
    return t - column * (column + 1) // 2, column


@triton.jit
def triangle_block(t, blocks, GROUP: tl.constexpr):
    """(row, column), row <= column, of block t < blocks (blocks + 1) / 2; int32, so fewer than 2^28 blocks."""
    t = tl.full([], 0, tl.int32) + t  # a loop's counter is a plain int in the interpreter
    _, column = corner(t)
    first = column // GROUP * GROUP
    width = tl.minimum(GROUP, blocks - first)
    inside = t - first * (first + 1) // 2
    row, offset = corner(tl.maximum(inside - first * width, 0))
    above = inside < first * width
    return tl.where(above, inside // width, first + row), first + tl.where(above, inside % width, offset)


@triton.jit
def rectangle_block(t, rows, columns, GROUP: tl.constexpr):
    """(row, column) of block t < rows columns, GROUP columns at a time."""
    t = tl.full([], 0, tl.int32) + t
    first = t // (rows * GROUP) * GROUP
    width = tl.minimum(GROUP, columns - first)
    inside = t - first * rows
    return inside // width, first + inside % width
