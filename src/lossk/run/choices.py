"""What was chosen for a run, as a value: saved with it, and known to every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lossk.pilot.pilot import Pilot
from lossk.samplers.samplers import Sampler
from lossk.task.passes import Passes


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A resumed run must not choose anew."""

    pilot: Pilot | None
    sampler: Sampler  # every "auto" filled in
    reasons: list[str]
    passes: Passes
    anchor_loss: float  # mean of the training losses at w*, nats
    scales: dict[str, float] | None  # D of each parameter, where the sampler has a metric: the law is not known without

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for a store's config and for other ranks."""
        return {
            "pilot": None if self.pilot is None else self.pilot.to_dict(),
            "sampler": self.sampler.to_dict(),
            "reasons": self.reasons,
            "passes": self.passes.to_dict(),
            "anchor_loss": self.anchor_loss,
            **({} if self.scales is None else {"scales": self.scales}),
        }
