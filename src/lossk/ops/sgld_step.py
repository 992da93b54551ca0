"""One SGLD step in place: fused drift and counter-based noise.

With D = n_beta * grad + localization * (w - anchor) and xi ~ N(0, 1), element by element:

    plain:    w <- w - (lr/2) D + sqrt(lr) xi
    RMSprop:  V <- alpha V + (1 - alpha) grad^2,    G = 1 / (sqrt(V) + stability)
              w <- w - (lr/2) G D + sqrt(lr) sqrt(G) xi

Welling and Teh, "Bayesian learning via stochastic gradient Langevin dynamics", ICML 2011; preconditioned: Li, Chen,
Carlson, Carin, AAAI 2016. xi is a function of (seed, chain, step, element) alone (see philox.py), so a step does not
depend on the backend (up to rounding), the number of threads, the number of parameters, or earlier steps.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lossk.checks import MOST_NUMBER, check_flag, plain_scalar, wrong_kind
from lossk.operands import check_operands, check_word
from lossk.ops import extension, philox, triton_kernels
from lossk.ops.self_test_numbers import waves

BACKENDS = ("torch", "cpp", "triton")
CHUNK = 2**18  # weights that the reference moves at a time on a CPU: its temporaries are several vectors of them


def sgld_step(
    w: Tensor,
    grad: Tensor,
    anchor: Tensor,
    *,
    lr: float,
    n_beta: float,
    localization: float,
    seed: int,
    chain: int,
    step: int,
    backend: str,
    square_avg: Tensor | None = None,
    alpha: float = 0.99,
    stability: float = 0.1,
    update_square_avg: bool = True,
) -> None:
    """Update w (and square_avg) in place.

    Args:
        w: [P] float32, contiguous (on the CPU for "cpp"): the weights, changed.
        grad: [P] float32: gradient of the minibatch mean loss at w.
        anchor: [P] float32: the trained weights w*.
        lr: step size, > 0.
        n_beta: inverse temperature times n, >= 0.
        localization: strength of the pull to the anchor, >= 0.
        seed, chain, step: integers in [0, 2^32); they select the noise.
        backend: "torch" (the reference), "cpp" or "triton".
        square_avg: [P] float32: V, changed; None for the plain step.
        alpha: decay of V, in [0, 1).
        stability: added to sqrt(V), > 0.
        update_square_avg: False leaves V as it is and only uses it.

    Raises:
        TypeError, ValueError: a bad argument; nothing has been changed.
        BackendError: "cpp" or "triton" cannot run here.
    """
    lr = _check_number("lr", lr, positive=True)
    n_beta = _check_number("n_beta", n_beta, positive=False)
    localization = _check_number("localization", localization, positive=False)
    stability = _check_number("stability", stability, positive=True)
    alpha = _as_number("alpha", alpha)
    if not 0.0 <= alpha < 1.0:
        raise ValueError(f"alpha must be in [0, 1), got {alpha}")
    seed, chain, step = (
        philox.check_uint32(name, value) for name, value in (("seed", seed), ("chain", chain), ("step", step))
    )
    update_square_avg = check_flag("update_square_avg", update_square_avg)
    check_word("backend", backend, BACKENDS)
    _check(w, grad, anchor, square_avg, backend)

    if backend == "torch":
        xi = philox.normals(seed, chain, step, w.numel()).to(w.device)
        size = CHUNK if w.device.type == "cpu" else max(w.numel(), 1)
        with torch.no_grad():
            for start in range(0, w.numel(), size):
                part = slice(start, start + size)
                average = None if square_avg is None else square_avg[part]
                sgld_step_reference(
                    w[part], grad[part], anchor[part], xi[part], lr, n_beta, localization, average, alpha, stability,
                    update_square_avg,
                )  # fmt: skip
        return

    options = {
        "lr": lr,
        "n_beta": n_beta,
        "localization": localization,
        "alpha": alpha,
        "stability": stability,
        "update_square_avg": update_square_avg,
        "seed": seed,
        "chain": chain,
        "step": step,
    }
    if backend == "triton":
        module = triton_kernels.load("sgld_step", w.device)
        if w.numel():
            module.sgld_step(w.detach(), grad.detach(), anchor, square_avg, **options)
    else:
        extension.load().sgld_step(
            w=w.data_ptr(),
            grad=grad.data_ptr(),
            anchor=anchor.data_ptr(),
            square_avg=0 if square_avg is None else square_avg.data_ptr(),
            count=w.numel(),
            num_threads=torch.get_num_threads(),
            **options,
        )
    # Autograd must know, as after any in-place operation, that tensors it may have saved have changed.
    changed = [w] if square_avg is None or not update_square_avg else [w, square_avg]
    torch.autograd.graph.increment_version([t for t in changed if not t.is_inference()])


def sgld_step_reference(
    w: Tensor,
    grad: Tensor,
    anchor: Tensor,
    xi: Tensor,
    lr: float,
    n_beta: float,
    localization: float,
    square_avg: Tensor | None = None,
    alpha: float = 0.99,
    stability: float = 0.1,
    update_square_avg: bool = True,
) -> None:
    """The equations above in plain torch, for given noise xi [P]; any dtype."""
    drift = n_beta * grad + localization * (w - anchor)
    if square_avg is None:
        w.add_(drift, alpha=-lr / 2).add_(xi, alpha=math.sqrt(lr))
        return
    if update_square_avg:
        square_avg.mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
    gain = 1 / (square_avg.sqrt() + stability)
    w.addcmul_(gain, drift, value=-lr / 2).addcmul_(gain.sqrt(), xi, value=math.sqrt(lr))


def _check(w: Tensor, grad: Tensor, anchor: Tensor, square_avg: Tensor | None, backend: str) -> None:
    tensors = {"w": w, "grad": grad, "anchor": anchor}
    if square_avg is not None:
        tensors["square_avg"] = square_avg
    for name, tensor in tensors.items():
        check_operands(**{name: tensor})
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {tensor.dtype}")
        if tensor.device != w.device or (backend == "cpp" and tensor.device.type != "cpu"):
            where = "the CPU for backend='cpp'" if backend == "cpp" else f"w's device, {w.device}"
            raise ValueError(f"{name} must be on {where}, got {tensor.device}")
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be flat and contiguous, got {list(tensor.shape)}, stride {tensor.stride()}")
        if tensor.numel() != w.numel():
            raise ValueError(f"{name} must have the {w.numel()} elements of w, got {tensor.numel()}")


def _check_number(name: str, value: Any, *, positive: bool) -> float:
    number = _as_number(name, value)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name} must be finite and {'> 0' if positive else '>= 0'}, got {number}")
    return number


def _as_number(name: str, value: Any) -> float:
    plain = plain_scalar(value)
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise wrong_kind(name, "a number", value)
    return math.inf if abs(plain) > MOST_NUMBER else float(plain)  # NaN stays NaN


def self_test(module: ModuleType, device: torch.device) -> str:
    """The Triton kernel on a plain and an RMSprop step of ragged thousands of elements; returns what differs."""
    count = 2051
    key: dict[str, Any] = {"seed": 0xDEADBEEF, "chain": 3, "step": 7}
    physics: dict[str, Any] = {"lr": 0.01, "n_beta": 30.0, "localization": 2.0, "alpha": 0.9, "stability": 0.1}
    w, grad, anchor, square = waves(4, count)
    xi = philox.normals(key["seed"], key["chain"], key["step"], count).double()
    for square_avg in (None, square.square()):
        v = None if square_avg is None else square_avg.double()
        expected = w.double()
        sgld_step_reference(expected, grad.double(), anchor.double(), xi, square_avg=v, **physics)
        got = w.clone().to(device)
        got_v = None if square_avg is None else square_avg.clone().to(device)
        module.sgld_step(got, grad.to(device), anchor.to(device), got_v, **physics, **key, update_square_avg=True)
        same_v = v is None or got_v is None or bool(((got_v.cpu() - v).abs() <= 1e-6).all())
        if not (same_v and bool(((got.cpu() - expected).abs() <= 2e-6).all())):
            return f"a {'plain' if v is None else 'RMSprop'} step differs from the reference"
    return ""
