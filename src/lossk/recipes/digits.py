"""Recipe: scikit-learn's digits, 1,797 real 8 x 8 images that ship inside scikit-learn, so nothing is downloaded.

E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998); scikit-learn ships the test part of it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lossk.checks import check_integer, check_number
from lossk.recipes import RecipeTask, require_accuracy, train_classifier
from lossk.recipes.arguments import MOST_EPOCHS, check_seed, check_share
from lossk.recipes.defaults import usual_defaults


@usual_defaults()
def small_cnn() -> nn.Module:
    """8 x 8 -> 10 classes in 9,930 parameters; no batch norm and no dropout, so eval mode changes nothing."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


@usual_defaults()
def make_task(
    *, seed: int = 0, epochs: int = 15, weight_decay: float = 0.3, required_accuracy: float = 0.97
) -> RecipeTask:
    """Train on a stratified 80 % of the images; probe all of them, training images first, then held-out ones.

    Seconds of work. Raises RecipeError when held-out accuracy is below `required_accuracy`, and ModuleNotFoundError
    without scikit-learn.
    """
    seed, epochs = check_seed(seed), check_integer("epochs", epochs, 0, MOST_EPOCHS)
    weight_decay = check_number("weight_decay", weight_decay, least=0.0)
    required_accuracy = check_share("required_accuracy", required_accuracy)
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = np.arange(len(digits.target))
    train_rows, held_out_rows = train_test_split(rows, test_size=0.2, stratify=digits.target, random_state=seed)
    num_train = len(train_rows)
    order = torch.from_numpy(np.concatenate([train_rows, held_out_rows]))
    images = torch.from_numpy(digits.images).float()[order] / 16.0  # [N, 8, 8]
    labels = torch.from_numpy(digits.target).long()[order]  # [N]
    inputs = images.unsqueeze(1)  # [N, 1, 8, 8]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = small_cnn()
    train_inputs, train_labels = inputs[:num_train], labels[:num_train]
    train_classifier(
        model, train_inputs, train_labels, epochs=epochs, batch_size=64, lr=8e-3, weight_decay=weight_decay, seed=seed
    )
    accuracy = require_accuracy(
        model, inputs[num_train:], labels[num_train:], at_least=required_accuracy, what="digits"
    )
    return RecipeTask(
        model=model,
        samples=(inputs, labels),
        train=(train_inputs, train_labels),
        labels=labels,
        images=images,
        class_names=[str(digit) for digit in range(10)],
        held_out=torch.arange(len(labels), device="cpu") >= num_train,
        held_out_accuracy=accuracy,
        notes=f"digits: {num_train:,} training and {len(labels) - num_train:,} held-out images of 8 x 8 pixels",
    )
