"""What `bench.gpu` times: each Triton kernel, the same work in torch, and in the peers that are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.gpu_targets import ADDMM, PRODUCT
from lossk.float32 import float32_products
from lossk.ops.head_loss import head_loss
from lossk.ops.rank_update import rank_update_triangle
from lossk.ops.sample_loss import sample_loss
from lossk.ops.sgld_step import sgld_step
from lossk.ops.top_correlations import EMPTY, merge_tile

HALF = torch.bfloat16
PEERS = ("quack", "liger_kernel", "cut_cross_entropy")  # modules; of quack-kernels, liger-kernel, cut-cross-entropy


@dataclass(frozen=True)
class Sizes:
    """How large the cases are."""

    samples: int = 50_000
    ranks: tuple[int, ...] = (64, 256, 1024, 4096)
    precisions: tuple[str, ...] = ("bf16", "tf32x3")
    batch: int = 4096
    classes: tuple[int, ...] = (1000, 131_072)
    depth: int = 1024
    heads: int = 64
    parameters: tuple[int, ...] = (25_000_000, 250_000_000, 1_000_000_000)
    tile: int = 4096


TINY = Sizes(33, (3,), ("bf16", "tf32x3"), 5, (7,), 16, 2, (65,), 17)


@dataclass(frozen=True)
class Case:
    """One thing to time, and what it must at least move or compute."""

    op: str
    name: str
    run: Callable[[], object]
    bytes: float = 0.0
    flops: float = 0.0
    precision: str = "bf16"  # of the products, so of the GEMM whose rate is one limit; the copy rate is the other


def installed(peer: str) -> bool:
    """Whether a module of `PEERS` imports."""
    try:
        importlib.import_module(peer)
    except Exception:  # whatever a library built for another GPU raises
        return False
    return True


def loss_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Loss from logits, and from hidden states."""
    out = torch.zeros(sizes.batch, device=device)
    for classes in sizes.classes:
        labels = torch.arange(sizes.batch, device=device) % classes
        hidden = torch.randn(sizes.batch, sizes.depth, device=device, dtype=HALF)
        head = torch.randn(classes, sizes.depth, device=device, dtype=HALF)
        logits = hidden @ head.T
        contenders: dict[str, dict[str, Callable[..., object]]] = {
            "sample_loss": {
                "lossk": lambda x, h, w, y: sample_loss(x, y, out, backend="triton"),
                "torch": lambda x, h, w, y: cross_entropy(x, y, reduction="none"),
            },
            "head_loss": {
                "lossk": lambda x, h, w, y: head_loss(h, w, y, out, backend="triton"),
                "torch": lambda x, h, w, y: cross_entropy((h @ w.T).float(), y, reduction="none"),
                **_peers_of_head_loss(),
            },
        }
        moved, flops = 2.0 * logits.numel(), 2.0 * logits.numel() * sizes.depth
        for op, by_name in contenders.items():
            work = {"bytes": moved} if op == "sample_loss" else {"flops": flops}
            for name, function in by_name.items():
                yield Case(f"{op}, {classes:,} classes", name, _bound(function, logits, hidden, head, labels), **work)


def _bound(function: Callable[..., object], *tensors: Tensor) -> Callable[[], object]:
    return lambda: function(*tensors)


def _peers_of_head_loss() -> dict[str, Callable[..., object]]:
    found: dict[str, Callable[..., object]] = {}
    if installed("liger_kernel"):
        fused = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
        found["liger"] = lambda x, h, w, y: fused(h, w, y, reduction="none")
    if installed("cut_cross_entropy"):
        cut = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        found["cut-cross-entropy"] = lambda x, h, w, y: cut(h, w, y, reduction="none")
    return found


def panel_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """k heads over the same hidden states, in one launch or one after the other."""
    classes = sizes.classes[0]
    labels = torch.arange(sizes.batch, device=device) % classes
    hidden = torch.randn(sizes.batch, sizes.depth, device=device, dtype=HALF)
    heads = torch.randn(sizes.heads, classes, sizes.depth, device=device, dtype=HALF)
    out = torch.zeros(sizes.heads, sizes.batch, device=device)

    def one_by_one() -> None:
        for head, row in zip(heads, out, strict=True):
            head_loss(hidden, head, labels, row, backend="triton")

    op, flops = f"panel of {sizes.heads} heads, {classes:,} classes", 2.0 * heads.numel() * sizes.batch
    yield Case(op, "lossk", lambda: head_loss(hidden, heads, labels, out, backend="triton"), flops=flops)
    yield Case(op, "lossk, a launch each", one_by_one, flops=flops)


