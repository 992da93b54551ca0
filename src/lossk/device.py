"""What is asked of a CUDA device: free memory, waiting, a second stream. On any other device these do nothing.

Everything in this file that touches CUDA has never run on a GPU; what is decided from it is in
`lossk.plan.device_plan`, which is plain arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from lossk.available import available_bytes

Item = TypeVar("Item")
Moved = TypeVar("Moved")


def free_bytes(device: torch.device) -> int:
    """Memory that tensors on `device` could take now: the driver's free bytes and what torch keeps for reuse."""
    if device.type != "cuda":
        return available_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def repeats(device: torch.device) -> str:
    """What a run repeats to with the same settings, machine and versions: "bitwise", or "within rounding".

    On a CUDA device torch's own passes add up some gradients (of convolutions, embeddings, scatters) in any order,
    unless `torch.use_deterministic_algorithms(True)` is set, which has them raise where there is no other way.
    """
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return "bitwise" if device.type == "cpu" or strict else "within rounding"


def make_current(device: torch.device, before: int | None = None) -> int | None:
    """Have pinning, streams and NCCL of this process use its own CUDA device, not the first one of the machine.

    Returns:
        The device that was current, to be made current again: `before` if given; None where CUDA was not in use yet,
        for going back would take memory on a device that this process never used.
    """
    if device.type != "cuda" or device.index is None:
        return before
    if before is None and torch.cuda.is_initialized():
        before = torch.cuda.current_device()
    torch.cuda.set_device(device)
    return before


def settle(device: torch.device) -> None:
    """Wait until all work on `device` is done, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """Device memory that `work` took at its peak, beyond what was held before it; 0 where nothing counts it."""
    if device.type != "cuda":
        work()
        return 0
    settle(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    settle(device)
    return torch.cuda.max_memory_allocated(device) - before


def pinned(tensor: Tensor) -> Tensor:
    """The tensor in page-locked host memory, which a CUDA device reads while it computes."""
    return tensor.cpu().pin_memory() if torch.cuda.is_available() else tensor.cpu()


class SideStream:
    """A second queue of work on a CUDA device, beside the one that passes run on; elsewhere work runs at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def after(self, *inputs: Tensor) -> Iterator[None]:
        """What is launched inside runs once everything launched before is done, and reads `inputs`."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        for tensor in inputs:
            tensor.record_stream(self._stream)  # their memory is not given away before the side stream is done

    def join(self) -> None:
        """What is launched from here on runs after all of the side stream's work."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


def ahead(
    items: Iterable[Item],
    move: Callable[[Item], Moved],
    tensors: Callable[[Moved], Iterable[Tensor]],
    device: torch.device,
    side: SideStream | None = None,
) -> Iterator[Moved]:
    """`move` of each item in order, the next one on its way to `device` while the caller computes on this one.

    Args:
        side: the stream of the moves; None is one of its own, which costs a pool of memory of its own too.
    """
    side = side or SideStream(device)
    waiting: list[Moved] = []
    for item in items:
        with side.after():
            moved = move(item)
        if waiting:
            yield waiting.pop()
        side.join()
        for tensor in tensors(moved):
            if device.type == "cuda":
                tensor.record_stream(torch.cuda.current_stream(device))
        waiting.append(moved)
    yield from waiting
