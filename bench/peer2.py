"""devinterp 2.0.1, in its own Python: a job of `bench.language`, or its kernel alone for `bench.memory`."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bench.language_model import LanguageModel, Shape
from bench.memory_watch import MemoryWatch
from bench.peer_turns import Run, serve
from bench.turns import CLOCKS


class Sequences(Dataset):
    """Token ids as devinterp takes them, without the cost of a table on disk."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


def prepare(spec: dict[str, Any]) -> Run:
    return prepare_kernel(spec) if spec["what"] == "kernel" else prepare_language(spec)


def prepare_language(spec: dict[str, Any]) -> Run:
    """`sample` of all chains with the losses of all tokens, then the kernel as `spec["kernel"]` says."""
    from devinterp.slt.bif import compute_bif
    from devinterp.slt.sampling import sample

    saved = torch.load(spec["job"], weights_only=True)
    model = LanguageModel(Shape(**spec["shape"]))
    model.load_state_dict(saved["state"])
    x, y = saved["probe"]["x"], saved["probe"]["y"]
    data = Sequences(torch.cat([x, y[:, -1:]], dim=1))
    batches = len(data) // spec["batch_size"]

    def draw_all(chains: int, draws: int, folder: Path) -> Any:
        names = ("lr", "n_beta", "localization", "batch_size", "num_steps_bw_draws")
        return sample(
            model,
            data,
            {"all": (data, batches)},
            **{name: spec[name] for name in names},
            num_chains=chains,
            num_draws=draws,
            num_init_loss_batches=1,  # as few as it takes
            device="cpu",
            output_path=folder / "samples.zarr",
        )

    def kernel(tree: Any) -> tuple[Tensor, Tensor]:
        traces = torch.as_tensor(tree.dataset["loss_all"].values).flatten(0, 1).flatten(1)
        if spec["kernel"] == "torch.cov":
            return traces, torch.cov(traces.T).diagonal()
        found = compute_bif(tree, correlation_method="token", compute_covariance=True, device="cpu")
        blocks = torch.as_tensor(found["influences"].values)  # [N, N, T, T]
        return traces, torch.diagonal(torch.diagonal(blocks), dim1=0, dim2=1).flatten()

    def timed(chains: int, draws: int) -> dict[str, float]:
        folder = Path(tempfile.mkdtemp())
        try:
            now = CLOCKS[spec["clock"]]
            start = now()
            tree = draw_all(chains, draws, folder)
            sampled = now() - start
            traces, variance = kernel(tree)
            seconds = now() - start
        finally:
            shutil.rmtree(folder)
        found = {"mean_loss": float(traces.mean()), "mean_variance": float(variance.mean())}
        return {"seconds": seconds, "sampling": sampled, **found}

    timed(1, 2)
    return lambda: timed(spec["num_chains"], spec["num_draws"])


def prepare_kernel(spec: dict[str, Any]) -> Run:
    """The sequence kernel of N sequences from traces that are already in memory: its peak above them."""
    import xarray as xr
    from devinterp.slt.bif import compute_bif

    def kernel(count: int) -> dict[str, float]:
        losses = torch.randn(spec["num_chains"], spec["num_draws"], count, 1).numpy()
        ids = torch.zeros(count, 2, dtype=torch.int64).numpy()
        dims = {"loss_all": ("chain", "draw", "batch_all", "token_pos"), "input_ids_all": ("batch_all", "token")}
        data = xr.Dataset({"loss_all": (dims["loss_all"], losses), "input_ids_all": (dims["input_ids_all"], ids)})
        tree = xr.DataTree(dataset=data)
        watch, start = MemoryWatch(), time.perf_counter()
        compute_bif(tree, correlation_method="sequence", compute_covariance=spec["covariance"], device="cpu")
        return {"seconds": time.perf_counter() - start, **watch.bytes()}

    kernel(16)
    return lambda: kernel(spec["num_samples"])


if __name__ == "__main__":
    serve(prepare)