def update_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """The rank-k update of a whole triangle of float32; torch's peer adds to the whole square, as an update must."""
    matrix = torch.rand(sizes.samples, sizes.samples, device=device)
    for precision in sizes.precisions:
        for k in sizes.ranks:
            dtype = HALF if precision == "bf16" else torch.float32
            panel = torch.randn(k, sizes.samples, device=device, dtype=dtype)
            op, square = f"rank_update, {precision}, k = {k:,}", float(sizes.samples) ** 2
            rows = float(panel.numel() * panel.element_size())
            # Half of the square is read and written, 4 bytes an entry each; k rows are read once at least.
            half: dict[str, Any] = {"bytes": 4 * square + rows, "flops": square * k, "precision": precision}
            whole: dict[str, Any] = {"bytes": 8 * square + rows, "flops": 2 * square * k, "precision": precision}
            yield Case(op, "lossk", _update(matrix, panel, precision), **half)
            yield Case(op, PRODUCT if precision == "bf16" else ADDMM, _add(matrix, panel, precision), **whole)
            if precision == "bf16" and installed("quack"):
                yield Case(op, "quack-kernels", _quack(panel), **half)


def _update(matrix: Tensor, panel: Tensor, precision: str) -> Callable[[], object]:
    return lambda: rank_update_triangle(matrix, panel, backend="triton", precision=precision)


def _add(matrix: Tensor, panel: Tensor, precision: str) -> Callable[[], object]:
    """matrix += panel' panel by torch: float32 in one call, halves as their product and a sum in float32."""
    if precision == "bf16":
        return lambda: matrix.add_(panel.T @ panel)

    def add() -> None:
        with float32_products(tf32=precision == "tf32"):
            matrix.addmm_(panel.T, panel)

    return add


def _quack(panel: Tensor) -> Callable[[], object]:
    symmetric: Any = importlib.import_module("quack.gemm_interface").gemm_symmetric
    left = panel.T.contiguous()
    return lambda: symmetric(left, left.T)


def neighbor_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """The 10 nearest of each row of a tile."""
    tile, gain = torch.randn(sizes.tile, sizes.tile, device=device), torch.ones(sizes.tile, device=device)
    keys = torch.full((sizes.tile, 10), EMPTY, dtype=torch.int64, device=device)
    for backend, name in (("triton", "lossk"), ("torch", "torch")):

        def merge(backend: str = backend) -> None:
            merge_tile(keys.fill_(EMPTY), tile, gain, gain, first_row=0, first_column=sizes.tile, backend=backend)

        yield Case("top_correlations, 10 of a tile", name, merge, bytes=4.0 * tile.numel())


def step_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """The SGLD step, and the same memory traffic without the noise."""
    for count in sizes.parameters:
        w, grad, anchor = (torch.randn(count, device=device) for _ in range(3))

        def step(w: Tensor = w, grad: Tensor = grad, anchor: Tensor = anchor) -> None:
            physics = {"lr": 1e-6, "n_beta": 100.0, "localization": 10.0}
            sgld_step(w, grad, anchor, **physics, seed=1, chain=0, step=0, backend="triton")  # type: ignore[arg-type]

        op = f"sgld_step, {count:,} parameters"
        yield Case(op, "lossk", step, bytes=16.0 * count)
        yield Case(op, "floor: addcmul_", _bound(lambda w, g, a: w.addcmul_(g, a), w, grad, anchor), bytes=16.0 * count)


def all_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Every case, made when it is asked for."""
    yield from loss_cases(sizes, device)
    yield from panel_cases(sizes, device)
    yield from step_cases(sizes, device)
    yield from update_cases(sizes, device)
    yield from neighbor_cases(sizes, device)
