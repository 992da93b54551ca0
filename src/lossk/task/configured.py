"""How a task's passes are run and its losses formed: settled before it is entered, by these methods only."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

from torch import nn

from lossk.task.head import FusedHead
from lossk.task.losses import Loss
from lossk.task.passes import Passes


class Configured:
    """What `lossk.task.task.Task` runs in its `with` block."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.passes = Passes()
        self.suffix: nn.Module | None = None  # what the passes run in the model's place, on activations at a cut
        self.head: FusedHead | None = None  # what forms the losses of the probe without logits, if anything
        self.arguments: tuple[int, frozenset[str]] | None = None  # what calls give the network's forward, if known
        self.rewritable = True  # whether norms may be folded
        self._entered: ExitStack | None = None  # what puts everything back

    def use_passes(self, passes: Passes) -> None:
        """Run the passes so, from the next `with` block on."""
        self._refuse_if_entered()
        self.passes = passes

    def use_loss(self, loss: Loss) -> None:
        """Form the losses so, from the next `with` block on."""
        self._refuse_if_entered()
        self.loss = loss

    def use_head(self, head: FusedHead | None) -> None:
        """Form the probe's losses by that, if anything, from the next `with` block on."""
        self._refuse_if_entered()
        self.head = head

    def arrange(
        self, *, passes: Passes, loss: Loss, suffix: nn.Module | None, head: FusedHead | None,
        arguments: tuple[int, frozenset[str]] | None, rewritable: bool,
    ) -> None:  # fmt: skip
        """What the passes run, from the next `with` block on: `lossk.probe.arrangement.Arrangement`."""
        self._refuse_if_entered()
        self.passes, self.loss, self.suffix, self.head = passes, loss, suffix, head
        self.arguments, self.rewritable = arguments, rewritable

    def set_overlap(self, overlap: bool) -> None:
        """Whether the probe runs beside the chain's next steps: all that may change within the `with` block."""
        self.passes = dataclasses.replace(self.passes, overlap=overlap)

    def _refuse_if_entered(self) -> None:
        assert self._entered is None, "a task is configured before it is entered"
