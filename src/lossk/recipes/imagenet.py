"""Recipe: ImageNet-1k validation photos and a pretrained network, Inception-v1 unless another is named.

The photos are the user's to supply (`lossk.recipes.photos`); they are decoded once into a cache that is mapped into
memory (`lossk.recipes.photo_cache`), and normalised batch by batch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lossk.analysis.wordnet import DEBIAN_FOLDER, require_wordnet
from lossk.recipes import RecipeError, RecipeTask
from lossk.recipes.defaults import usual_defaults
from lossk.recipes.networks import Network, load_network
from lossk.recipes.photo_cache import cached_photos
from lossk.recipes.photos import class_wnids, find_photos
from lossk.settings import check_integer, check_number

WORDNET = f"{DEBIAN_FOLDER}/data.noun"  # Debian package wordnet-base: WordNet 3.0
THUMBNAIL = 32  # pixels
MOST_THUMBNAILS = 20_000


@usual_defaults()
def make_task(
    *,
    data: str | Path = "imagenet",
    network: str = "googlenet",
    weights: str | Path | None = None,
    num_probe: int | None = 10_000,
    train: str | Path | None = None,
    num_train: int = 20_000,
    cache: str | Path = "imagenet-cache",
    seed: int = 0,
    required_accuracy: float = 0.5,
    batch_size: int = 64,
    wordnet: bool = True,
) -> RecipeTask:
    """Load the network; probe `num_probe` validation photos, as evenly over the classes as they allow.

    Args:
        data: the validation photos, in any layout that `find_photos` knows.
        network, weights: as `load_network` takes them.
        num_probe: photos; 10,000 in the paper (arXiv 2509.26537); None is all, 50,000.
        train: training photos, a folder per class; `num_train` of them define the training loss. None: the probe does,
            which the network has not been trained on: its gradient there is not quite zero.
        cache: folder of decoded photos, 150 kB each at 224 x 224 (7.5 GB for 50,000).
        required_accuracy: top-1, of the probe; RecipeError below it.
        batch_size: photos in a pass that measures accuracy.
        wordnet: name the classes' synsets, so that `lossk run` aligns the kernel with WordNet and draws its map; needs
            lossk[analysis] and WordNet (Debian's wordnet-base), of which LosskError says what is missing.
    """
    check_number("required_accuracy", required_accuracy, "a number", least=0.0)
    if num_probe is not None:
        check_integer("num_probe", num_probe, 2)
    if wordnet:
        require_wordnet()
    found = find_photos(data).chosen(num_probe, seed)  # cheap, and says what is missing, before the network is loaded
    others = None if train is None else find_photos(train).chosen(num_train, seed)
    loaded = load_network(network, weights)
    photos = torch.from_numpy(cached_photos(found, cache, loaded.cut))  # [N, 3, S, S] uint8
    labels = torch.from_numpy(found.labels)
    accuracy = top1(loaded, photos, labels, batch_size)
    if not accuracy >= required_accuracy:
        raise RecipeError(
            f"imagenet: {network} has a top-1 accuracy of {accuracy:.1%} on the {len(found):,} photos, below the "
            f"{required_accuracy:.0%} asked for: the photos, their classes or the weights are not what they should be "
            "(task_args: required_accuracy)"
        )
    training = None
    if others is not None:
        training = (torch.from_numpy(cached_photos(others, cache, loaded.cut)), torch.from_numpy(others.labels))
    whose = "the probe itself" if training is None else f"{len(training[1]):,} training photos"
    return RecipeTask(
        model=loaded.model,
        samples=(photos, labels),
        train=training,
        transform=loaded.normalise,
        labels=labels,
        images=thumbnails(photos) if len(photos) <= MOST_THUMBNAILS else None,
        class_names=class_names(),
        held_out=torch.ones(len(labels), dtype=torch.bool, device="cpu"),
        held_out_accuracy=accuracy,
        notes=f"ImageNet-1k: {len(labels):,} validation photos of {len(labels.unique()):,} classes, {network}\n"
        f"the training loss is over {whose}",
        synsets=class_wnids() if wordnet else None,
    )


@torch.inference_mode()
def top1(network: Network, photos: Tensor, labels: Tensor, batch_size: int) -> float:
    """Share of the photos [N, 3, S, S] uint8 whose class [N] has the largest logit."""
    right = 0
    for batch, wanted in zip(photos.split(batch_size), labels.split(batch_size), strict=True):
        right += int((network.model(network.normalise(batch)).argmax(dim=1) == wanted).sum())
    return right / len(labels)


def thumbnails(photos: Tensor) -> Tensor:
    """[N, t, t, 3] float32 in [0, 1], t = 32: averages of the photos [N, 3, S, S] uint8."""
    parts = [torch.nn.functional.adaptive_avg_pool2d(part.float() / 255.0, THUMBNAIL) for part in photos.split(256)]
    return torch.cat(parts).permute(0, 2, 3, 1).contiguous()


def class_names() -> list[str]:
    """A word for each of the 1,000 classes, from WordNet where Debian's wordnet-base is installed; else its wnid."""
    wnids, path = class_wnids(), Path(WORDNET)
    if not path.is_file():
        return wnids
    names = []
    with path.open("rb") as file:
        for wnid in wnids:
            file.seek(int(wnid[1:]))  # a synset's offset is its place in the file
            fields = file.readline().decode("ascii").split()
            is_it = len(fields) > 4 and fields[0] == wnid[1:]
            names.append(fields[4].replace("_", " ") if is_it else wnid)
    return names
