"""Predicted labels as targets."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lossk


def test_predictions_are_the_models_in_eval_mode_and_in_dataset_order() -> None:
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))
    inputs = torch.randn(600, 5)
    with pytest.warns(UserWarning, match="dataset order"):
        same, labels = lossk.predicted_labels(
            model, DataLoader(TensorDataset(inputs, torch.zeros(600)), batch_size=7, shuffle=True)
        )
    assert model.training, "given back as it was"
    assert torch.equal(same, inputs)
    with torch.no_grad():
        assert torch.equal(labels, model.eval()(inputs).argmax(dim=1))
    kernel = lossk.build_kernel(model, (same, labels), num_chains=1, num_draws=3, progress=False)
    assert kernel.num_samples == 600


def test_other_models_and_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[B, C\]"):
        lossk.predicted_labels(nn.Sequential(nn.Linear(4, 4), nn.Flatten(0)), (torch.randn(6, 4), torch.zeros(6)))
    with pytest.raises(ValueError, match="inputs, targets"):
        lossk.predicted_labels(nn.Linear(4, 2), {"inputs": torch.randn(6, 4)})
