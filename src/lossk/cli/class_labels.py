"""Class labels and taxonomies from files, for the command line."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lossk.analysis import Taxonomy
from lossk.cli.config import load_config, read_yaml
from lossk.cli.label_files import read_classes
from lossk.cli.options import named
from lossk.forms.names import Names
from lossk.kernel.from_store import kernel_of, open_kernel
from lossk.kernel.kernel import LossKernel
from lossk.report.samples import read_samples, samples_path


def open_named(options: argparse.Namespace) -> LossKernel:
    """The store of a command, its rows called as `--labels` says."""
    return labeled(open_kernel(options.store), options)


def labeled(kernel: LossKernel, options: argparse.Namespace) -> LossKernel:
    """With the classes of `--labels`; else those of the store, or of the samples that `lossk run` saved beside it."""
    if options.labels is not None:
        return with_classes(kernel, *read_asked(options, len(kernel)))
    beside = samples_path(Path(options.store))
    if kernel.labels is not None or not beside.exists():
        return kernel
    saved = read_samples(beside, len(kernel))
    if saved.labels is None:
        return kernel
    numbers = torch.from_numpy(saved.labels)
    return with_classes(kernel, numbers, [saved.name_of(i) for i in range(int(numbers.max()) + 1)])


def read_asked(options: argparse.Namespace, num_samples: int) -> tuple[Tensor, list[str]]:
    """What `--labels` says of a command's store."""
    read = partial(read_labels, trusted=options.trust)
    return named("--labels", read, options.labels, options.store, num_samples)


def with_classes(kernel: LossKernel, labels: Tensor, names: list[str]) -> LossKernel:
    """The kernel with these classes, numbered as here."""
    contents = replace(kernel.contents, names=Names(kernel.ids, labels.numpy(), tuple(names)))
    return kernel_of(contents)


def names_of_classes(kernel: LossKernel) -> list[str]:
    """Of class 0, 1, ...: names, or numbers."""
    if kernel.labels is None or kernel.class_names:
        return kernel.class_names
    return [str(number) for number in range(int(kernel.labels.max()) + 1)]


def read_labels(source: str, store: str | Path, num_samples: int, *, trusted: bool = False) -> tuple[Tensor, list[str]]:
    """Labels [N] int64 from 0 and the classes' names.

    Args:
        source: a .npy file of N integers; a text file, one class per line, number or name (names are numbered in
            alphabetical order); or "config", which runs the task of the YAML beside the store for its labels.
        trusted: the user vouches for that YAML, which may have come with the store; else it may name packaged recipes.

    Raises:
        ValueError: no such file, another number of labels, or none in the task.
    """
    if source == "config":
        task = load_config(str(Path(store).with_suffix(".yaml"))).make_task(trusted=trusted)
        if task.labels is None:
            raise ValueError(f"--labels config: the task of {str(store)!r} has no labels")
        labels, names = task.labels.long(), list(task.class_names)
    else:
        labels, names = _of_file(Path(source))
    if len(labels) != num_samples:
        raise ValueError(f"--labels {source!r} must hold one label per sample, {num_samples}, got {len(labels)}")
    if num_samples and int(labels.min()) < 0:  # of a task: those of a file are
        raise ValueError(f"--labels {source!r} must be at least 0, got {int(labels.min())}")
    if names and num_samples and int(labels.max()) >= len(names):
        raise ValueError(f"--labels {source!r} must be less than its {len(names)} class names, got {int(labels.max())}")
    return labels, names or [str(i) for i in range(int(labels.max()) + 1)]


def _of_file(path: Path) -> tuple[Tensor, list[str]]:
    try:
        labels, names = read_classes(path)
    except ValueError as error:
        raise ValueError(f"--labels: {error}") from error
    return torch.from_numpy(labels), names


def read_taxonomy(source: str, class_names: list[str]) -> Taxonomy:
    """The taxonomy of some classes, in their order.

    Args:
        source: "fashion" (Fashion-MNIST in WordNet), or a YAML file with either `synsets`, class -> WordNet synset by
            name, offset or wnid, or `tree`, a nested mapping whose leaves are the classes.

    Raises:
        ValueError: no such file, neither key, or a class that it does not hold.
    """
    from lossk.analysis.wordnet import FASHION_SYNSETS, wordnet_taxonomy

    plain = {"synsets": FASHION_SYNSETS} if source == "fashion" else _mapping(Path(source))
    if "tree" in plain:
        whole = Taxonomy.from_nested(plain["tree"])
        _refuse_missing(class_names, dict.fromkeys(whole.class_names))
        parents = {node: up for node, up in whole.parents.items() if up}
        return Taxonomy.from_parents(parents, {name: name for name in class_names})
    synsets = plain["synsets"]
    _refuse_missing(class_names, synsets)
    return wordnet_taxonomy({name: synsets[name] for name in class_names})


def _mapping(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"--taxonomy: there is no file {str(path)!r}")
    plain = read_yaml(path)
    keys = [key for key in ("synsets", "tree") if isinstance(plain, dict) and isinstance(plain.get(key), dict)]
    if len(keys) != 1:
        raise ValueError(f"--taxonomy {str(path)!r} must hold one mapping, 'synsets' or 'tree'")
    return plain


def _refuse_missing(class_names: list[str], known: dict) -> None:
    missing = [name for name in class_names if name not in known]
    if missing:
        raise ValueError(f"--taxonomy must hold every class, but not {missing[0]!r}; it holds {', '.join(known)}")
