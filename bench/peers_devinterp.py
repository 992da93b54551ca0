"""devinterp 1.3.x on one network, in a process of its own: per-sample losses at every draw, and when each was there.

    PYTHON bench/peers_devinterp.py SPEC.json OUT.pt

PYTHON has devinterp; of lossk nothing is needed. What an experienced user would do is done: batch norm frozen, losses
of small size computed without cancellation, draws evaluated a thousand samples at a time, one copy of the results.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

EVAL_BATCH = 1000
# The layers a network may consist of, and the attributes that make them again.
LAYERS = {
    "Linear": ("in_features", "out_features"),
    "Conv2d": ("in_channels", "out_channels", "kernel_size", "stride", "padding"),
    "BatchNorm2d": ("num_features", "eps"),
    "MaxPool2d": ("kernel_size", "stride", "padding"),
    "ReLU": (),
    "Tanh": (),
    "Flatten": (),
}


def describe(model: nn.Module) -> list[list[Any]]:
    """An `nn.Sequential` of known layers as plain data: [[layer, {argument: value}], ...]."""
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"model must be an nn.Sequential, got {type(model).__name__}")
    out: list[list[Any]] = []
    for layer in model:
        kind = type(layer).__name__
        if kind not in LAYERS:
            raise TypeError(f"model must consist of {', '.join(LAYERS)}, got {kind}")
        arguments = {key: getattr(layer, key) for key in LAYERS[kind]}
        if kind in ("Linear", "Conv2d"):
            arguments["bias"] = layer.bias is not None
        out.append([kind, arguments])
    return out


def rebuild(layers: list[list[Any]], state: dict[str, Tensor]) -> nn.Sequential:
    """The inverse of `describe`, with its weights, in eval mode."""
    model = nn.Sequential(*(getattr(nn, kind)(**arguments) for kind, arguments in layers))
    model.load_state_dict(state)
    return model.eval()


class Sliced(Dataset):
    """A minibatch is cut out of the tensors at once: no sample-by-sample collation."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitems__(self, index: list[int]) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def as_it_is(batch: Any) -> Any:
    """No collation."""
    return batch


def make_loader(x: Tensor, y: Tensor, batch_size: int, fast: bool) -> DataLoader:
    """Shuffled minibatches, by torch's usual loader or by one that slices. devinterp reads its `batch_size`."""
    if fast:
        return DataLoader(Sliced(x, y), batch_size=batch_size, shuffle=True, collate_fn=as_it_is)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=True)


def evaluate(model: nn.Module, data: Any) -> Tensor:
    """The minibatch loss; devinterp has just called model.train(), which would unfreeze batch norm."""
    model.eval()
    return F.cross_entropy(model(data[0]), data[1])


@torch.no_grad()
def sample_losses(model: nn.Module, x: Tensor, y: Tensor, out: Tensor) -> None:
    """Losses [N] into `out`; logits in float64, because float32 cannot hold a cross entropy below 1e-7."""
    model.eval()
    for start in range(0, len(y), EVAL_BATCH):
        part = slice(start, start + EVAL_BATCH)
        out[part] = F.cross_entropy(model(x[part]).double(), y[part], reduction="none")


class OutOfRangeError(Exception):
    """A loss is not finite: the chain diverged."""


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Sample as `spec` says: losses [C, T, N] float32, entry and exit [C, T] of every draw's callback in seconds.

    Both are counted from the call of devinterp's `sample`. A chain that diverges ends the run with `error` set.
    """
    from devinterp.optim.sgld import SGLD
    from devinterp.optim.sgmcmc import SGMCMC
    from devinterp.slt.callback import SamplerCallback
    from devinterp.slt.sampler import sample

    saved = torch.load(spec["network"], weights_only=True)
    model = rebuild(json.loads(saved["layers"]), saved["state"])
    x, y = saved["probe_x"], saved["probe_y"]
    chains, draws = spec["num_chains"], spec["num_draws"]
    losses = torch.full((chains, draws, len(y)), float("nan"))
    clock = torch.full((2, chains, draws), float("nan"), dtype=torch.float64)
    now = {"wall": time.perf_counter, "cpu": time.process_time}[spec["clock"]]
    start = 0.0

    class Trace(SamplerCallback):
        def __call__(self, chain: int, draw: int, model: nn.Module, **_: Any) -> None:
            clock[0, chain, draw] = now() - start
            row = losses[chain, draw]
            sample_losses(model, x, y, row)
            if not bool(torch.isfinite(row).all()):
                raise OutOfRangeError(f"chain {chain} has a loss that is not finite at draw {draw}")
            clock[1, chain, draw] = now() - start

        def get_results(self) -> dict[str, Any]:
            return {}

    method = {"SGLD": SGLD, "SGMCMC.sgld": SGMCMC.sgld}[spec["method"]]
    loader = make_loader(saved["train_x"], saved["train_y"], spec["batch_size"], spec["fast_loader"])
    error = None
    start = now()
    try:
        sample(
            model,
            loader,
            callbacks=[Trace()],
            evaluate=evaluate,
            sampling_method=method,
            optimizer_kwargs=spec["optimizer_kwargs"],
            num_draws=draws,
            num_chains=chains,
            num_burnin_steps=0,  # draws are discarded afterwards, and the time of their losses given back
            num_steps_bw_draws=spec["num_steps_bw_draws"],
            init_loss=spec["init_loss"],
            seed=spec["seed"],
            verbose=False,
        )
    except OutOfRangeError as stopped:
        error = str(stopped)
    return {"losses": losses, "entry": clock[0], "exit": clock[1], "error": error}


def main() -> None:
    from importlib.metadata import version

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    spec = json.loads(Path(sys.argv[1]).read_text())
    run({**spec, "num_chains": 1, "num_draws": 2})  # torch loads parts of itself on first use: not the peer's time
    result = run(spec)
    result["versions"] = {name: version(name) for name in ("devinterp", "torch", "numpy")}
    torch.save(result, sys.argv[2])


if __name__ == "__main__":
    main()
