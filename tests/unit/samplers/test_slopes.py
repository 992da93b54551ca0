"""The gradient that starts from compiled slopes is the one of the reference, whole or accumulated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lossk
from lossk.data.data import Samples
from lossk.task.losses import resolve_loss
from lossk.task.task import Task


@pytest.mark.parametrize("gradient_batch", [1024, 4, 1])
@pytest.mark.parametrize(("name", "shape"), [("cross_entropy", (11,)), ("token_cross_entropy", (11, 5))])
def test_compiled_slopes_give_the_reference_gradient(name: str, shape: tuple[int, ...], gradient_batch: int) -> None:
    """Within the rounding of float32 passes; samples with masked tokens, one of them with nothing else, included."""
    model = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 3))
    x, y = torch.randn(*shape, 7), torch.randint(0, 3, shape)
    if len(shape) == 2:
        y[0, 2] = y[3] = -100
    found = {}
    for backend, batch in (("torch", 1024), ("cpp", gradient_batch)):
        task = Task(model, resolve_loss(name, backend))
        task.passes = lossk.Passes(gradient_batch=batch)
        if len(shape) == 2:
            task.loss = task.loss.over_tokens(49, 11, 5)
        with task:
            value = task.gradient(Samples((x, y), 11), torch.tensor([0, 3, 4, 7, 10]))
            found[backend] = (value, task.grad.clone())
    assert found["cpp"][0] == pytest.approx(found["torch"][0], rel=1e-6)
    expected = found["torch"][1]
    assert float((found["cpp"][1] - expected).norm() / expected.norm()) < 1e-6
