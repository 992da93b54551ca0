"""A kernel's parts as data: a store holds them, a kernel is made of them, and nobody else reaches into a kernel."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import lossk
from import_graph import SOURCE, modules_of
from lossk.kernel.from_store import kernel_of
from lossk.store.contents import Contents
from lossk.store.store import read_contents, save_contents
from streamed_kernels import kernel_from_panels

LOSSES = np.random.default_rng(11).gamma(2.0, size=(2, 15, 21))
PRIVATE = ("_blocks", "_moments")


def a_kernel(form: str) -> lossk.LossKernel:
    if form == "tiles":
        panels = enumerate(torch.tensor(LOSSES, dtype=torch.float32))
        return kernel_from_panels(panels, 21, num_chains=2, num_draws=15, tile=8)
    tokens = torch.stack([torch.arange(21) // 3, torch.arange(21) % 3], dim=1)
    sets = {"one": slice(0, 9), "two": slice(9, 21)}
    traces = lossk.LossTraces(LOSSES, tokens=tokens, sets=sets, meta={"from": [1, 2.5]})
    return lossk.LossKernel.from_traces(traces)


def same(one: Contents, other: Contents) -> None:
    for name in ("mean", "variance", "scale", "lag1", "chain_mean"):
        assert torch.equal(getattr(one.moments, name), getattr(other.moments, name)), name
    rows = torch.arange(21)
    assert torch.equal(one.blocks.gather(rows, rows), other.blocks.gather(rows, rows))
    assert (one.blocks.kind, one.dtype, one.meta) == (other.blocks.kind, other.dtype, other.meta)
    assert one.diagnostics == other.diagnostics
    assert dict(one.sets) == dict(other.sets)
    for name in ("tokens", "watched"):
        a, b = (getattr(part, name) for part in (one, other))
        assert (a is None) == (b is None), name
    if one.tokens is not None:
        assert torch.equal(one.tokens, other.tokens)
    if one.watched is not None:
        assert torch.equal(one.watched.index, other.watched.index)
        assert torch.equal(one.watched.losses, other.watched.losses)


@pytest.mark.parametrize("form", ["tiles", "factor"])
def test_a_store_holds_the_parts_of_a_kernel(form: str, tmp_path: Path) -> None:
    kernel = a_kernel(form)
    save_contents(kernel.contents, tmp_path / "k.lossk")
    found = read_contents(tmp_path / "k.lossk")
    assert found.blocks.kind == form
    same(kernel.contents, found)
    same(found, kernel_of(found).contents)
    same(found, lossk.open(tmp_path / "k.lossk").contents)
    np.testing.assert_array_equal(kernel_of(found).to_numpy(), kernel.to_numpy())


def test_parts_are_frozen() -> None:
    contents = a_kernel("factor").contents
    with pytest.raises(dataclasses.FrozenInstanceError):
        contents.meta = {}  # type: ignore[misc]


def test_only_their_own_class_reads_a_kernels_private_parts() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name, path in modules_of(SOURCE).items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE and ast.unparse(node.value) != "self"
    ]
    assert not found
