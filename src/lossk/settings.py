"""Checks of the plain settings of a run, before any data is read or network trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from lossk.memory import parse_memory

DTYPES = ("float32", "float16")
CENTERINGS = ("chain", "pooled")
FORMS = ("tiles", "factor")
BACKENDS = ("auto", "torch", "cpp", "triton", "cuda")
PRECISIONS = (None, "bf16", "fp16", "tf32")


def check_settings(
    *,
    num_chains: Any = 4,
    num_draws: Any = 200,
    tile: Any = 4096,
    panel: Any = None,
    dtype: Any = "float32",
    centering: Any = "chain",
    form: Any = "tiles",
    backend: Any = "auto",
    precision: Any = None,
    seed: Any = 0,
    memory: Any = None,
) -> None:
    """Raise ValueError or TypeError, naming the argument, the rule and the value, unless all can be used."""
    check_integer("num_chains", num_chains, 1)
    check_integer("num_draws", num_draws, 2)
    check_integer("seed", seed, 0, 2**32 - 1)
    check_integer("tile", tile, 16)
    if tile % 16:
        raise ValueError(f"tile must be a positive multiple of 16, got {tile}")
    if panel is not None:
        check_integer("panel", panel, 1)
    parse_memory(memory)
    check_choice("dtype", dtype, DTYPES)
    check_choice("centering", centering, CENTERINGS)
    check_choice("form", form, FORMS)
    check_choice("backend", backend, BACKENDS)
    check_choice("precision", precision, PRECISIONS)


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least or (most is not None and value > most):
        rule = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {rule}, got {value}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def check_number(name: str, value: Any, kind: str, *, above: float | None = None, least: float | None = None) -> None:
    """Raise unless `value` is a finite number greater than `above`, or at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be {kind}, got {value!r}")
    too_low = value <= above if above is not None else value < (least or 0.0)
    if not math.isfinite(value) or too_low:
        rule = f"greater than {above:g}" if above is not None else f"at least {least:g}"
        raise ValueError(f"{name} must be finite and {rule}, got {value!r}")


def check_patterns(params: Any) -> tuple[str, ...] | None:
    """Parameter-name patterns as a tuple."""
    if params is None:
        return None
    if isinstance(params, str) or not all(isinstance(pattern, str) for pattern in params):
        raise TypeError(f"params must be a list of name patterns, got {params!r}")
    return tuple(params)


def check_automatic(name: str, value: Any, *, above: float | None = None, least: float | None = None) -> None:
    """Raise unless `value` is "auto" or a finite number greater than `above`, or at least `least`."""
    if value != "auto":
        check_number(name, value, "a number or 'auto'", above=above, least=least)


def check_n_beta(n_beta: Any) -> None:
    """Raise unless it is None or a number greater than 0."""
    if n_beta is not None:
        check_number("n_beta", n_beta, "a number or None", above=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """What the settings of every sampler have in common."""

    params: Sequence[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", check_patterns(self.params))

    @property
    def has_auto(self) -> bool:
        """Whether anything is left to be chosen, n_beta aside."""
        return "auto" in self.to_dict().values()

    def to_dict(self) -> dict[str, Any]:
        """A plain, JSON-ready form; the class gives it back from these as keywords."""
        plain = dataclasses.asdict(self)
        plain["params"] = None if self.params is None else list(self.params)
        return plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteppingSettings(SamplerSettings):
    """What the settings of the samplers that step by minibatches have in common."""

    n_beta: float | None = None
    localization: float | Literal["auto"] = "auto"
    batch_size: int | None = 256
    num_burnin_steps: int | Literal["auto"] = "auto"
    num_steps_bw_draws: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_n_beta(self.n_beta)
        check_automatic("localization", self.localization, least=0.0)
        if self.batch_size is not None:
            check_integer("batch_size", self.batch_size, 1)
        if self.num_burnin_steps != "auto":
            check_integer("num_burnin_steps", self.num_burnin_steps, 0)
        if self.num_steps_bw_draws != "auto":
            check_integer("num_steps_bw_draws", self.num_steps_bw_draws, 1)

    @property
    def resolved(self) -> bool:
        """Whether every setting is a number."""
        return not self.has_auto and self.n_beta is not None

    def steps(self, num_draws: int) -> int:
        """Steps of one chain of `num_draws` draws, once resolved."""
        return int(self.num_burnin_steps) + num_draws * int(self.num_steps_bw_draws)
