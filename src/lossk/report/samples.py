"""What is known of the samples themselves: labels, names, images, texts; and the file beside a store that keeps it.

A store holds numbers only. `lossk run` writes `STORE.samples.npz` beside it, so that a report can show the samples
without training the network again: NumPy arrays, read with pickling refused; strings are UTF-8 JSON.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lossk.checks import check_tensor, shown
from lossk.errors import LosskError
from lossk.recipes import RecipeTask, predict

THUMBNAIL = 64  # pixels of the longer side; larger images are reduced
BATCH = 1024  # images converted at a time


class SamplesError(LosskError):
    """A file of samples is damaged, or does not fit its store."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """All optional, and in the kernel's order."""

    labels: np.ndarray | None = None  # [N] int64, at least 0
    class_names: Sequence[str] = ()  # of label 0, 1, ...; a label without one shows its number
    images: np.ndarray | None = None  # [N, H, W] or [N, H, W, 3]; uint8, or floats in [0, 1]
    texts: Sequence[str] | None = None  # [N]
    predictions: np.ndarray | None = None  # [N] int64, the network's own answers
    held_out: np.ndarray | None = None  # [N] bool: the network was not trained on the sample
    notes: str = ""  # a line or two on the data

    def checked(self, num_samples: int) -> Samples:
        """The same with NumPy arrays of the right dtype.

        Raises:
            ValueError: a field has another length than `num_samples`, or cannot be what it is said to be.
        """
        held_out = None if self.held_out is None else as_array("held_out", self.held_out, num_samples).astype(bool)
        return Samples(
            labels=_integers("labels", self.labels, num_samples),
            class_names=_names(self.class_names),
            images=None if self.images is None else _images(self.images, num_samples),
            texts=_texts(self.texts, num_samples),
            predictions=_integers("predictions", self.predictions, num_samples),
            held_out=held_out,
            notes=str(self.notes),
        )

    def name_of(self, label: int) -> str:
        """A class's name, or its number."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else str(label)


def as_array(name: str, values: Any, num_samples: int) -> np.ndarray:
    """A one-dimensional array of N entries; tensors are taken too."""
    array = check_tensor(name, values, of="a real number").cpu().numpy()
    if array.shape != (num_samples,):
        raise ValueError(f"{name} must have shape [{num_samples}], one entry per sample, got {list(array.shape)}")
    return array


def _integers(name: str, values: Any, num_samples: int) -> np.ndarray | None:
    if values is None:
        return None
    array = as_array(name, values, num_samples)
    whole = np.issubdtype(array.dtype, np.integer) or (
        np.issubdtype(array.dtype, np.floating) and bool((array == np.round(array)).all())
    )
    if not whole or array.min() < 0:
        raise ValueError(f"{name} must be class numbers, integers from 0, got {array.dtype} from {array.min()}")
    return array.astype(np.int64)


def _names(names: Any) -> list[str]:
    if isinstance(names, str | bytes | Mapping) or not isinstance(names, Iterable) or getattr(names, "ndim", 1) != 1:
        raise TypeError(f"class_names must be a list of texts, got {shown(names)}")
    given = list(names)
    for name in given:
        if not isinstance(name, str | int | np.integer) or isinstance(name, bool):
            raise TypeError(f"class_names must be a list of texts, got {shown(name)} among them")
    return [str(name) for name in given]


def _texts(texts: Sequence[str] | None, num_samples: int) -> list[str] | None:
    if texts is None:
        return None
    if (
        isinstance(texts, str | bytes | Mapping)
        or not isinstance(texts, Sequence | np.ndarray)
        or getattr(texts, "ndim", 1) == 0
    ):
        raise TypeError(f"texts must be a list of texts, got {shown(texts)}")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"texts must be a list of texts, got {shown(texts)}")
    if len(texts) != num_samples:
        raise ValueError(f"texts must have one entry per sample, {num_samples}, got {len(texts)}")
    return [str(text) for text in texts]


def _images(images: Any, num_samples: int) -> np.ndarray:
    mapped = isinstance(images, np.memmap)  # read a part at a time
    array = images if mapped else check_tensor("images", images).cpu().numpy()
    shape = list(array.shape)
    if not (array.ndim == 3 or (array.ndim == 4 and shape[3] == 3)) or shape[0] != num_samples or 0 in shape:
        raise ValueError(f"images must be [{num_samples}, H, W] or [{num_samples}, H, W, 3], got {shape}")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"images must be uint8, or floats in [0, 1], got {array.dtype}")
    return array


def thumbnails(images: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Images as uint8, their longer side at most 64 pixels: [n, h, w] or [n, h, w, 3]. Needs Pillow to reduce them.

    Args:
        rows: of which images; None for all.

    Raises:
        ValueError: floats outside [0, 1].
    """
    rows = np.arange(len(images)) if rows is None else rows
    height, width = images.shape[1:3]
    shrink = min(1.0, THUMBNAIL / max(height, width))
    size = (max(round(height * shrink), 1), max(round(width * shrink), 1))
    out = np.empty((len(rows), *size, *images.shape[3:]), dtype=np.uint8)
    for start in range(0, len(rows), BATCH):
        part = _as_bytes(np.asarray(images[rows[start : start + BATCH]]))
        out[start : start + BATCH] = part if shrink == 1.0 else _reduced(part, size)
    return out


