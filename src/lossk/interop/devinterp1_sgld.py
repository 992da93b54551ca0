"""lossk's SGLD step as a torch optimizer that devinterp's samplers take for one of theirs.

    sample(..., sampling_method=lossk.interop.devinterp.sgld, optimizer_kwargs=dict(lr=..., nbeta=..., ...))

    w <- clamp( w - (lr/2) M G [ nbeta g + localization (w - w0) + weight_decay w ] + sqrt(lr) M sqrt(G) sigma xi )

with w0 the weights at construction, M a mask, and RMSprop's G where asked for: the step of devinterp's SGMCMC. The
noise is lossk's counter-based one. Its key is drawn from torch's global generator at the first step, after devinterp
has seeded it, so that their `seed=` decides it. Each parameter steps in one fused call, on a CPU in C++.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lossk.checks import check_callable, check_flag, check_number, check_optional, check_strings, check_tensor, shown
from lossk.ops.philox import normals
from lossk.ops.sgld_step import sgld_step
from lossk.run.backends import resolve_backend
from lossk.samplers.sgld import ALPHA, STABILITY

LISTS = ("noise", "dws")
METRICS = ("noise_norm", "grad_norm", "weight_norm", "distance", "localization_loss", *LISTS)


class LangevinOptimizer(Optimizer):
    """SGLD, plain or preconditioned by RMSprop; made by `sgld` and `rmsprop_sgld`, which describe the arguments.

    Weights that are not float32 are stepped as a float32 master copy and rounded into the parameter: a small step adds
    up instead of being lost.

    Attributes, each None unless named in `metrics`, of the last step (and of w before it, unless said otherwise):
        noise: {group: [sigma xi of each parameter, in its shape]}, not scaled by lr.
        dws: [G (nbeta g + localization (w - w0) + weight_decay w)] of each parameter, masked.
        localization_loss: localization/2 |w - w0|^2.
        distance: |w - w0|.  noise_norm: |M sigma xi|.  grad_norm: |lr/2 nbeta g|.  weight_norm: |w| after the step.
    """

    noise: dict[int, list[Tensor]] | None
    dws: list[Tensor] | None

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        noise_level: float,
        weight_decay: float,
        localization: float,
        nbeta: float,
        bounding_box_size: float | None,
        optimize_over: Sequence[Any] | Tensor | None,
        metrics: Sequence[str] | None,
        alpha: float | None,
        eps: float,
    ) -> None:
        for name, value in (("lr", lr), ("noise_level", noise_level)):
            check_number(name, value, "a number", above=0.0)
        for name, value in (("nbeta", nbeta), ("localization", localization), ("weight_decay", weight_decay)):
            check_number(name, value, "a number", least=0.0)
        check_optional(check_number, "bounding_box_size", bounding_box_size, least=0.0)
        check_optional(check_number, "alpha", alpha, least=0.0, most=1.0)
        check_number("eps", eps, above=0.0)
        metrics = (
            None
            if metrics is None or (isinstance(metrics, list | tuple) and not metrics)
            else check_strings("metrics", metrics)
        )
        unknown = sorted(set(metrics or ()) - set(METRICS))
        if unknown:
            raise ValueError(f"metrics must be of {list(METRICS)}, got {unknown}")
        self._wanted = frozenset(metrics or ())
        self._alpha, self._eps = alpha, eps
        self._key: int | None = None
        self._steps = 0
        defaults = {
            "lr": lr,
            "noise_level": noise_level,
            "weight_decay": weight_decay,
            "localization": localization,
            "nbeta": float(nbeta),
            "bounding_box_size": bounding_box_size,
            "optimize_over": optimize_over,
            "mask": None,  # devinterp 2's name of optimize_over
        }
        super().__init__(_check_params(params), defaults)
        for group in self.param_groups:
            masks = _masks(group)
            for p, mask in zip(group["params"], masks, strict=True):
                master = p.detach().to(torch.float32).flatten().clone()
                self.state[p].update(start=master, frozen=None if mask is None else ~mask.to(p.device).flatten())
                if p.dtype != torch.float32:
                    self.state[p]["master"] = master.clone()
                if alpha is not None:
                    self.state[p]["square_avg"] = torch.zeros_like(master)
        self._clear()

    def _clear(self) -> None:
        for name in METRICS:
            setattr(self, name, None)
        self.noise = {} if "noise" in self._wanted else None
        self.dws = [] if "dws" in self._wanted else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns what the closure does, if there is one."""
        check_optional(check_callable, "closure", closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._key is None:
            self._key = int(torch.randint(2**32, (), dtype=torch.int64, device="cpu"))
        self._clear()
        sums = dict.fromkeys(("noise_norm", "grad_norm", "weight_norm", "distance", "localization_loss"), 0.0)
        number = 0
        for at, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group, at, number, sums)
                number += 1
        for name in self._wanted - set(LISTS):
            value = sums[name] if name == "localization_loss" else math.sqrt(sums[name])
            setattr(self, name, torch.tensor(value, dtype=torch.float32, device="cpu"))
        self._steps += 1
        return loss

    def _step(self, p: Tensor, group: dict[str, Any], at: int, number: int, sums: dict[str, float]) -> None:
        assert self._key is not None
        assert p.grad is not None
        state, square = self.state[p], group["noise_level"] ** 2
        start, frozen = state["start"], state["frozen"]
        w = state["master"] if "master" in state else p.data.reshape(-1)  # a view, unless p is not contiguous
        g = p.grad.detach().float().flatten()
        pull = group["localization"] + group["weight_decay"]
        center = start if group["weight_decay"] == 0 else start * (group["localization"] / pull)
        before = self._before(p, w, g, group, at, number, sums) if self._wanted else None
        held = w[frozen] if frozen is not None else w
        sgld_step(
            w,
            g,
            center,
            lr=group["lr"] * square,
            n_beta=group["nbeta"] / square,
            localization=pull / square,
            seed=self._key,
            chain=number,
            step=self._steps,
            backend=resolve_backend("auto", w.device),
            square_avg=state.get("square_avg"),
            alpha=ALPHA if self._alpha is None else self._alpha,
            stability=self._eps,
        )
        if frozen is not None:
            w.masked_scatter_(frozen, held)
        if group["bounding_box_size"]:
            w.clamp_(min=start - group["bounding_box_size"], max=start + group["bounding_box_size"])
        if "master" in state or not p.data.is_contiguous():
            p.data.copy_(w.view(p.shape))
        if before is not None and self.dws is not None:
            self.dws.append(self._preconditioned(before, state).view(p.shape))
        sums["weight_norm"] += float(w.square().sum()) if "weight_norm" in self._wanted else 0.0

    def _before(
        self, p: Tensor, w: Tensor, g: Tensor, group: dict[str, Any], at: int, number: int, sums: dict[str, float]
    ) -> Tensor | None:
        """Note what is wanted of the weights before the step and of its noise; the masked drift, if it is wanted."""
        assert self._key is not None
        state = self.state[p]
        moves: Tensor | float = 1.0 if state["frozen"] is None else (~state["frozen"]).float()
        away = w - state["start"]
        square = float(away.square().sum())
        sums["distance"] += square
        sums["localization_loss"] += group["localization"] / 2 * square
        sums["grad_norm"] += float((g * (group["nbeta"] * group["lr"] / 2)).square().sum())
        if self._wanted & {"noise", "noise_norm"}:
            xi = normals(self._key, number, self._steps, w.numel()).to(w.device) * group["noise_level"] * moves
            sums["noise_norm"] += float(xi.square().sum())
            if self.noise is not None:
                self.noise.setdefault(at, []).append(xi.view(p.shape))
        if self.dws is None:
            return None
        return moves * (group["nbeta"] * g + group["localization"] * away + group["weight_decay"] * w)

    def _preconditioned(self, drift: Tensor, state: Any) -> Tensor:
        return drift if self._alpha is None else drift / (state["square_avg"].sqrt() + self._eps)


