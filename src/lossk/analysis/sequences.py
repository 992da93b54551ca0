"""From the losses of tokens to those of whole sequences, at the same draws."""

from __future__ import annotations

import numpy as np
import torch

from lossk.analysis.inputs import check_traces
from lossk.kernel.traces import LossTraces


def sequence_traces(traces: LossTraces) -> LossTraces:
    """Loss traces [C, T, S] of sequences: each draw's sum over a sequence's unmasked tokens, in nats.

    The kernel of these is the token kernel summed over blocks, K_ab = sum of K_ij over tokens i of sequence a and j of
    sequence b, of one and the same run. A sequence's number is its order among those with an unmasked token; with
    several probe sets, those of a set are together, and `sets` says where.

    Args:
        traces: of a loss per token, with `tokens`.

    Raises:
        ValueError: traces of a loss per sample.
    """
    traces = check_traces("traces", traces)
    if traces.tokens is None:
        raise ValueError("traces must be those of a loss per token (traces.tokens), got a loss per sample")
    sample = traces.tokens[:, 0].numpy()  # a sequence's rows are consecutive
    changes = set((np.flatnonzero(np.diff(sample)) + 1).tolist())
    changes |= {rows.start for rows in traces.sets.values()}  # one set may end and the next begin at the same number
    starts = np.array(sorted({0} | changes))
    losses = np.add.reduceat(traces.losses.numpy(), starts, axis=2, dtype=np.float64)  # [C, T, S]
    sets = {
        name: slice(int(np.searchsorted(starts, rows.start)), int(np.searchsorted(starts, rows.stop)))
        for name, rows in traces.sets.items()
    }
    return LossTraces(torch.from_numpy(losses), excess=traces.excess, n_beta=traces.n_beta, meta=traces.meta, sets=sets)
