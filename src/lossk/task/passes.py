"""How forward and backward passes are run: settings that change the time of a result, and its last digits at most."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from lossk.checks import check_choice, check_flag, check_instance, check_integer, check_optional, check_text, wrong_kind
from lossk.memory import MOST_BYTES
from lossk.settings import put

MEMORY_FORMATS = ("channels_last", "contiguous")
MOST_THREADS = 4096  # that torch is asked for: far more than any machine has cores
UPDATE_PRECISIONS = ("fp32", "tf32x3", "tf32", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Settings of the passes; what a pilot chooses where none are given (`build_kernel(passes=None)`).

    Runs of one seed with the same settings, machine and backend repeat bitwise; on a CUDA device within rounding, and
    bitwise under `torch.use_deterministic_algorithms(True)` (`kernel.meta["repeats"]`). `memory_format` also decides
    which weight receives which random number: two formats are two realisations of the same chain.

    Args:
        probe_batch: samples per forward pass of the probe.
        gradient_batch: samples per backward pass at most; a larger minibatch is accumulated over several.
        memory_format: "channels_last" or "contiguous"; of the data and weights of 2-d convolutions.
        num_threads: torch's threads during the run; None leaves them as they are.
        fold_norms: run a batch norm and the convolution before it as one convolution, where the model can be traced.
        frozen_prefix: run what depends on no sampled weight once and keep its activations. True cuts a traceable model
            before its first sampled weight (named losses), and any other at its modules, within its own forward and
            any loss; a name cuts at that module, whose output must be the model's.
        prefix_bytes: memory that the activations may take, more is not kept; None is a quarter of what is free, and
            beyond it, on a CPU, what modules give goes to mapped files.
        compile: pass the model through `torch.compile`, which must be able to compile it; "graphs" has it replay CUDA
            graphs ("reduce-overhead"), on a CUDA device.
        fused_head: of a model that ends in a linear layer (named cross entropies only), form the losses of the probe
            without logits; if nothing but that layer is sampled, those of several draws at once. "auto" does so with
            backend "triton"; True also with the others, in chunks. `kernel.meta["passes"]` says what was done.
        overlap: evaluate the probe at a copy of the weights while the chain's next steps go on, on a CUDA stream of its
            own; the same numbers. "auto" does so on a CUDA device that has the memory for it. Not with
            "graphs", which replay in memory of their own.
        update_precision: of the products in the rank-k update with backend "triton"; sums are float32. It puts an entry
            of K off by at most 2^-20 of sqrt(K_ii K_jj) with "tf32x3" (2^-23 with "fp32"), 2^-10 with "tf32" or "fp16",
            2^-7 with "bf16".

    Raises:
        TypeError, ValueError: a bad setting, named.
    """

    probe_batch: int = 256
    gradient_batch: int = 1024
    memory_format: Literal["channels_last", "contiguous"] = "channels_last"
    num_threads: int | None = None
    fold_norms: bool = False
    frozen_prefix: bool | str = True
    prefix_bytes: int | None = None
    compile: bool | Literal["graphs"] = False
    fused_head: bool | Literal["auto"] = "auto"
    overlap: bool | Literal["auto"] = "auto"
    update_precision: Literal["fp32", "tf32x3", "tf32", "fp16", "bf16"] = "tf32x3"

    def __post_init__(self) -> None:
        put(
            self,
            probe_batch=check_integer("probe_batch", self.probe_batch, 1),
            gradient_batch=check_integer("gradient_batch", self.gradient_batch, 1),
            memory_format=check_choice("memory_format", self.memory_format, MEMORY_FORMATS),
            num_threads=check_optional(check_integer, "num_threads", self.num_threads, 1, ceiling=MOST_THREADS),
            fold_norms=check_flag("fold_norms", self.fold_norms),
            frozen_prefix=_check_prefix(self.frozen_prefix),
            prefix_bytes=check_optional(check_integer, "prefix_bytes", self.prefix_bytes, 0, ceiling=MOST_BYTES),
            compile=check_choice("compile", self.compile, (True, False, "graphs")),
            fused_head=check_choice("fused_head", self.fused_head, (True, False, "auto")),
            overlap=check_choice("overlap", self.overlap, (True, False, "auto")),
            update_precision=check_choice("update_precision", self.update_precision, UPDATE_PRECISIONS),
        )
        if self.overlap is True and self.compile == "graphs":
            raise ValueError('overlap=True and compile="graphs" exclude one another')

    def to_dict(self) -> dict[str, Any]:
        """A plain, JSON-ready form; `Passes(**d)` gives it back."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        threads = "" if self.num_threads is None else f", {self.num_threads} threads"
        beside = ", probe beside steps" if self.overlap is True else ""
        return (
            f"{self.probe_batch} samples a probe pass, {self.gradient_batch} a gradient pass, {self.memory_format}"
            f"{threads}{', norms folded' if self.fold_norms else ''}{', compiled' if self.compile else ''}"
            f"{', head fused' if self.fused_head is True else ''}{beside}"
        )


def check_passes(passes: Any) -> Passes | None:
    """A `Passes` or None."""
    return check_instance("passes", passes, Passes, optional=True)


def _check_prefix(frozen_prefix: Any) -> bool | str:
    if isinstance(frozen_prefix, str):
        return check_text("frozen_prefix", frozen_prefix)
    try:
        return check_flag("frozen_prefix", frozen_prefix)
    except TypeError:
        raise wrong_kind("frozen_prefix", "True, False or the name of a module", frozen_prefix) from None


def resumed_passes(asked: Passes | None, saved: Passes) -> Passes:
    """The passes of the run that is resumed; `overlap`, which bears on nothing but time, as asked for now.

    Raises:
        ValueError: others are asked for.
    """
    saved = dataclasses.replace(saved, overlap="auto" if asked is None else asked.overlap)
    if asked is not None and asked.fused_head == "auto":  # what it came to is kept
        asked = dataclasses.replace(asked, fused_head=saved.fused_head)
    if asked not in (None, saved):
        raise ValueError(f"passes must be those of the run that is resumed, {saved!r}, got {asked!r}")
    return saved
