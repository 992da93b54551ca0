"""The blocks of docs/interop.md marked with a peer, in whichever peer's environment this runs."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lossk
from lossk.interop import devinterp as ours

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from doc_blocks import blocks

torch.set_num_threads(1)
CHECKPOINT_NAMES = (
    "CheckpointKernels",
    "checkpoints_of",
    "huggingface_callback",
    "lightning_callback",
    "over_checkpoints",
)


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
        "sgld": ours.sgld,
        "LossKernelCallback": ours.LossKernelCallback,
    }


def devinterp2_names() -> dict[str, Any]:
    import devinterp.slt.config
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
        "compute_bif": ours.compute_bif,
        "bif": ours.bif,
        "devinterp": devinterp,
        "lossk": lossk,
        "sample": ours.sample,
    }


def other_names(path: Path) -> dict[str, Any]:
    import lightning
    import torchdr
    import transformers
    import umap
    from trainers import DATA, Model, Module, Rows, huggingface_arguments, lightning_settings

    from lossk.interop import checkpoints
    from lossk.interop.sklearn import LossKernelTransformer, knn, losses

    def build_kernel(model: nn.Module) -> lossk.LossKernel:
        sampler = lossk.SGLD(lr=1e-3, n_beta=8.0, localization=1.0, num_burnin_steps=2, num_steps_bw_draws=1)
        arguments = {"num_chains": 2, "num_draws": 6, "passes": lossk.Passes(), "progress": False}
        return lossk.build_kernel(model.net, DATA, sampler=sampler, **arguments)

    groups = torch.randn(2, 50, 3)[:, :, torch.arange(60) % 3]
    traces = lossk.LossTraces(groups + 0.5 * torch.randn(2, 50, 60))
    return {
        "umap": umap,
        "torchdr": torchdr,
        "torch": torch,
        "numpy": numpy,
        "traces": traces,
        "kernel": lossk.LossKernel.from_traces(traces),
        "knn": knn,
        "losses": losses,
        "LossKernelTransformer": LossKernelTransformer,
        "build_kernel": build_kernel,
        "lightning": lightning,
        "transformers": transformers,
        "settings": lightning_settings(path) | {"enable_checkpointing": False},
        "module": Module(),
        "loader": DataLoader(TensorDataset(*DATA), batch_size=10),
        "model": Model(),
        "arguments": huggingface_arguments(path),
        "dataset": Rows(),
        **{name: getattr(checkpoints, name) for name in CHECKPOINT_NAMES},
    }


NAMES = {"devinterp1": devinterp1_names, "devinterp2": devinterp2_names}


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = environment()
    if here == "devinterp2":
        methods = importlib.import_module("devinterp.slt.config").SAMPLING_METHODS
        monkeypatch.setitem(methods, "sgmcmc_sgld", methods["sgmcmc_sgld"])  # the page changes it: put back afterwards
    names = other_names(tmp_path) if here == "others" else NAMES[here]()
    found = blocks(here)
    assert found
    for code in found:
        exec(compile(code, "docs/interop.md", "exec"), names)
