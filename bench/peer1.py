"""devinterp 1.3.2 doing a job of `bench.end_to_end`: `sample` with a callback that keeps every loss, then torch.cov.

Runs in the peer's Python. What an experienced user would do is done: batch norm frozen, minibatches sliced instead of
collated sample by sample, a thousand samples per pass, one copy of the losses.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peer_turns import Run, serve
from bench.peers_devinterp import evaluate, make_loader, rebuild
from bench.turns import CLOCKS


def prepare(spec: dict[str, Any]) -> Run:
    from devinterp.optim.sgld import SGLD
    from devinterp.optim.sgmcmc import SGMCMC
    from devinterp.slt.callback import SamplerCallback
    from devinterp.slt.sampler import sample

    saved = torch.load(spec["job"], weights_only=True)
    model = rebuild(json.loads(saved["layers"]), saved["state"])
    loader = make_loader(saved["train"]["x"], saved["train"]["y"], spec["batch_size"], fast=True)
    x, y = saved["probe"]["x"], saved["probe"]["y"]
    method = {"SGLD": SGLD, "SGMCMC.sgld": SGMCMC.sgld}[spec["method"]]

    def draw_all(chains: int, draws: int) -> Tensor:
        losses = torch.empty(chains, draws, len(y))

        class Trace(SamplerCallback):
            def __call__(self, chain: int, draw: int, model: nn.Module, **_: Any) -> None:
                with torch.no_grad():
                    for start in range(0, len(y), spec["eval_batch"]):
                        part = slice(start, start + spec["eval_batch"])
                        losses[chain, draw, part] = F.cross_entropy(model(x[part]), y[part], reduction="none")

            def get_results(self) -> dict[str, Any]:
                return {}

        names = {"lr": "lr", "nbeta": "n_beta", "localization": "localization"}
        sample(
            model,
            loader,
            callbacks=[Trace()],
            evaluate=evaluate,
            sampling_method=method,
            optimizer_kwargs={theirs: spec[ours] for theirs, ours in names.items()},
            num_draws=draws,
            num_chains=chains,
            num_burnin_steps=0,
            num_steps_bw_draws=spec["num_steps_bw_draws"],
            init_loss=1.0,  # given, so that no time goes into it
            seed=0,
            verbose=False,
        )
        return losses.flatten(0, 1)

    def run() -> dict[str, float]:
        start = CLOCKS[spec["clock"]]()
        traces = draw_all(spec["num_chains"], spec["num_draws"])
        kernel = torch.cov(traces.T)
        seconds = CLOCKS[spec["clock"]]() - start
        variance = float(kernel.diagonal().mean())
        return {"seconds": seconds, "mean_loss": float(traces.mean()), "mean_variance": variance}

    draw_all(1, 2)
    return run


if __name__ == "__main__":
    serve(prepare)
