"""The Triton kernels `lossk.kernels`: loaded at first use, and used only after they have reproduced known numbers.

Importing lossk never imports triton. A kernel that does not compile, or whose numbers differ from the reference on the
device at hand, is refused with the reason; nothing falls back in silence. With TRITON_INTERPRET=1 in the environment
when Python starts, kernels run in Triton's interpreter on the CPU: slow, for tests and for reading along.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from lossk.checks import check_instance
from lossk.errors import BackendError
from lossk.operands import check_word
from lossk.records import check_record

OPS = ("head_loss", "rank_update", "sample_loss", "sgld_step", "top_correlations")
OLDEST, NEWEST = (3, 4), (3, 9)  # versions of Triton: every kernel compiles under both, and was tried under no others


@dataclass(frozen=True)
class KernelStatus:
    """Whether an op's Triton kernel can run on a device, and if not why."""

    available: bool
    reason: str  # "" when available
    interpreted: bool  # in Triton's interpreter: no measure of anything but the numbers

    def __post_init__(self) -> None:
        check_record(self)


def find_kernels() -> None:
    """Have `lossk.kernels` import from a source folder that was never built, where it lies beside `src/`."""
    if importlib.util.find_spec("lossk.kernels") is not None:
        return
    folder = Path(__file__).resolve().parents[3] / "kernels"
    spec = importlib.util.spec_from_file_location(
        "lossk.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None or not folder.is_dir():
        raise ImportError(f"lossk.kernels is neither installed nor at {str(folder)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["lossk.kernels"] = module
    spec.loader.exec_module(module)


def status(op: str, device: torch.device) -> KernelStatus:
    """Load and test the kernel of an op of `OPS` (once per process and device); never raises."""
    _check_call(op, device)
    return _load(op, device)[0]


def load(op: str, device: torch.device) -> ModuleType:
    """The kernel's module.

    Raises:
        BackendError: it cannot run on `device`; the message says why.
    """
    _check_call(op, device)
    found, module = _load(op, device)
    if module is None:
        raise BackendError(f'backend "triton" cannot run {op} here: {found.reason}; available: "torch"')
    return module


def refusal(device: torch.device) -> str:
    """Why not every op's kernel can run on `device`; "" when all can."""
    check_instance("device", device, torch.device)
    for op in OPS:
        found = status(op, device)
        if not found.available:
            return found.reason
    return ""


def _outside(version: str) -> str:
    """What a version of Triton is that lies outside `OLDEST` to `NEWEST`, in words; "" for one within."""
    found = _numbers(version)
    if found < OLDEST:
        return f"Triton {version} is older than {_dotted(OLDEST)}, the oldest that the kernels compile under"
    if found > NEWEST:
        return f"Triton {version} is newer than {_dotted(NEWEST)}, the newest that the kernels were tried under"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    """(3, 6) of "3.6.1+git"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _check_call(op: str, device: torch.device) -> None:
    check_word("op", op, OPS)
    check_instance("device", device, torch.device)


def _load(op: str, device: torch.device) -> tuple[KernelStatus, ModuleType | None]:
    try:
        version = importlib.import_module("triton").__version__
        if _numbers(version) < OLDEST:
            return KernelStatus(False, f'{_outside(version)}: pip install "lossk[triton]"', False), None
        from triton import knobs
    except ImportError as error:
        return KernelStatus(False, f"triton does not import ({error})", False), None
    interpreted = bool(knobs.runtime.interpret)
    if device.type != "cuda" and not interpreted:
        reason = (
            f"the Triton kernels need a CUDA device, and this is {device} "
            "(TRITON_INTERPRET=1, set before Python starts, interprets them on the CPU)"
        )
        return KernelStatus(False, reason, False), None
    return _tested(op, device, interpreted)


@functools.cache
def _tested(op: str, device: torch.device, interpreted: bool) -> tuple[KernelStatus, ModuleType | None]:
    try:
        find_kernels()
        module = importlib.import_module(f"lossk.kernels.{op}")
        problem = importlib.import_module(f"lossk.ops.{op}").self_test(module, device)
    except Exception as error:  # whatever a compiler or a driver does, the reference still runs
        problem = f"{type(error).__name__}: {error}"
    if problem:
        problem = "; ".join(filter(None, (problem, _outside(importlib.import_module("triton").__version__))))
        return KernelStatus(False, f"the {op} kernel fails its self-test ({problem})", interpreted), None
    return KernelStatus(True, "", interpreted), module
