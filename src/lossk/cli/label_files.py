"""Files that people bring: classes and texts, one a line, and arrays. What is wrong is named with its file and line."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np

from lossk.analysis.tables import plain_cell
from lossk.forms.names import MOST_CLASSES, UNUSABLE

_INTEGER = re.compile(r"[+-]?[0-9]+")

Word = tuple[int, str]  # the line, from 1, and what stands there


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without their ends (\\n or \\r\\n) and without a byte-order mark.

    Raises:
        ValueError: no such file, or bytes that are not UTF-8, with their line.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{str(path)!r}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")  # not splitlines: a name may hold U+2028
    return lines if lines[-1] else lines[:-1]


def read_classes(path: Path) -> tuple[np.ndarray, list[str]]:
    """Classes [N] int64 from 0 and their names, empty where the file has numbers; names count in alphabetical order.

    Args:
        path: .npy of integers [N]; .csv of one column, or with a heading and a column `label`; else one class a line.

    Raises:
        ValueError: naming the file and the line.
    """
    if path.suffix == ".npy":
        return _classes_of_array(path), []
    words = _column(path) if path.suffix == ".csv" else list(enumerate(map(str.strip, read_lines(path)), 1))
    while words and not words[-1][1]:
        words.pop()
    if not words:
        raise ValueError(f"{str(path)!r} is empty")
    for line, word in words:
        if not word:
            raise ValueError(f"{str(path)!r}, line {line} is empty, and must hold a class")
        found = UNUSABLE.search(word)
        if found:
            raise ValueError(f"{str(path)!r}, line {line} holds the control character {found.group()!r}")
    if any(_is_number(word) for _, word in words) and all(_is_number(word, special=True) for _, word in words):
        return np.array([_class_number(path, line, word) for line, word in words], dtype=np.int64), []
    names, numbers = np.unique(np.array([word for _, word in words], dtype=object), return_inverse=True)
    return numbers.astype(np.int64), [str(name) for name in names]


def read_array(path: Path) -> np.ndarray:
    """An .npy file, mapped rather than read, pickling refused.

    Raises:
        ValueError: naming the file, it is none.
    """
    if path.suffix != ".npy":
        raise ValueError(f"{str(path)!r} must be an .npy file")
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    try:
        return np.lib.format.open_memmap(path, mode="r")  # never more than the file holds, whatever its heading says
    except (ValueError, EOFError, OSError, OverflowError) as error:
        raise ValueError(f"{str(path)!r} is no .npy file of numbers: {error}") from error


def _classes_of_array(path: Path) -> np.ndarray:
    values = read_array(path)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"{str(path)!r} must hold integers [N], got {values.dtype} {list(values.shape)}")
    wrong = np.flatnonzero((values < 0) | (values >= MOST_CLASSES))  # before the cast, which wraps uint64
    if len(wrong):
        raise ValueError(f"{str(path)!r}, element {wrong[0]}: {_rule(str(values[wrong[0]]))}")
    return np.asarray(values).astype(np.int64)


def _column(path: Path) -> list[Word]:
    lines = read_lines(path)
    reader = csv.reader([line + "\n" for line in lines], strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise ValueError(f"{str(path)!r}, line {reader.line_num} is no CSV: {error}") from error
    column = 0
    if rows and "label" in rows[0][1]:
        column, rows = rows[0][1].index("label"), rows[1:]
    elif rows and len(rows[0][1]) > 1:
        raise ValueError(f"{str(path)!r} must have one column, or a heading with a column 'label', got {rows[0][1]}")
    for line, row in rows:
        if row and len(row) <= column:
            raise ValueError(f"{str(path)!r}, line {line} has no column {column}")
    return [(line, plain_cell(row[column]).strip() if row else "") for line, row in rows]


def _is_number(word: str, *, special: bool = False) -> bool:
    """Whether it reads as a number, 1e400 and 0.5 included; `special`: as do nan and inf."""
    try:
        float(word)
    except ValueError:
        return False
    return special or any(character.isdigit() for character in word)


def _class_number(path: Path, line: int, word: str) -> int:
    if _INTEGER.fullmatch(word) and len(word) < 20 and 0 <= int(word) < MOST_CLASSES:
        return int(word)
    raise ValueError(f"{str(path)!r}, line {line}: {_rule(word)}")


def _rule(value: str) -> str:
    shown = value if len(value) <= 40 else f"{value[:40]}..."
    return f"a class number must be an integer, at least 0 and less than {MOST_CLASSES:,}, got {shown}"
