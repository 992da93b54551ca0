"""Photos decoded once, to uint8 arrays in a file that is mapped into memory.

    photos-KEY.npy    [N, 3, S, S] uint8, a plain NumPy file          photos-KEY.json   what it holds, with checksums
    photos-KEY.part, photos-KEY.log     the same while it is being made: a line for every CHUNK photos that are durable

KEY is a digest of the photos' names and places and of how they are cut, so another choice is another file. Killed at
any moment, the next call goes on after the last durable chunk.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from tqdm import tqdm

from lossk.disk.files import read_json, read_lines, sync, write_json
from lossk.recipes import RecipeError
from lossk.recipes.photos import Photos

CHUNK = 64  # photos between two commits


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a photo becomes a square: its shorter side to `resize` pixels, then the central `size` x `size`."""

    size: int = 224
    resize: int = 256
    interpolation: str = "bilinear"  # or "bicubic"


def decode(content: bytes, cut: Cut) -> np.ndarray:
    """[3, S, S] uint8 of an encoded photo of any mode. Raises ValueError for what is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable photo: {error}") from error
    scale = cut.resize / min(image.size)
    width, height = (max(round(side * scale), cut.resize) for side in image.size)
    image = image.resize((width, height), Image.Resampling[cut.interpolation.upper()])
    left, top = round((width - cut.size) / 2), round((height - cut.size) / 2)
    image = image.crop((left, top, left + cut.size, top + cut.size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def cached_photos(photos: Photos, folder: str | Path, cut: Cut) -> np.ndarray:
    """The decoded photos [N, 3, S, S] uint8, from the cache in `folder`, or into it first.

    The array is mapped copy-on-write: writing to it does not change the file.

    Raises:
        RecipeError: a photo cannot be read, the disk is too small, or the cache is damaged; it is named.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    key = _key(photos, cut)
    done, manifest = folder / f"photos-{key}.npy", folder / f"photos-{key}.json"
    if not manifest.exists():
        _make(photos, cut, done, manifest)
    found = np.load(done, mmap_mode="c")
    sums = read_json(manifest)["crc32c"]
    if found.shape != _shape(photos, cut) or len(sums) != len(range(0, len(photos), CHUNK)):
        raise RecipeError(f"{done} is damaged: it holds {list(found.shape)}; delete it and {manifest.name}")
    for number, start in enumerate(range(0, len(photos), CHUNK)):
        if google_crc32c.value(found[start : start + CHUNK].tobytes()) != sums[number]:
            raise RecipeError(f"{done} is damaged at photo {start}: delete it and {manifest.name}, and run again")
    return found


def _make(photos: Photos, cut: Cut, done: Path, manifest: Path) -> None:
    part, log = done.with_suffix(".part"), done.with_suffix(".log")
    committed = read_lines(log) if part.exists() else []
    if not committed:
        _require_space(done.parent, photos, cut)
        log.unlink(missing_ok=True)
        np.lib.format.open_memmap(part, "w+", np.uint8, _shape(photos, cut)).flush()
    pixels = np.lib.format.open_memmap(part, "r+")
    with (
        log.open("ab") as lines,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(photos), initial=len(committed) * CHUNK, desc="decoding photos", unit="photo") as bar,
    ):
        for start in range(len(committed) * CHUNK, len(photos), CHUNK):
            numbers = range(start, min(start + CHUNK, len(photos)))
            for number, one in zip(numbers, pool.map(lambda n: _decoded(photos, n, cut), numbers), strict=True):
                pixels[number] = one
            pixels.flush()
            committed.append(google_crc32c.value(pixels[start : start + CHUNK].tobytes()))
            lines.write(json.dumps(committed[-1]).encode() + b"\n")
            lines.flush()
            os.fsync(lines.fileno())
            bar.update(len(numbers))
    del pixels
    part.replace(done)
    sync(done.parent)
    write_json(manifest, {"photos": len(photos), "cut": asdict(cut), "chunk": CHUNK, "crc32c": committed})
    log.unlink()


def _decoded(photos: Photos, number: int, cut: Cut) -> np.ndarray:
    try:
        return decode(photos.read(number), cut)
    except ValueError as error:
        raise RecipeError(f"data: {photos.names[number]}: {error}") from error


def _shape(photos: Photos, cut: Cut) -> tuple[int, int, int, int]:
    return len(photos), 3, cut.size, cut.size


def _key(photos: Photos, cut: Cut) -> str:
    plain = [asdict(cut), CHUNK, list(photos.names), [[str(p.resolve()), o, n] for p, o, n in photos.places]]
    return hashlib.blake2b(json.dumps(plain).encode(), digest_size=8).hexdigest()


def _require_space(folder: Path, photos: Photos, cut: Cut) -> None:
    needed, free = len(photos) * 3 * cut.size**2, shutil.disk_usage(folder).free
    if needed > free:
        raise RecipeError(
            f"cache: {folder} has {free / 1e9:.1f} GB free, the decoded photos need {needed / 1e9:.1f} GB; "
            "--set task_args.cache=FOLDER names another, num_probe fewer photos"
        )
