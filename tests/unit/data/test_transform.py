"""Data held in a compact dtype and turned into the model's inputs batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lossk
from conftest import sgld

Build = Callable[..., lossk.LossKernel]


def normalise(images: Tensor) -> Tensor:
    assert images.dtype == torch.uint8
    return (images.float() / 255 - 0.3) / 0.4


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))


def images(num_samples: int = 11) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 256, (num_samples, 1, 6, 6), dtype=torch.uint8), torch.arange(num_samples) % 3


def test_the_kernel_is_that_of_the_transformed_data(build: Build) -> None:
    network, data, train = model(), images(), images(7)
    before = data[0].clone()
    found = build(network, data, train=train, transform=normalise)
    plain = build(network, (normalise(data[0]), data[1]), train=(normalise(train[0]), train[1]))
    np.testing.assert_array_equal(found.to_numpy(), plain.to_numpy())
    assert torch.equal(data[0], before)


def test_it_is_applied_to_batches_only(build: Build) -> None:
    seen: list[int] = []

    def noted(inputs: Tensor) -> Tensor:
        seen.append(len(inputs))
        return normalise(inputs)

    build(model(), images(300), transform=noted, passes=lossk.Passes(probe_batch=8))
    assert max(seen) == 64  # the losses by which a resumed run is known


def test_half_precision_inputs_stay_half_and_count_as_themselves(build: Build) -> None:
    network, (x, y) = model(), images()
    half = normalise(x).half()
    np.testing.assert_array_equal(build(network, (half, y)).to_numpy(), build(network, (half.float(), y)).to_numpy())


def test_traces_predictions_and_the_frozen_prefix(build: Build) -> None:
    network, data = model(), images()
    floats = (normalise(data[0]), data[1])
    asked: dict[str, Any] = {"sampler": sgld(params=["3.*"]), "num_chains": 2, "num_draws": 3, "progress": False}
    found = lossk.sample_losses(network, data, transform=normalise, **asked)
    np.testing.assert_array_equal(found.losses, lossk.sample_losses(network, floats, **asked).losses)
    assert any("= cached" in line for line in found.meta["passes_reasons"])
    predicted = lossk.predicted_labels(network, data, normalise)
    assert torch.equal(predicted[0], data[0])
    assert torch.equal(predicted[1], lossk.predicted_labels(network, floats)[1])


def test_a_resume_under_another_transform_is_refused(build: Build, tmp_path: Path) -> None:
    network, data, out = model(), images(), tmp_path / "k.lossk"

    class Stopped(Exception):
        pass

    calls, last = 0, -1

    def stops(inputs: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == last:
            raise Stopped
        return normalise(inputs)

    build(network, data, transform=stops, panel=1)
    calls, last = 0, calls - 5
    with pytest.raises(Stopped):
        build(network, data, transform=stops, panel=1, out=out)
    with pytest.raises(lossk.StoreError, match="fingerprints"):
        build(network, data, transform=lambda x: normalise(x) + 0.01, panel=1, out=out, resume=True)
    build(network, data, transform=normalise, panel=1, out=out, resume=True)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            lambda x: normalise(x)[:1],
            r"transform must return the batch's inputs as tensors of as many samples, got \[1",
        ),
        (lambda x: None, "as many samples, got NoneType"),
        (lambda x: normalise(x).mean(), r"as many samples, got \[\]"),
    ],
)
def test_what_a_transform_returns(build: Build, transform: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(model(), images(), transform=transform)


def test_batches_must_be_pairs(build: Build) -> None:
    with pytest.raises(ValueError, match=r"transform needs batches \(inputs, targets\)"):
        build(model(), {"x": images()[0]}, transform=normalise, loss=lambda model, batch: model(batch["x"]).sum(1))
