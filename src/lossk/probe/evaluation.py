"""The probe passes of a chain's draws: at the weights themselves, or at copies while the chain goes on.

Copies are kept of draws that differ in a fused head only, to be evaluated several at a time; and, with
`Passes.overlap`, of every draw, whose pass then runs on a stream of its own beside the chain's next steps. Two orders
make that right, and both are the streams' to keep: a pass waits for the copy that it reads, and the next copy waits for
the pass that reads the last one. On a device without streams everything runs in the order in which it is launched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lossk.device import SideStream
from lossk.probe.probe import Probe, first_non_finite
from lossk.samplers.chain import Chain, Draw
from lossk.timings import Timings


class Evaluation:
    """Evaluates the draws of one chain in the order they come: `keep` each, `start` when there are enough, `finish`.

    Args:
        most: draws that are kept at a time, at most.
    """

    def __init__(self, chain: Chain, probe: Probe, most: int, timings: Timings) -> None:
        self.chain, self.probe, self.timings = chain, probe, timings
        self.task = chain.task
        self.group = self.task.draws_at_a_time(most)
        self.beside = self.task.passes.overlap is True
        self._side = SideStream(self.task.device)
        self._copies: Tensor | None = None  # [group, P]
        if self.group > 1 or self.beside:
            self._copies = torch.empty(self.group, self.task.num_weights, device=self.task.device, dtype=torch.float32)
        self._kept: list[Draw] = []
        self._running: tuple[Tensor, list[Draw]] | None = None

    def keep(self, draw: Draw) -> bool:
        """Take in a draw, whose weights are in `task.flat` until the next step; returns whether it is time to start."""
        if self._copies is not None:
            self.finish()  # it may still read the copies
            self._copies[len(self._kept)] = self.task.weights()
        self._kept.append(draw)
        return len(self._kept) == self.group

    def start(self, rows: Tensor) -> None:
        """Evaluate the draws kept so far into rows [k, N] float32; these are not to be read before `finish`."""
        draws, self._kept = self._kept, []
        with self.timings.measure("probe"):
            if self.beside:
                assert self._copies is not None
                with self._side.after(self._copies, rows):
                    self._fill(rows)
            else:
                self._fill(rows)
        self._running = rows, draws
        if not self.beside:
            self.finish()

    def _fill(self, rows: Tensor) -> None:
        if self._copies is None:
            self.probe.fill(self.task, rows[0])
        elif self.group > 1:
            self.probe.fill(self.task, rows, self._copies[: len(rows)])
        else:
            with self.task.reading(self._copies[0]):
                self.probe.fill(self.task, rows[0])

    def finish(self) -> None:
        """Wait for what was started last, and look at it.

        Raises:
            DivergedError: a loss is not finite.
        """
        if self._running is None:
            return
        (rows, draws), self._running = self._running, None
        with self.timings.measure("probe"):
            self._side.join()
            for row, draw in zip(rows, draws, strict=True):
                bad = first_non_finite(row)
                if bad is not None:
                    late = f" at draw {draw.draw}" if self.beside or draw is not draws[-1] else ""
                    raise self.chain.diverged(f"{self.probe.describe(bad)} has loss {float(row[bad])}{late}")
