"""A loss kernel while devinterp 1.3's sampler runs: its callback protocol, and nothing else of it."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import Tensor, nn

from lossk.checks import check_choice, check_instance, check_integer, check_number, check_optional
from lossk.data.reading import read_samples
from lossk.data.trees import map_tensors
from lossk.kernel.kernel import LossKernel
from lossk.kernel.traces import LossTraces
from lossk.settings import CENTERINGS, MOST_DRAWS
from lossk.task.losses import LossFunction, resolve_loss


class LossKernelCallback:
    """For `sample(..., callbacks=[LossKernelCallback(...)])` of devinterp 1.3: the losses of the probe at every draw.

    Their draws happen in train mode. This one evaluates in eval mode (no dropout, batch norm by its running
    statistics) and puts every module's mode back, so that their chain goes on as if nothing had been.

    The state is a tensor made beforehand in shared memory, so that it also comes back from `cores > 1`; with these,
    `loss` must be one that pickles.

    Args:
        num_chains, num_draws: as given to `sample`.
        probe: the N samples: a DataLoader, a Dataset or a tuple (inputs, targets) of tensors.
        loss: "cross_entropy", "mse" or a callable (model, batch) -> losses [B].
        batch_size: samples per forward pass.
        centering: "chain" or "pooled", of the kernel.
        nbeta: for the kernel's diagnostics, if known.

    Attributes:
        losses: [chain, draw, N] float32, nats; NaN where there has been no draw.

    Raises:
        ValueError, TypeError: a bad argument.
    """

    def __init__(
        self,
        num_chains: int,
        num_draws: int,
        probe: Any,
        *,
        loss: str | LossFunction = "cross_entropy",
        batch_size: int = 256,
        centering: str = "chain",
        nbeta: float | None = None,
    ) -> None:
        num_chains = check_integer("num_chains", num_chains, 1, ceiling=MOST_DRAWS)
        num_draws = check_integer("num_draws", num_draws, 2, ceiling=MOST_DRAWS)
        batch_size = check_integer("batch_size", batch_size, 1)
        nbeta = check_optional(check_number, "nbeta", nbeta, above=0.0)
        check_choice("centering", centering, CENTERINGS)
        resolve_loss(loss)  # a bad name is refused now
        self.probe = read_samples(probe, "probe")
        self.loss, self.batch_size, self.centering, self.nbeta = loss, batch_size, centering, nbeta
        size = 4 * num_chains * num_draws * len(self.probe)
        if size > psutil.virtual_memory().available:
            raise MemoryError(f"num_chains x num_draws losses of the probe need {size / 1e9:.1f} GB, more than is free")
        self.losses = torch.full(
            (num_chains, num_draws, len(self.probe)), float("nan"), dtype=torch.float32, device="cpu"
        )
        self.losses.share_memory_()

    def share_memory_(self) -> LossKernelCallback:
        """Of their callbacks; here the state is shared from the start."""
        return self

    def __call__(self, chain: int, draw: int, model: nn.Module, **local: Any) -> None:
        """Note the losses at one draw; `local` is what else their sampler has at hand."""
        check_instance("model", model, nn.Module)
        chains, draws = self.losses.shape[:2]
        chain, draw = check_integer("chain", chain, 0, chains - 1), check_integer("draw", draw, 0, draws - 1)
        modes = [(module, module.training) for module in model.modules()]
        device, loss = next(model.parameters()).device, resolve_loss(self.loss)
        model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(self.probe), self.batch_size):
                    batch = map_tensors(lambda tensor: tensor.to(device), self.probe[start : start + self.batch_size])
                    rows, mask = loss.rows(model, batch)
                    if mask is not None:
                        raise ValueError("loss must be of samples here, [B], got one of tokens, [B, T] with a mask")
                    self.losses[chain, draw, start : start + self.batch_size] = rows.cpu()
        finally:
            for module, mode in modes:
                module.training = mode

    def finalize(self) -> None:
        """Of their protocol; there is nothing left to do."""

    def traces(self) -> LossTraces:
        """The losses [chain, draw, N].

        Raises:
            ValueError: a draw is missing or not finite, naming it.
        """
        return LossTraces(self.losses, n_beta=self.nbeta, meta={"source": "devinterp"})

    @property
    def kernel(self) -> LossKernel:
        """The loss kernel of the draws, in factor form."""
        return LossKernel.from_traces(self.traces(), centering=self.centering)

    def get_results(self) -> dict[str, Any]:
        """{"loss_kernel": LossKernel, "loss_kernel/trace": [chain, draw, N] array}, once sampled."""
        trace: Tensor = self.losses
        return {"loss_kernel": self.kernel, "loss_kernel/trace": trace.numpy()}
