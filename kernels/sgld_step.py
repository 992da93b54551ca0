"""One SGLD step over the flat buffer: drift and counter-based noise in one pass, in place.

12 bytes read and 4 written per element (RMSprop: 16 and 8). About 12 wide multiplies of Philox and 45 float32
operations per element make it memory-bound on paper on an A100 or H100; no GPU was at hand to confirm that.
The equations are in `lossk.ops.sgld_step`.
"""

import triton
import triton.language as tl
from torch import Tensor

from lossk.kernels.launch import Config, launch, signed
from lossk.kernels.normals import normals_of_blocks

BLOCK = 256  # counters of a program: 1024 elements. Not tuned: no GPU was at hand.


@triton.jit(do_not_specialize=["count", "seed", "chain", "step"])
def sgld_step_kernel(
    w_ptr,  # [P] float32, changed
    grad_ptr,  # [P] float32
    anchor_ptr,  # [P] float32
    square_avg_ptr,  # [P] float32, changed if UPDATE; not read unless RMSPROP
    count: tl.int64,
    grad_scale,  # -(lr/2) n_beta
    anchor_scale,  # -(lr/2) localization
    noise_scale,  # sqrt(lr)
    alpha,
    one_minus_alpha,
    stability,
    seed: tl.int32,
    chain: tl.int32,
    step: tl.int32,
    RMSPROP: tl.constexpr,
    UPDATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    xi = normals_of_blocks(first + tl.arange(0, BLOCK), seed, chain, step, step * 0)
    element = 4 * first + tl.arange(0, 4 * BLOCK)
    inside = element < count
    w = tl.load(w_ptr + element, mask=inside)
    grad = tl.load(grad_ptr + element, mask=inside)
    anchor = tl.load(anchor_ptr + element, mask=inside)
    drift = grad_scale * grad + anchor_scale * (w - anchor)
    if RMSPROP:
        v = tl.load(square_avg_ptr + element, mask=inside)
        if UPDATE:
            v = alpha * v + one_minus_alpha * (grad * grad)
            tl.store(square_avg_ptr + element, v, mask=inside)
        gain = tl.div_rn(1.0, tl.sqrt_rn(v) + stability)
        w += gain * drift + noise_scale * tl.sqrt_rn(gain) * xi
    else:
        w += noise_scale * xi + drift
    tl.store(w_ptr + element, w, mask=inside)


def configuration(rmsprop: bool, update: bool) -> Config:
    """What `sgld_step` launches."""
    label = "plain" if not rmsprop else "RMSprop" if update else "RMSprop, V kept"
    types = ["*fp32"] * 4 + ["i64"] + ["fp32"] * 6 + ["i32"] * 3
    return Config(sgld_step_kernel, label, types, {"RMSPROP": rmsprop, "UPDATE": rmsprop and update, "BLOCK": BLOCK})


def configs() -> list[Config]:
    """Every configuration that `sgld_step` can launch."""
    return [configuration(False, False), configuration(True, True), configuration(True, False)]


def sgld_step(
    w: Tensor,
    grad: Tensor,
    anchor: Tensor,
    square_avg: Tensor | None,
    *,
    lr: float,
    n_beta: float,
    localization: float,
    alpha: float,
    stability: float,
    update_square_avg: bool,
    seed: int,
    chain: int,
    step: int,
) -> None:
    """Update w (and square_avg) [P] float32 in place; arguments are checked by `lossk.ops.sgld_step`."""
    config = configuration(square_avg is not None, update_square_avg)
    scales = (-0.5 * lr * n_beta, -0.5 * lr * localization, lr**0.5, alpha, 1 - alpha, stability)
    launch(
        config,
        triton.cdiv(w.numel(), 4 * BLOCK),
        w,
        grad,
        anchor,
        w if square_avg is None else square_avg,
        w.numel(),
        *(float(scale) for scale in scales),
        *(signed(word) for word in (seed, chain, step)),
    )
