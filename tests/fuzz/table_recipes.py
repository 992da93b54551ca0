"""Valid calls of `lossk.recipes` and `lossk.report`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import lossk

from . import rules as r
from .table import Table
from .table_core import SEED
from .world import NAMES, N, World

SHARE = r.number(least=0.0, most=1.0)
ROWS = r.optional(r.array(1, kinds="iu"))


def add_to(table: Table, w: World) -> None:
    """Every entry of both packages."""
    _parts(table, w)
    _tasks(table, w)
    table.add(
        "lossk.report.write_report",
        lambda: {"kernel_or_store": w.kernel, "path": w.fresh(".html"), "progress": False},
        {
            "kernel_or_store": r.either(r.path, r.instance(lossk.LossKernel)),
            "labels": _given(ROWS), "predictions": _given(ROWS),
            "held_out": _given(r.optional(r.array(1, kinds="biu"))),
            "class_names": r.either(r.sequence_of(r.either(r.text, r.integer())), r.array(1, kinds="iuf", least=0)),
            "texts": r.optional(r.sequence_of(r.text)),
            "images": _given(r.optional(r.array(3, 4))), "seed": r.integer(0), "config": r.optional(r.text),
        },
        work=("lossk.report.page.find",),
        words={"kernel_or_store": ("path",)},
    )  # fmt: skip


def _given(rule: r.Rule) -> r.Rule:
    """An empty list stands for nothing given."""
    return lambda value: (isinstance(value, list | tuple) and not value) or rule(value)


def readable(value: Any) -> bool:
    """What samples can be read from; what is in it is looked at when it is read."""
    plain = isinstance(value, str | bytes | bytearray | set | type | torch.Tensor | np.ndarray)
    return not plain and (hasattr(value, "__iter__") or hasattr(value, "__getitem__"))


def _parts(table: Table, w: World) -> None:
    image = r.optional(r.array(3, 4))
    texts = r.sequence_of(r.text)
    table.add(
        "lossk.recipes.RecipeTask",
        {"model": w.model, "samples": w.data},
        {
            "samples": readable, "train": r.optional(readable), "loss": r.either(r.text, r.function),
            "transform": r.optional(r.function),
            "labels": ROWS, "images": image, "class_names": texts, "held_out": r.optional(r.array(1, kinds="b")),
            "held_out_accuracy": r.optional(SHARE), "row_texts": r.optional(texts),
            "checkpoints": r.sequence_of(r.path), "synsets": r.optional(texts),
        },
    )  # fmt: skip
    table.add("lossk.recipes.packaged_config", {"name": "digits"})
    x = {"inputs": w.x, "targets": w.labels}
    rules = {
        "inputs": r.array(2, 3, 4), "targets": r.labels, "epochs": r.integer(0), "batch_size": r.integer(1),
        "lr": r.number(above=0.0), "weight_decay": r.number(least=0.0), "seed": SEED, "at_least": SHARE,
        "each_epoch": r.optional(r.function),
    }  # fmt: skip
    table.add(
        "lossk.recipes.train_classifier",
        lambda: {"model": torch.nn.Linear(3, 4), **x, "epochs": 1, "batch_size": 4, "lr": 0.1, "weight_decay": 0.0,
                 "seed": 0},
        rules,
    )  # fmt: skip
    table.add("lossk.recipes.predict", {"model": w.model, "inputs": w.x}, rules)
    table.add(
        "lossk.recipes.require_accuracy",
        {"model": w.model, **x, "at_least": 0.0, "what": "it"},
        rules,
        words={"at_least": ("accuracy",)},
    )


def _tasks(table: Table, w: World) -> None:
    files = {"data": r.path, "text": r.path, "cache": r.path, "train": r.optional(r.path)}
    counts = dict.fromkeys(("epochs", "steps"), r.integer(0)) | dict.fromkeys(
        ("num_train", "num_probe"), r.optional(r.integer(1))
    )
    shares = dict.fromkeys(("required_accuracy", "train_share", "plain_share", "held_out_share"), SHARE)
    rules = {
        **files, **counts, **shares, "seed": SEED, "weight_decay": r.number(least=0.0), "p": r.integer(2),
        "num_tasks": r.integer(2, 4), "network": r.text, "answers": r.choice("rules", "random"),
        "hidden": r.integer(1), "loudness": r.number(above=0.0), "rows": r.choice("tokens", "sequences"),
        "sequences": r.choice("packed", "padded"), "context": r.integer(1), "required_gain": r.number(),
        "batch_size": r.integer(1),
    }  # fmt: skip
    begins = {
        "digits": "train_classifier",
        "fashion": "read_fashion",
        "multitask": "train",
        "text": "read_documents",
        "imagenet": "find_photos",
    }
    for recipe, work in begins.items():
        call = {"wordnet": False} if recipe == "imagenet" else {}
        table.add(f"lossk.recipes.{recipe}.make_task", call, rules, work=(f"lossk.recipes.{recipe}.{work}",))
    assert len(w.labels) == N
    assert NAMES
