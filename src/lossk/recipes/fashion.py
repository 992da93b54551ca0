"""Recipe: Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747): 70,000 real 28 x 28 images of ten kinds of clothing.

Reads the four IDX files, plain or gzipped, from any folder; Debian's package dataset-fashion-mnist installs them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from lossk.checks import check_integer, check_optional, check_path, check_place
from lossk.recipes import RecipeError, RecipeTask, require_accuracy, train_classifier
from lossk.recipes.arguments import MOST_EPOCHS, check_seed, check_share
from lossk.recipes.defaults import usual_defaults
from lossk.recipes.idx import find_idx, read_idx

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@usual_defaults()
def fashion_cnn() -> nn.Module:
    """28 x 28 -> 10 classes, 49,138 parameters. Strides instead of pooling: half the time of either pass on a CPU."""

    def block(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 24, 5), *block(24, 48, 3), *block(48, 64, 3), nn.Flatten(), nn.Linear(64 * 4 * 4, 10)
    )


@usual_defaults()
def make_task(
    *,
    data: str | Path = DEBIAN_FOLDER,
    seed: int = 0,
    epochs: int = 5,
    required_accuracy: float = 0.90,
    num_train: int | None = None,
    num_probe: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoints: str | Path | None = None,
) -> RecipeTask:
    """Train on the training images, probe the test images (the first `num_train` and `num_probe` of them, if given).

    About a minute of work on two cores. With `checkpoint`, the trained weights are read from that file if it exists
    and written there if it does not. With `checkpoints`, a folder, those before the first epoch and after each one are
    kept there, and `lossk run` follows the kernel through them. Raises RecipeError when the data is missing, or when
    test accuracy is below `required_accuracy`.
    """
    if checkpoint is not None and checkpoints is not None:
        raise ValueError(
            "checkpoint and checkpoints must not be given together: the folder holds the trained weights too"
        )
    data, checkpoint = check_place("data", data), check_optional(check_path, "checkpoint", checkpoint)
    checkpoints = check_optional(check_place, "checkpoints", checkpoints)
    seed, epochs = check_seed(seed), check_integer("epochs", epochs, 0, MOST_EPOCHS)
    required_accuracy = check_share("required_accuracy", required_accuracy)
    num_train = check_optional(check_integer, "num_train", num_train, 1)
    num_probe = check_optional(check_integer, "num_probe", num_probe, 1)
    train_images, train_labels, images, labels = read_fashion(data)
    train_images, train_labels = train_images[:num_train], train_labels[:num_train]
    # Normalised by the training set's own mean and deviation, so that any IDX folder of 28 x 28 images will do.
    mean, std = train_images.mean(), train_images.std()
    train_inputs, inputs = (((part - mean) / std).unsqueeze(1) for part in (train_images, images))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = fashion_cnn()
    kept = [] if checkpoints is None else epoch_files(checkpoints, epochs, seed, len(train_labels))
    wanted = kept or ([] if checkpoint is None else [Path(checkpoint)])
    if wanted and all(path.exists() for path in wanted):
        model.load_state_dict(torch.load(wanted[-1], weights_only=True))
        model.eval()
    else:

        def after(epoch: int, loss: float) -> None:
            print(f"epoch {epoch} of {epochs}: loss {loss:.3f}", file=sys.stderr)
            if kept:
                torch.save(model.state_dict(), kept[epoch])

        if kept:
            kept[0].parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), kept[0])
        train_classifier(
            model, train_inputs, train_labels, epochs=epochs, batch_size=256, lr=1e-2, weight_decay=0.05, seed=seed,
            each_epoch=after,
        )  # fmt: skip
        if checkpoint is not None:
            torch.save(model.state_dict(), checkpoint)
    accuracy = require_accuracy(model, inputs, labels, at_least=required_accuracy, what="Fashion-MNIST")

    probe = slice(0, num_probe)
    return RecipeTask(
        model=model,
        samples=(inputs[probe], labels[probe]),
        train=(train_inputs, train_labels),
        labels=labels[probe],
        images=images[probe],
        class_names=CLASSES,
        held_out=torch.ones(len(labels[probe]), dtype=torch.bool, device="cpu"),
        held_out_accuracy=accuracy,
        notes=f"Fashion-MNIST: {len(train_labels):,} training images; the probe is {len(labels[probe]):,} test images",
        checkpoints=kept[:-1],
    )


def epoch_files(folder: str | Path, epochs: int, seed: int, num_train: int) -> list[Path]:
    """Where the weights before the first epoch and after each lie: epochs + 1 files, named by what they depend on."""
    return [Path(folder) / f"seed{seed}-train{num_train}-epoch{epoch}of{epochs}.pt" for epoch in range(epochs + 1)]


def read_fashion(folder: str | Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [n, 28, 28] float32 in [0, 1] and labels [n] int64, then the test ones.

    Raises RecipeError naming what is missing, or what does not fit together.
    """
    found = {stem: find_idx(folder, stem) for stem in STEMS}
    missing = [stem for stem, path in found.items() if path is None]
    if missing:
        raise RecipeError(
            f"{folder} holds no {', '.join(missing)} (plain or .gz); on Debian or Ubuntu: apt-get install "
            "dataset-fashion-mnist; elsewhere: --set task_args.data=FOLDER, with the four IDX files in it"
        )
    train_images, train_labels, images, labels = (
        torch.from_numpy(read_idx(path)) for path in found.values() if path is not None
    )
    for name, pictures, numbers in (("train", train_images, train_labels), ("t10k", images, labels)):
        if pictures.ndim != 3 or tuple(pictures.shape[1:]) != (28, 28) or numbers.shape != pictures.shape[:1]:
            raise RecipeError(
                f"{folder}: {name} must be images [n, 28, 28] with labels [n], got {list(pictures.shape)} and "
                f"{list(numbers.shape)}"
            )
    return train_images.float() / 255.0, train_labels.long(), images.float() / 255.0, labels.long()
