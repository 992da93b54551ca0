"""Losses per token of a tiny causal language model: lossk against plain torch and devinterp 2.0.1, taking turns.

python -m bench.language [--quick] [--peer2-python PYTHON]
"""

from __future__ import annotations

from dataclasses import asdict

from bench.end_to_end import compare, one
from bench.jobs import Job, changed
from bench.language_model import Shape, sequences, trained
from bench.options import Found, Options, run_alone
from bench.peers import Peer

PEER_COV, PEER = "devinterp 2.0.1, torch.cov", "devinterp 2.0.1, its own kernel"
TARGETS = {PEER_COV: 2.0, PEER: 2.0}


def make_job(options: Options, shape: Shape) -> Job:
    """All sequences are both probe and training data. Passes of 32 sequences: devinterp's default, and its only one."""
    count = options.changes.get("num_samples") or options.pick(full=256, quick=128, tiny=32)
    ids = sequences(count, shape)
    data = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    model = trained(ids, shape, steps=options.pick(full=200, quick=100, tiny=2))
    weights = sum(parameter.numel() for parameter in model.parameters())
    what = f"Causal language model, {shape.blocks} blocks, {weights:,} weights, {shape.context} tokens a sequence"
    job = Job("language", what, model, data, data, lr=1e-5, localization=100.0, batch_size=32, eval_batch=32)
    counts = options.pick(full={"rounds": 5}, quick={"num_draws": 10}, tiny={"num_draws": 2, "rounds": 1})
    return changed(job, options, counts)


def measure(options: Options) -> Found:
    shape = options.pick(full=Shape(), quick=Shape(), tiny=Shape(vocabulary=16, context=4, width=8, heads=2))
    job = make_job(options, shape)
    peers = {}
    if options.peer2_python:
        spec = {**job.spec(), "what": "language", "shape": asdict(shape), "threads": options.threads}
        kernels = {PEER_COV: "torch.cov", PEER: "token"}
        peers = {
            name: Peer(options.peer2_python, "bench.peer2", {**spec, "kernel": kernel}, job)
            for name, kernel in kernels.items()
        }
    return compare(job, options, peers)


def section(found: Found) -> str:
    return "\n\n".join(["## Losses per token, against devinterp 2.0.1", one(found, TARGETS), HOW])


HOW = f"""As above; rows of the kernel are tokens, and n counts tokens. Plain torch evaluates 32 sequences at a time.
devinterp runs in a process of its own Python with its default loss; it evaluates its observables at the minibatch size
of SGLD (32 sequences, its default), writes its draws to a Zarr store in a temporary folder, and takes its data from
memory. Its kernel is measured twice: *{PEER_COV}* forms it from its losses as the plain loop does, *{PEER}*
calls `compute_bif(correlation_method="token", compute_covariance=True)`."""


if __name__ == "__main__":
    run_alone(measure, section, __doc__)
