"""Checks of the plain settings of a run, before any data is read or network trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from lossk.checks import (
    check_automatic,
    check_callable,
    check_choice,
    check_device,
    check_flag,
    check_integer,
    check_number,
    check_optional,
    check_path,
    check_strings,
)
from lossk.memory import parse_memory

DTYPES = ("float32", "float16")
CENTERINGS = ("chain", "pooled")
FORMS = ("tiles", "factor")
PLACES = ("auto", "memory", "spool", "stream")  # of data
BACKENDS = ("auto", "torch", "cpp", "triton", "cuda")
METRICS = (None, "fisher")
PRECISIONS = (None, "bf16", "fp16", "tf32")
FEWEST_BATCH = 256  # that batch_size="auto" chooses, and what it is where the step is a number
MOST_SEED = 2**32 - 1  # a Philox key's word
MOST_DRAWS = 10**7  # of all chains: what is watched of a draw takes up to 1 KB of memory
MOST_STEPS = 10**8  # of a chain, from one draw to the next or before the first: days, where a step takes a millisecond


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
    data: Any = "auto",
    transform: Any = None,
    device: Any = None,
    out: Any = None,
    resume: Any = False,
    progress: Any = True,
    distributed: Any = None,
) -> dict[str, Any]:
    """The settings by name, in plain Python.

    Raises:
        ValueError, TypeError: one cannot be used; names the argument, the rule and the value.
    """
    plain = {
        "num_chains": check_integer("num_chains", num_chains, 1, ceiling=MOST_DRAWS // 2),
        "num_draws": check_integer("num_draws", num_draws, 2, ceiling=MOST_DRAWS),
        "tile": check_tile(tile),
        "panel": check_optional(check_integer, "panel", panel, 1),
        "dtype": check_choice("dtype", dtype, DTYPES),
        "centering": check_choice("centering", centering, CENTERINGS),
        "form": check_choice("form", form, FORMS),
        "backend": check_choice("backend", backend, BACKENDS),
        "precision": check_choice("precision", precision, PRECISIONS),
        "seed": check_integer("seed", seed, 0, MOST_SEED),
        "memory": parse_memory(memory),
        "data": check_choice("data", data, PLACES),
        "transform": check_optional(check_callable, "transform", transform, "a callable or None"),
        "device": check_device("device", device),
        "out": check_optional(check_path, "out", out),
        "resume": check_flag("resume", resume),
        "progress": check_flag("progress", progress),
        "distributed": check_choice("distributed", distributed, (None, True, False)),
    }
    if plain["num_chains"] * plain["num_draws"] > MOST_DRAWS:
        raise ValueError(
            f"num_chains times num_draws must be at most {MOST_DRAWS}, got {plain['num_chains']} x {plain['num_draws']}"
        )
    return plain


def check_tile(tile: Any) -> int:
    """The side of a tile: a positive multiple of 16."""
    side = check_integer("tile", tile, 16)
    if side % 16:
        raise ValueError(f"tile must be a positive multiple of 16, got {side}")
    return side


def check_n_beta(n_beta: Any) -> float | None:
    """None or a number greater than 0."""
    return None if n_beta is None else check_number("n_beta", n_beta, "a number or None", above=0.0)


def check_steps(name: str, steps: Any, least: int) -> int | Any:
    """ "auto" or a number of steps."""
    return (
        check_choice(name, steps, ("auto",))
        if isinstance(steps, str)
        else check_integer(name, steps, least, ceiling=MOST_STEPS)
    )


def check_batch_size(batch_size: Any) -> int | Any | None:
    """ "auto", None or a number of samples."""
    if isinstance(batch_size, str):
        return check_choice("batch_size", batch_size, ("auto",))
    return check_optional(check_integer, "batch_size", batch_size, 1)


def minibatch_of(batch_size: int | str | None, num_train: int) -> int:
    """Samples of a minibatch; of "auto", the fewest that are chosen."""
    if batch_size is None:
        return num_train
    return min(FEWEST_BATCH if isinstance(batch_size, str) else batch_size, num_train)


def check_share(name: str, share: Any) -> float:
    """A number greater than 0."""
    return check_number(name, share, "a number or None", above=0.0)


def check_pull(localization: Any, metric: Any) -> dict[str, Any]:
    """`localization` and `metric`, where "fisher" for the first is short for "auto" and "fisher"."""
    if isinstance(localization, str) and localization in METRICS:
        localization, metric = "auto", localization
    if isinstance(localization, str) and localization != "auto":
        raise ValueError(f"localization must be a number, 'auto' or 'fisher', got {localization!r}")
    return {
        "localization": check_automatic("localization", localization, least=0.0),
        "metric": check_choice("metric", metric, METRICS),
    }


def put(settings: Any, **plain: Any) -> None:
    """Set fields of a frozen dataclass, from its own __post_init__, to their plain values."""
    for name, value in plain.items():
        object.__setattr__(settings, name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """What the settings of every sampler have in common."""

    params: Sequence[str] | None = None

    def __post_init__(self) -> None:
        put(self, params=check_optional(check_strings, "params", self.params, "name patterns"))

    @property
    def has_auto(self) -> bool:
        """Whether anything is left to be chosen, n_beta aside."""
        return "auto" in self.to_dict().values()

    def to_dict(self) -> dict[str, Any]:
        """A plain, JSON-ready form; the class gives it back from these as keywords."""
        plain = dataclasses.asdict(self)
        plain["params"] = None if self.params is None else list(self.params)
        for name in ("metric", "pilot_budget"):  # younger than stores that have neither
            if plain.get(name) is None:
                plain.pop(name, None)
        return plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteppingSettings(SamplerSettings):
    """What the settings of the samplers that step by minibatches have in common."""

    n_beta: float | None = None
    localization: float | Literal["auto", "fisher"] = "auto"
    metric: Literal["fisher"] | None = None
    batch_size: int | Literal["auto"] | None = "auto"
    num_burnin_steps: int | Literal["auto"] = "auto"
    num_steps_bw_draws: int | Literal["auto"] = "auto"
    pilot_budget: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        put(
            self,
            n_beta=check_n_beta(self.n_beta),
            **check_pull(self.localization, self.metric),
            batch_size=check_batch_size(self.batch_size),
            num_burnin_steps=check_steps("num_burnin_steps", self.num_burnin_steps, 0),
            num_steps_bw_draws=check_steps("num_steps_bw_draws", self.num_steps_bw_draws, 1),
            pilot_budget=check_optional(check_share, "pilot_budget", self.pilot_budget),
        )

    @property
    def resolved(self) -> bool:
        """Whether every setting is a number."""
        return not self.has_auto and self.n_beta is not None

    def steps(self, num_draws: int) -> int:
        """Steps of one chain of `num_draws` draws, once resolved."""
        num_draws = check_integer("num_draws", num_draws, 1)
        return int(self.num_burnin_steps) + num_draws * int(self.num_steps_bw_draws)