def _check_params(params: Any) -> list[Any]:
    """Parameters or groups of them, as a list, before torch.optim looks at them."""
    if isinstance(params, dict):
        params = [params]
    if isinstance(params, str | bytes | Tensor | type | np.ndarray) or not isinstance(params, Iterable):
        raise TypeError(f"params must be parameters or groups of parameters, got {shown(params)}")
    found = list(params)
    for each in found:
        inner = each.get("params") if isinstance(each, dict) else [each]
        several = list(inner) if isinstance(inner, Iterable) and not isinstance(inner, Tensor) else [inner]
        pairs = [one[1] if isinstance(one, tuple) and len(one) == 2 else one for one in several]  # (name, parameter)
        if not pairs or not all(isinstance(one, Tensor) and one.is_leaf and one.is_floating_point() for one in pairs):
            raise TypeError(f"params must be parameters or groups of parameters, got {shown(each)}")
    if not found:
        raise ValueError("params must hold at least one parameter, got none")
    return found


def _masks(group: dict[str, Any]) -> list[Tensor | None]:
    """The bool mask of each parameter of a group, or None."""
    given = group["optimize_over"] if group["optimize_over"] is not None else group["mask"]
    if given is None:
        return [None] * len(group["params"])
    if not isinstance(given, Tensor | list | tuple):
        raise TypeError(f"optimize_over must be a list of masks, one per parameter, got {shown(given)}")
    masks = [given] if isinstance(given, Tensor) and len(group["params"]) == 1 else list(given)
    if len(masks) != len(group["params"]):
        raise ValueError(f"optimize_over must hold one mask per parameter, {len(group['params'])}, got {len(masks)}")
    bools = []
    for p, mask in zip(group["params"], masks, strict=True):
        tensor = check_tensor("optimize_over", mask, of="a real number").to(p.device)
        if not bool(((tensor == 0) | (tensor == 1)).all()):
            raise ValueError("optimize_over must hold 0 and 1 (or False and True) only")
        try:
            bools.append(tensor.bool().expand(p.shape).clone())
        except RuntimeError as error:
            sizes = f"{list(p.shape)}, got {list(tensor.shape)}"
            raise ValueError(f"optimize_over must hold masks of the parameters' shapes, {sizes}") from error
    return bools  # type: ignore[return-value]


