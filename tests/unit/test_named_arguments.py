"""What the fuzz found beyond messages: results that were wrong, or could not be had, with good arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lossk
from lossk.analysis.baselines import penultimate_features
from lossk.interop.devinterp import compute_bif, read_traces, to_datatree
from lossk.recipes import train_classifier


def test_features_are_those_of_the_transformed_inputs() -> None:
    model, x, y = nn.Sequential(nn.Linear(3, 4)), torch.randn(6, 3), torch.arange(6) % 4
    found = penultimate_features(model, (x, y), transform=lambda batch: 2.0 * batch)
    torch.testing.assert_close(found.features, 2.0 * x)


def test_a_tree_of_single_losses_has_an_influence_function_and_no_n_beta() -> None:
    traces = lossk.LossTraces(torch.randn(2, 6, 5).exp())
    tree = to_datatree(traces)
    assert read_traces(tree).n_beta is None
    found = compute_bif(tree, compute_covariance=True)["influences"].values  # [5, 5, 1, 1]
    expected = np.cov(traces.losses.reshape(12, 5).numpy().astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found[:, :, 0, 0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("samples", [2, 8, 9])
def test_a_classifier_trains_in_any_number_of_steps(samples: int) -> None:
    """Of 4 steps torch's schedule divides by zero."""
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    train_classifier(model, torch.randn(samples, 3), torch.arange(samples) % 2, epochs=1, batch_size=2, lr=0.1,
                     weight_decay=0.0, seed=0)  # fmt: skip
    assert torch.isfinite(model.weight).all()
    assert not torch.equal(model.weight, before)
