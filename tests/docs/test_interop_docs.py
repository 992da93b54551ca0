"""The blocks of docs/interop.md that need no peer, run as they stand there, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import arviz_stats
import numpy as np
import pytest
import torch
from sklearn.cluster import HDBSCAN, SpectralClustering
from sklearn.decomposition import KernelPCA
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from torch import nn

import lossk
from doc_blocks import blocks


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for name in ("epoch1.pt", "epoch2.pt"):
        torch.save(model.state_dict(), name)
    x, labels = torch.randn(40, 3), torch.arange(40) % 2
    probe = (x, labels)
    sampler = lossk.SGLD(lr=1e-3, n_beta=9.0, localization=1.0, batch_size=8, num_burnin_steps=1, num_steps_bw_draws=1)
    arguments: dict[str, Any] = {"sampler": sampler, "num_chains": 2, "num_draws": 30, "progress": False}
    traces = lossk.sample_losses(model, probe, passes=lossk.Passes(), **arguments)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    moved = [{name: value + 0.1 * i for name, value in state.items()} for i in range(3)]

    def log_posterior(params: dict[str, torch.Tensor], batch: Any) -> tuple[torch.Tensor, None]:
        return -torch.stack([p.square().sum() for p in params.values()]).sum(), None

    names: dict[str, Any] = {
        "lossk": lossk,
        "torch": torch,
        "np": np,
        "arviz_stats": arviz_stats,
        "SpectralClustering": SpectralClustering,
        "HDBSCAN": HDBSCAN,
        "KernelPCA": KernelPCA,
        "NearestNeighbors": NearestNeighbors,
        "SVC": SVC,
        "make_pipeline": make_pipeline,
        "model": model,
        "probe": probe,
        "sampler": sampler,
        "traces": traces,
        "labels": labels.numpy(),
        "chain_of_state_dicts": moved,
        "another_chain": iter(moved[::-1]),
        "log_posterior": log_posterior,
        "params": state,
        "batch": None,
    }
    found = blocks("here")
    assert len(found) == 6
    for code in found:
        exec(compile(code, "docs/interop.md", "exec"), names)
    assert names["kernel"].num_chains == 2
    assert names["step"].name == "epoch2.pt"
