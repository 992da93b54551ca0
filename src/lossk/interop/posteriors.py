"""With posteriors, or any other torch sampler: its draws to a loss kernel, and lossk's SGLD as one of its transforms.

    transform = lossk.interop.posteriors.build(log_posterior, lr=1e-5, temperature=1 / n)  # for posteriors.sgmcmc.sgld
    state = transform.init(params)
    state, aux = transform.update(state, batch)

    kernel = kernel_from_weights((dict(s.params) for s in draws), model, probe)

posteriors itself is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lossk.checks import check_callable, check_flag, check_instance, check_number, shown
from lossk.interop.weights import kernel_from_weights
from lossk.ops.philox import check_uint32
from lossk.ops.sgld_step import sgld_step
from lossk.run.backends import resolve_backend

__all__ = ["SGLDState", "Transform", "build", "init", "kernel_from_weights", "update"]

LogPosterior = Callable[[Any, Any], tuple[Tensor, Any]]  # (params, batch) -> (log posterior, anything)
Schedule = Callable[[Tensor], Any]  # the step's number to a value


class SGLDState(NamedTuple):
    """Where a chain stands. `params` are views of `flat`."""

    params: Any  # the tree of tensors given to `init`
    log_posterior: Tensor  # at the weights before the last step; NaN at first
    step: Tensor  # int64 scalar
    flat: Tensor  # [P] float32
    anchor: Tensor  # [P] float32, the weights given to `init`


class Transform(NamedTuple):
    """`init(params)` -> state and `update(state, batch, inplace=False)` -> (state, aux)."""

    init: Callable[..., SGLDState]
    update: Callable[..., tuple[SGLDState, Any]]


def build(
    log_posterior: LogPosterior,
    lr: float | Schedule,
    temperature: float | Schedule = 1.0,
    *,
    localization: float = 0.0,
    seed: int = 0,
    chain: int = 0,
) -> Transform:
    """SGLD by lossk's fused step, in the place of `posteriors.sgmcmc.sgld.build`:

        w <- w + lr (grad log_posterior(w) - temperature localization (w - w*)) + sqrt(2 lr temperature) xi

    which samples exp(log_posterior(w) / temperature - localization/2 |w - w*|^2), w* the weights given to `init`. In
    lossk's terms its step is 2 lr temperature, and n_beta = 1 / temperature.

    Args:
        log_posterior: (params, batch) -> (value, aux), differentiable.
        lr, temperature: > 0, or functions of the step's number.
        localization: strength of the pull to w*, >= 0.
        seed, chain: integers from 0 to 2^32 - 1 that select the noise: a function of them, the step and the element.

    Raises:
        ValueError, TypeError: a bad argument.
    """
    _check_settings(log_posterior, lr, temperature, localization, seed, chain)
    step = partial(
        update,
        log_posterior=log_posterior,
        lr=lr,
        temperature=temperature,
        localization=localization,
        seed=seed,
        chain=chain,
    )
    return Transform(init, step)


def _check_settings(log_posterior: Any, lr: Any, temperature: Any, localization: Any, seed: Any, chain: Any) -> None:
    check_callable("log_posterior", log_posterior, "a function (params, batch) -> (value, aux)")
    for name, value in (("lr", lr), ("temperature", temperature)):
        if callable(value):
            check_callable(name, value)
        else:
            check_number(name, value, "a number or a function of the step", above=0.0)
    check_number("localization", localization, least=0.0)
    check_uint32("seed", seed)
    check_uint32("chain", chain)


def _at(name: str, value: float | Schedule, step: Tensor) -> float:
    """A setting at a step."""
    found = value(step) if callable(value) else value
    return check_number(name, found, "a number, or a function of the step that returns one", above=0.0)


def init(params: Any) -> SGLDState:
    """The state at w*: params, a tree (dicts, lists, tuples) of floating-point tensors, is copied.

    Raises:
        ValueError: no tensors, or such as are not floating point or not on one device.
    """
    leaves, tree = pytree.tree_flatten(params)
    if not leaves or not all(isinstance(leaf, Tensor) and _holds_floats(leaf) for leaf in leaves):
        raise ValueError("params must be a tree of at least one dense floating-point tensor, and of nothing else")
    if len({leaf.device for leaf in leaves}) > 1:
        raise ValueError(f"params must be on one device, got {sorted({str(leaf.device) for leaf in leaves})}")
    flat = torch.cat([leaf.detach().float().flatten() for leaf in leaves])
    nothing = torch.full((), float("nan"), device=flat.device, dtype=torch.float32)
    views = _unflatten(flat, leaves, tree)
    return SGLDState(views, nothing, torch.zeros((), dtype=torch.int64, device="cpu"), flat, flat.clone())


def update(
    state: SGLDState,
    batch: Any,
    log_posterior: LogPosterior,
    lr: float | Schedule,
    temperature: float | Schedule = 1.0,
    localization: float = 0.0,
    seed: int = 0,
    chain: int = 0,
    inplace: bool = False,
) -> tuple[SGLDState, Any]:
    """One step; arguments as in `build`.

    Args:
        inplace: step the tensors of `state` themselves; else they stay as they are.

    Returns:
        The new state and what log_posterior returned beside its value.
    """
    check_instance("state", state, SGLDState)
    _check_settings(log_posterior, lr, temperature, localization, seed, chain)
    inplace = check_flag("inplace", inplace)
    leaves, tree = pytree.tree_flatten(state.params)
    wanted = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        found = log_posterior(pytree.tree_unflatten(wanted, tree), batch)
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], Tensor) or found[0].numel() != 1:
            raise TypeError(f"log_posterior must return (a scalar tensor, aux), got {shown(found)}")
        value, aux = found
        grads = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
    flat = state.flat if inplace else state.flat.clone()
    heat, rate = _at("temperature", temperature, state.step), _at("lr", lr, state.step)
    sgld_step(
        flat,
        torch.cat([grad.flatten() for grad in grads]).neg_(),
        state.anchor,
        lr=2 * rate * heat,
        n_beta=1 / heat,
        localization=localization,
        seed=seed,
        chain=chain,
        step=int(state.step),
        backend=resolve_backend("auto", flat.device),
    )
    if inplace:
        state.log_posterior.copy_(value.detach())
        state.step.add_(1)
        return state, aux
    params = _unflatten(flat, leaves, tree)
    return SGLDState(params, value.detach().clone(), state.step + 1, flat, state.anchor), aux


def _holds_floats(leaf: Tensor) -> bool:
    return leaf.is_floating_point() and leaf.layout is torch.strided and leaf.device.type != "meta"


def _unflatten(flat: Tensor, like: list[Any], tree: Any) -> Any:
    """A tree of views of `flat`, in the shapes of `like`."""
    parts = flat.split([leaf.numel() for leaf in like])
    return pytree.tree_unflatten([part.view(leaf.shape) for part, leaf in zip(parts, like, strict=True)], tree)
