"""Ids and classes of a kernel's rows in its store: arrays `ids` and `labels`, and `class_names` of config.json.

Texts are UTF-8 in rows of equal length, zeros after them: [sample, byte] int8. Integers are [sample] int64.
"""

from __future__ import annotations

import numpy as np

from lossk.errors import StoreError
from lossk.forms.names import Names, pack_texts, unpack_texts
from lossk.store.opened import OpenStore


def named_arrays(names: Names) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    """What is written of them: values and dimensions by the array's name."""
    found: dict[str, tuple[np.ndarray, tuple[str, ...]]] = {}
    if names.ids is not None:
        texts = names.ids.dtype.kind == "U"
        found["ids"] = (pack_texts(names.ids), ("sample", "byte")) if texts else (names.ids, ("sample",))
    if names.labels is not None:
        found["labels"] = (names.labels, ("sample",))
    return found


def read_stored_names(store: OpenStore) -> Names:
    """Those of a store; none in one of an earlier version.

    Raises:
        StoreError: an array is damaged, or does not fit the names of its classes.
    """
    ids = store.read("ids") if "ids" in store.specs else None
    labels = store.read("labels") if "labels" in store.specs else None
    try:
        ids = unpack_texts(ids) if ids is not None and ids.ndim == 2 else ids
    except ValueError as error:
        raise StoreError(f"the store's array 'ids' in {str(store.path)!r} is damaged: {error}") from error
    class_names = tuple(store.config.get("class_names") or ())
    if labels is not None and (labels.min() < 0 or (class_names and labels.max() >= len(class_names))):
        raise StoreError(f"the store's array 'labels' in {str(store.path)!r} is damaged: a class has no name")
    return Names(ids, labels, class_names if labels is not None else ())
