"""A task is configured before it is entered, by its own methods: nobody sets on it what its passes are run by."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import lossk
from lossk.task.losses import resolve_loss
from lossk.task.passes import Passes
from lossk.task.task import Task

SOURCE = Path(lossk.__file__).parent
OWN = {"passes", "loss", "head", "suffix"}


def targets(node: ast.AST) -> Iterator[ast.expr]:
    """What a statement assigns to, out of tuples."""
    found = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    while found:
        target = found.pop()
        if isinstance(target, ast.Tuple | ast.List):
            found += target.elts
        elif isinstance(target, ast.Starred):
            found.append(target.value)
        elif target is not None:
            yield target


def assigned_from_outside(source: str) -> list[str]:
    """`x.passes = ...` and its like, where x is not `self`; a `setattr` of one of these names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for target in targets(node):
            if isinstance(target, ast.Attribute) and target.attr in OWN and ast.unparse(target.value) != "self":
                found.append(ast.unparse(target))
        setter = isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "object.__setattr__")
        if setter and any(isinstance(each, ast.Constant) and each.value in OWN for each in node.args):
            found.append(ast.unparse(node))
    return found


def test_nobody_sets_how_a_task_is_run_but_the_task() -> None:
    found = {file.name: assigned_from_outside(file.read_text()) for file in SOURCE.rglob("*.py")}
    assert len(found) > 200
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "task.passes = p",
        "run.task.loss = p",
        "a, (b.task.head, *c) = p",
        "task.suffix: int = 1",
        "setattr(t, 'head', 1)",
    ],
)
def test_a_planted_assignment_is_found(planted: str) -> None:
    assert len(assigned_from_outside(f"def f(self):\n    self.passes = 1\n    {planted}")) == 1


def test_an_entered_task_is_not_configured() -> None:
    task = Task(nn.Linear(2, 2), resolve_loss("cross_entropy"))
    task.use_passes(Passes(probe_batch=3))
    assert task.passes.probe_batch == 3
    with task:
        with pytest.raises(AssertionError, match="before it is entered"):
            task.use_passes(Passes())
        with pytest.raises(AssertionError, match="before it is entered"):
            task.use_loss(resolve_loss("mse"))
        with pytest.raises(AssertionError, match="before it is entered"):
            task.use_head(None)
        task.set_overlap(False)
    assert task.passes.overlap is False
    assert torch.isfinite(next(task.model.parameters())).all()
