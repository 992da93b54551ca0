"""What the rows of a kernel are called by whoever made it: an id of each row, and its class."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from lossk.checks import check_tensor, shown

MOST_CLASSES = 1_000_000  # class numbers lie below: tables of counts have an entry for each
MOST_BYTES = 256  # of an id, in UTF-8
UNUSABLE = re.compile(
    r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]"
)  # terminals obey control characters; UTF-8 has no surrogates


@dataclass(frozen=True)
class Names:
    """Ids and classes of N rows; None where nobody gave any."""

    ids: np.ndarray | None = None  # [N] int64 or text, each another
    labels: np.ndarray | None = None  # [N] int64, class numbers from 0
    class_names: tuple[str, ...] = ()  # of class 0, 1, ...; empty where classes are numbers

    def __len__(self) -> int:
        """N, or 0 of no names."""
        return len(next((part for part in (self.ids, self.labels) if part is not None), ()))

    def class_of(self, row: int) -> str:
        """The name of a row's class, or its number; empty without labels."""
        if self.labels is None:
            return ""
        return self.class_names[self.labels[row]] if self.class_names else str(self.labels[row])

    def row(self, row: int) -> str:
        """A row as people call it: its id, or its number; and its class."""
        name = str(row if self.ids is None else self.ids[row])
        return f"{name} ({self.class_of(row)})" if self.labels is not None else name

    def columns(self, prefix: str, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Columns `PREFIXid` and `PREFIXlabel` of a table, for rows [m] int64; row -1 is none, and has empty texts."""
        found = {}
        for what, values in (("id", self.ids), ("label", self._class_texts())):
            if values is not None:
                part = values[np.maximum(rows, 0)]
                found[f"{prefix}{what}"] = np.where(rows < 0, "", part.astype(str)) if (rows < 0).any() else part
        return found

    def _class_texts(self) -> np.ndarray | None:
        if self.labels is None or not self.class_names:
            return self.labels
        return np.asarray(self.class_names)[self.labels]

    def check(self, num_samples: int) -> Names:
        """The same.

        Raises:
            ValueError: other than one entry for each row.
        """
        for name, values in (("ids", self.ids), ("labels", self.labels)):
            if values is not None and len(values) != num_samples:
                raise ValueError(f"{name} must have one entry for each of the {num_samples} rows, got {len(values)}")
        return self


def read_names(ids: Any = None, labels: Any = None) -> Names:
    """What a user gives, checked but for its length.

    Args:
        ids: integers or texts, each another.
        labels: integers from 0, or texts, which are numbered in alphabetical order.

    Raises:
        TypeError, ValueError: something else; an id that is there twice.
    """
    given = None if ids is None else _ids(ids)
    if labels is None:
        return Names(given)
    words = _texts("labels", labels)
    if words is None:
        numbers = _integers("labels", labels)
        wrong = numbers[(numbers < 0) | (numbers >= MOST_CLASSES)]
        if len(wrong):
            raise ValueError(f"labels must be at least 0 and less than {MOST_CLASSES:,}, got {wrong[0]}")
        return Names(given, numbers)
    names, numbers = np.unique(words, return_inverse=True)
    return Names(given, numbers.astype(np.int64), tuple(str(name) for name in names))


def _ids(ids: Any) -> np.ndarray:
    words = _texts("ids", ids)
    values = _integers("ids", ids) if words is None else words
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) < len(values):
        raise ValueError(f"ids must each be another, got {distinct[counts > 1][0]!r} {counts[counts > 1][0]} times")
    return values


def _texts(name: str, values: Any) -> np.ndarray | None:
    """Texts [N]; None where the first entry is no text."""
    several = hasattr(values, "__iter__") and hasattr(values, "__len__") and getattr(values, "ndim", 1) == 1
    if isinstance(values, str | bytes) or not several:
        raise TypeError(f"{name} must be integers or texts, one for each row, got {shown(values)}")
    words = values.tolist() if isinstance(values, np.ndarray) else list(values)
    if not words or not isinstance(words[0], str):
        return None
    for word in words:
        if not isinstance(word, str):
            raise TypeError(f"{name} must be all texts or all integers, got {shown(word)} among texts")
        if not word or len(word.encode(errors="replace")) > MOST_BYTES or UNUSABLE.search(word):
            raise ValueError(
                f"{name} must be texts of 1 to {MOST_BYTES} bytes without control characters, got {shown(word)}"
            )
    return np.array(words, dtype=np.str_)


def _integers(name: str, values: Any) -> np.ndarray:
    found = check_tensor(name, values, of="an integer or a flag").cpu()
    if found.ndim != 1 or found.is_floating_point() or str(found.dtype) == "torch.bool":
        raise TypeError(f"{name} must be integers or texts [N], got {found.dtype} {list(found.shape)}")
    return found.long().numpy()


def pack_texts(texts: np.ndarray) -> np.ndarray:
    """[N, width] int8: UTF-8, zeros after it."""
    encoded = np.char.encode(texts, "utf-8")
    return encoded.view(np.int8).reshape(len(texts), encoded.dtype.itemsize)


def unpack_texts(packed: np.ndarray) -> np.ndarray:
    """[N] texts from what `pack_texts` made.

    Raises:
        ValueError: they are not UTF-8.
    """
    packed = np.ascontiguousarray(packed)
    return np.char.decode(packed.view(f"S{packed.shape[1]}").reshape(len(packed)), "utf-8")
