"""What is written down of a run: what was asked for, what was chosen, and what is kept beside the numbers."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossk import provenance
from lossk.device import repeats
from lossk.kernel.traces import LossTraces
from lossk.samplers.samplers import kind_of
from lossk.store.witness import WITNESS

if TYPE_CHECKING:
    from lossk.accumulate.exchange import Received
    from lossk.run.prepare import Prepared
    from lossk.run.run import Run


def request(run: Prepared) -> dict[str, Any]:
    """What determines the result: saved with it, and compared on resuming."""
    return {
        "num_samples": len(run.probe),
        "num_train": run.num_train,
        "sets": {name: [rows.start, rows.stop] for name, rows in run.probe.sets.items()} or None,
        "num_chains": run.num_chains,
        "num_draws": run.num_draws,
        "loss": run.task.loss.name,
        "sampler": run.asked.to_dict(),
        "sampler_kind": kind_of(run.asked),
        "backend": run.backend,
        "precision": run.task.precision,
        "seed": run.seed,
        "num_weights": run.task.num_weights,
        "fingerprints": run.fingerprints,
        WITNESS: run.witness,
    }


def meta(run: Run, request: dict[str, Any]) -> dict[str, Any]:
    """What is kept beside the numbers."""
    choices = replace(run.choices, pilot=run.informed_pilot).to_dict()
    scales = {"scales": choices["scales"]} if "scales" in choices else {}
    seconds = {stage: round(value, 4) for stage, value in run.timings.seconds.items()}
    return {
        "config": request,
        "sampler": choices["sampler"],
        "reasons": choices["reasons"],
        **scales,
        "passes": choices["passes"],
        "passes_reasons": list(run.passes_reasons),
        "pilot": choices["pilot"],
        "backend": run.backend,
        "ops": run.ops,
        "repeats": repeats(run.task.device),
        "anchor_loss": choices["anchor_loss"],
        "timings": {**seconds, "total": round(time.perf_counter() - run.started, 4)},
        "peak_rss_bytes": provenance.peak_rss_bytes(),
        "versions": provenance.versions(),
        "git_sha": provenance.git_sha(),
        "warnings": list(run.warnings),
        "mean_loss_trace": run.watch.mean_loss.tolist(),
        "excess_trace": run.watch.excess.tolist(),
    }


def losses(run: Run, parts: Iterable[Received]) -> Tensor:
    """[C, T, N] float32, nats: what panels of whole rows, in any order, hold; the run's watch notes them."""
    out = torch.empty(run.num_chains, run.num_draws, len(run.probe), dtype=torch.float32, device="cpu")
    for part in parts:
        out[part.chain, part.first_draw : part.first_draw + len(part.losses)] = part.losses
        run.watch.note(part.losses, part.draws)
    return out


def traces(run: Run, losses: Tensor, meta: dict[str, Any]) -> LossTraces:
    """The losses [C, T, N] of a run, with what is known of them."""
    return LossTraces(
        losses,
        excess=run.watch.excess,
        n_beta=getattr(run.sampler, "n_beta", None),
        meta=meta,
        tokens=run.probe.tokens,
        sets=run.probe.sets,
    )