def sgld(
    params: Iterable[Any],
    lr: float = 0.01,
    noise_level: float = 1.0,
    weight_decay: float = 0.0,
    localization: float = 0.0,
    nbeta: float = 1.0,
    bounding_box_size: float | None = None,
    optimize_over: Sequence[Any] | Tensor | None = None,
    metrics: Sequence[str] | None = None,
    save_metrics: bool = False,
) -> LangevinOptimizer:
    """SGLD for `sampling_method=` of devinterp 1.3, or `config.SAMPLING_METHODS["sgmcmc_sgld"] = sgld` of 2.x.

    Args:
        params: parameters, or groups of them, which may bring their own settings.
        lr: step size epsilon, > 0.
        noise_level: sigma, > 0; other than 1 samples another law.
        weight_decay: strength of the pull to zero.
        localization: strength of the pull to the weights at construction.
        nbeta: n times the inverse temperature.
        bounding_box_size: half the side of the box around the weights at construction; None or 0 for none.
        optimize_over: one 0/1 mask per parameter: which elements move.
        metrics: what to keep of each step, by name (see `LangevinOptimizer`).
        save_metrics: of devinterp 2; must be False.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.
    """
    if check_flag("save_metrics", save_metrics):
        raise ValueError("save_metrics must be False: devinterp 2's per-step metrics are of its own optimizer")
    return LangevinOptimizer(
        params,
        lr=lr,
        noise_level=noise_level,
        weight_decay=weight_decay,
        localization=localization,
        nbeta=nbeta,
        bounding_box_size=bounding_box_size,
        optimize_over=optimize_over,
        metrics=metrics,
        alpha=None,
        eps=STABILITY,
    )


def rmsprop_sgld(
    params: Iterable[Any],
    lr: float = 0.01,
    noise_level: float = 1.0,
    weight_decay: float = 0.0,
    localization: float = 0.0,
    nbeta: float = 1.0,
    alpha: float = 0.99,
    eps: float = 0.1,
    add_grad_correction: bool = False,
    bounding_box_size: float | None = None,
    optimize_over: Sequence[Any] | Tensor | None = None,
    metrics: Sequence[str] | None = None,
    save_metrics: bool = False,
) -> LangevinOptimizer:
    """SGLD preconditioned by RMSprop: V <- alpha V + (1 - alpha) g^2, G = 1 / (sqrt(V) + eps). Else as `sgld`.

    Args:
        add_grad_correction: must be False, in devinterp too.
    """
    for name, value in (("save_metrics", save_metrics), ("add_grad_correction", add_grad_correction)):
        if check_flag(name, value):
            raise ValueError(f"{name} must be False, got {value}")
    check_number("alpha", alpha, least=0.0, most=1.0)
    return LangevinOptimizer(
        params,
        lr=lr,
        noise_level=noise_level,
        weight_decay=weight_decay,
        localization=localization,
        nbeta=nbeta,
        bounding_box_size=bounding_box_size,
        optimize_over=optimize_over,
        metrics=metrics,
        alpha=alpha,
        eps=eps,
    )
