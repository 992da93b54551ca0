"""ImageNet-1k photos where their owner keeps them: a folder per class, or the official validation archive."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lossk.recipes import RecipeError

TAR, DEVKIT = "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
SUFFIXES = (".jpeg", ".jpg", ".png")
Place = tuple[Path, int | None, int | None]  # file, and within an archive offset and length
_WNID = re.compile(r"n\d{8}$")

HOW_TO_GET = (
    "lossk ships no photos and downloads none. ImageNet-1k is to be had, free for research and after signing up, from "
    f"https://image-net.org/download.php: {TAR} (6.3 GB) and the development kit {DEVKIT}.tar.gz (2.5 MB). Put both "
    "into one folder, or sort the photos into a folder per class named by its wnid (n01440764/...), as torchvision's "
    "ImageFolder wants them, and give it as --set task_args.data=FOLDER"
)


@dataclass(frozen=True)
class Photos:
    """Photos with their classes, sorted by name.

    Attributes:
        names: of each photo, unique.
        labels: [N] int64, class numbers: positions in `class_wnids()`.
        places: of each photo: (file, offset, length); offset and length are None for a file of its own.
    """

    names: Sequence[str]
    labels: np.ndarray
    places: Sequence[Place]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int) -> bytes:
        """The encoded photo."""
        file, offset, length = self.places[number]
        if offset is None:
            return file.read_bytes()
        with file.open("rb") as archive:
            archive.seek(offset)
            return archive.read(length)

    def chosen(self, count: int | None, seed: int) -> Photos:
        """`count` of them, as evenly over the classes as they allow, at random; None is all. In the same order."""
        if count is None or count >= len(self):
            return self
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        shuffled = rng.permutation(len(self))
        shuffled = shuffled[np.argsort(self.labels[shuffled], kind="stable")]
        _, first, size = np.unique(self.labels[shuffled], return_index=True, return_counts=True)
        turn = np.concatenate([np.arange(n) for n in size])  # the how-manieth of its class
        order = rng.permutation(len(first))  # the classes that get one more than others
        class_of = np.repeat(np.arange(len(first)), size)
        rank = np.lexsort((order[class_of], turn))
        rows = np.sort(shuffled[rank[:count]])
        return Photos([self.names[i] for i in rows], self.labels[rows], [self.places[i] for i in rows])


def class_wnids() -> list[str]:
    """The 1,000 classes in the order every published ImageNet-1k network uses: "n" and the offset in WordNet 3.0."""
    return (Path(__file__).parent / "imagenet_wnids.txt").read_text().split()


def find_photos(data: str | Path) -> Photos:
    """Photos in any of three layouts, of which a class may be missing.

    `data`/nXXXXXXXX/*.JPEG (or `data`/val/nXXXXXXXX/...); `data`/ILSVRC2012_img_val.tar; or unpacked,
    `data`/ILSVRC2012_val_*.JPEG; the last two with the development kit, packed or unpacked, in the same folder. `data`
    may be the tar file itself.

    Raises RecipeError that says what is missing and where to get it.
    """
    data = Path(data)
    if not data.exists():
        raise RecipeError(f"data: there is no {data}. {HOW_TO_GET}")
    if data.is_file():
        return _official(data, data.parent)
    for folder in (data, data / "val"):
        found = sorted(f for f in folder.glob("n*") if f.is_dir() and _WNID.match(f.name))
        if found:
            return _class_folders(found)
    if (data / TAR).is_file():
        return _official(data / TAR, data)
    if any(data.glob("ILSVRC2012_val_*")):
        return _official(data, data)
    raise RecipeError(f"data: {data} holds neither class folders (n01440764, ...) nor {TAR}. {HOW_TO_GET}")


def _class_folders(folders: Sequence[Path]) -> Photos:
    number = {wnid: i for i, wnid in enumerate(class_wnids())}
    unknown = [folder.name for folder in folders if folder.name not in number]
    if unknown:
        raise RecipeError(f"data: {folders[0].parent} holds {unknown[0]}, which is no class of ImageNet-1k")
    files = [
        (file, number[folder.name])
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise RecipeError(f"data: the class folders in {folders[0].parent} hold no photos ({', '.join(SUFFIXES)})")
    names = [f"{file.parent.name}/{file.name}" for file, _ in files]
    return Photos(names, np.array([label for _, label in files]), [(file, None, None) for file, _ in files])


def _official(source: Path, folder: Path) -> Photos:
    """`source`: the archive, or a folder of its unpacked photos."""
    labels = _ground_truth(folder)
    found: list[tuple[str, Place]]
    if source.is_file():
        try:
            with tarfile.open(source, "r:") as archive:
                members = [m for m in archive if m.isfile() and Path(m.name).suffix.lower() in SUFFIXES]
        except tarfile.TarError as error:
            raise RecipeError(f"data: {source} is damaged: {error}; fetch it again. {HOW_TO_GET}") from error
        found = [(Path(m.name).name, (source, m.offset_data, m.size)) for m in members]
    else:
        found = [(f.name, (f, None, None)) for f in source.glob("ILSVRC2012_val_*") if f.suffix.lower() in SUFFIXES]
    found.sort(key=lambda item: item[0])
    if len(found) != len(labels):
        raise RecipeError(
            f"data: {source} holds {len(found):,} photos, but {TRUTH} the classes of {len(labels):,}; fetch both again"
        )
    return Photos([name for name, _ in found], labels, [place for _, place in found])


def _ground_truth(folder: Path) -> np.ndarray:
    """Class numbers [N] in the order of the photos' names, from the development kit."""
    from scipy.io import loadmat

    truth = np.array(_devkit_file(folder, TRUTH).decode().split(), dtype=np.int64)
    entries: Any = loadmat(io.BytesIO(_devkit_file(folder, META)), squeeze_me=True)["synsets"]
    wnid_of = {int(e["ILSVRC2012_ID"]): str(e["WNID"]) for e in np.atleast_1d(entries) if int(e["num_children"]) == 0}
    number = {wnid: i for i, wnid in enumerate(class_wnids())}
    strange = sorted({i for i in truth.tolist() if wnid_of.get(i) not in number})
    if strange:
        raise RecipeError(f"data: {TRUTH} names class {strange[0]}, which {META} does not know as one of ImageNet-1k")
    return np.array([number[wnid_of[i]] for i in truth.tolist()])


def _devkit_file(folder: Path, name: str) -> bytes:
    for path in (folder / name, folder / "data" / name, folder / DEVKIT / "data" / name):
        if path.is_file():
            return path.read_bytes()
    packed = folder / f"{DEVKIT}.tar.gz"
    if not packed.is_file():
        raise RecipeError(f"data: {folder} lacks the development kit, {packed.name} or {name} from it. {HOW_TO_GET}")
    with tarfile.open(packed) as archive:
        for member in archive:
            if Path(member.name).name == name:
                content = archive.extractfile(member)
                assert content is not None
                return content.read()
    raise RecipeError(f"data: {packed} holds no {name}; fetch it again. {HOW_TO_GET}")