def _as_bytes(images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    low, high = float(images.min()), float(images.max())
    if not (low >= 0.0 and high <= 1.0):  # so written that NaN fails
        raise ValueError(f"images must be uint8, or floats in [0, 1], got floats from {low:g} to {high:g}")
    return np.round(images * 255.0).astype(np.uint8)


def _reduced(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    small = [Image.fromarray(image).resize(size[::-1], Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image) for image in small])


# -- the file beside a store ----------------------------------------------------------------------------------------


def samples_path(store: Path) -> Path:
    """Where the samples of a store lie: fashion.lossk has fashion.samples.npz."""
    return store.with_suffix(".samples.npz")


def samples_of(task: RecipeTask, num_samples: int) -> Samples | None:
    """What a recipe says of the kernel's rows; None where it says nothing of them."""
    texts = task.row_texts if task.row_texts is not None and len(task.row_texts) == num_samples else None
    if task.labels is None or len(task.labels) != num_samples:
        return None if texts is None else Samples(texts=texts, notes=task.notes).checked(num_samples)
    images = None if task.images is None else task.images.numpy()
    held_out = None if task.held_out is None else task.held_out.numpy()
    return Samples(
        labels=task.labels.numpy(),
        class_names=task.class_names,
        images=images,
        texts=texts,
        predictions=_answers(task),
        held_out=held_out,
        notes=task.notes,
    ).checked(num_samples)


def _answers(task: RecipeTask) -> np.ndarray | None:
    """The network's own answers, where its targets are the labels."""
    if not isinstance(task.samples, tuple) or task.labels is None or not torch.equal(task.samples[1], task.labels):
        return None
    return predict(task.model, task.samples[0], transform=task.transform).cpu().numpy()


def write_samples(samples: Samples, path: Path) -> None:
    """Write them in one step, replacing what is there; images as thumbnails."""
    arrays: dict[str, np.ndarray] = {"class_names": _encode(samples.class_names), "notes": _encode([samples.notes])}
    for name in ("labels", "predictions", "held_out"):
        value = getattr(samples, name)
        if value is not None:
            arrays[name] = value
    if samples.images is not None:
        arrays["images"] = thumbnails(samples.images)
    if samples.texts is not None:
        arrays["texts"] = _encode(samples.texts)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_samples(path: Path, num_samples: int) -> Samples:
    """Read what `write_samples` wrote, checked against N.

    Raises:
        SamplesError: the file is damaged or of another number of samples.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found: dict[str, Any] = {name: arrays[name] for name in arrays.files}
        for name in ("class_names", "texts"):
            if name in found:
                found[name] = json.loads(found[name].tobytes())
        if "notes" in found:
            found["notes"] = json.loads(found["notes"].tobytes())[0]
        return Samples(**found).checked(num_samples)
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise SamplesError(f"{str(path)!r} does not hold the samples of this store: {error}") from error


def _encode(strings: Sequence[str]) -> np.ndarray:
    return np.frombuffer(json.dumps(list(strings)).encode(), dtype=np.uint8)
