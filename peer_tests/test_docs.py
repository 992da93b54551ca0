"""The blocks of docs/interop.md marked with a peer, in whichever peer's environment this runs."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lossk
from lossk.interop import devinterp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from doc_blocks import blocks

torch.set_num_threads(1)


def environment() -> str:
    """Which of the marks is to be run here."""
    try:
        return "devinterp2" if version("devinterp").startswith("2") else "devinterp1"
    except PackageNotFoundError:
        return "others"


def devinterp1_names() -> dict[str, Any]:
    from devinterp.slt.sampler import sample

    x, y = torch.randn(40, 3), torch.arange(40) % 2
    return {
        "model": nn.Linear(3, 2),
        "loader": DataLoader(TensorDataset(x, y), batch_size=10),
        "probe": (x, y),
        "evaluate": lambda model, data: F.cross_entropy(model(data[0]), data[1]),
        "devinterp_sample": sample,
        "sgld": devinterp.sgld,
        "LossKernelCallback": devinterp.LossKernelCallback,
    }


def devinterp2_names() -> dict[str, Any]:
    from devinterp.slt.llc import compute_llc
    from devinterp.slt.sampling import sample

    class Sequences(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {"input_ids": (torch.arange(6) * (i + 1)) % 7}

    lm, data = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)), Sequences()
    samples = sample(lm, data, {"train": data}, lr=1e-3, n_beta=20.0, num_chains=2, num_draws=5, batch_size=8)
    return {
        "lm": lm,
        "dataset": data,
        "samples": samples,
        "compute_llc": compute_llc,
        "compute_bif": devinterp.compute_bif,
        "sample": devinterp.sample,
    }


def other_names() -> dict[str, Any]:
    import torchdr
    import umap

    from lossk.interop.sklearn import distance, knn

    losses = torch.randn(2, 50, 3)[:, :, torch.arange(60) % 3] + 0.5 * torch.randn(2, 50, 60)
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(losses))
    return {
        "umap": umap,
        "torchdr": torchdr,
        "torch": torch,
        "numpy": numpy,
        "kernel": kernel,
        "knn": knn,
        "distance": distance,
    }


def test_the_page() -> None:
    here = environment()
    names = {"devinterp1": devinterp1_names, "devinterp2": devinterp2_names, "others": other_names}[here]()
    found = blocks(here)
    assert found
    for code in found:
        exec(compile(code, "docs/interop.md", "exec"), names)
