"""The settings of devinterp 2's `sample()`: checked, put into lossk's terms, and in the form its stores keep."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lossk.checks import MOST_NUMBER, check_choice, check_flag, check_integer, check_mapping, check_number
from lossk.interop.devinterp2_chain import Law
from lossk.ops.philox import check_uint32
from lossk.samplers.sgld import ALPHA, SGLD, STABILITY

# Fields that their stores carry besides; their own reading of a store compares them.
FIXED = {"epoch_mode": "cycle", "scheduler_type": "constant", "scheduler_kwargs": None, "cores": 1, "online": False}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """As the arguments of `sample()`, where they are described."""

    lr: float
    n_beta: float
    batch_size: int
    num_chains: int
    num_draws: int
    num_burnin_steps: int
    num_steps_bw_draws: int
    gradient_accumulation_steps: int
    num_init_loss_batches: int
    init_seed: int
    localization: float
    noise_level: float
    llc_weight_decay: float
    bounding_box_size: float | None
    sampling_method: str
    sampling_method_kwargs: dict[str, Any]
    init_noise: float | None
    save_metrics: bool
    shuffle: bool
    match_sampling_input_ids_across_chains: bool

    def __post_init__(self) -> None:
        for name in ("lr", "n_beta", "noise_level"):
            check_number(name, getattr(self, name), "a number", above=0.0)
        for name in ("localization", "llc_weight_decay"):
            check_number(name, getattr(self, name), "a number", least=0.0)
        for name in ("bounding_box_size", "init_noise"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), "a number or None", least=0.0)
        check_integer("num_draws", self.num_draws, 2)
        for name in (
            "batch_size",
            "num_chains",
            "num_steps_bw_draws",
            "gradient_accumulation_steps",
            "num_init_loss_batches",
        ):
            check_integer(name, getattr(self, name), 1)
        check_integer("num_burnin_steps", self.num_burnin_steps, 0)
        check_uint32("init_seed", self.init_seed)
        check_choice("sampling_method", self.sampling_method, ("sgmcmc_sgld", "rmsprop_sgld"))
        check_choice("save_metrics", self.save_metrics, (False,))
        known = ("alpha", "eps", "add_grad_correction") if self.sampling_method == "rmsprop_sgld" else ()
        for name in ("shuffle", "match_sampling_input_ids_across_chains"):
            check_flag(name, getattr(self, name))
        for name, value in check_mapping("sampling_method_kwargs", self.sampling_method_kwargs).items():
            if name not in known:
                raise ValueError(
                    f"sampling_method_kwargs of {self.sampling_method!r} must be of {list(known)}, got {name!r}"
                )
            if name == "add_grad_correction":
                check_choice(name, value, (False,))
            else:
                check_number(name, value, above=0.0, most=1.0 if name == "alpha" else MOST_NUMBER)

    @property
    def num_steps(self) -> int:
        """Of a chain."""
        return self.num_burnin_steps + self.num_draws * self.num_steps_bw_draws

    @property
    def steps_to_first_draw(self) -> int:
        """The step, from 0, whose weights are draw 0."""
        return self.num_burnin_steps + self.num_steps_bw_draws - 1

    @property
    def step_samples(self) -> int:
        """Sequences of a step's gradient."""
        return self.batch_size * self.gradient_accumulation_steps

    def sgld(self) -> SGLD:
        """What of it lossk's sampler knows."""
        return SGLD(
            lr=self.lr,
            n_beta=self.n_beta,
            localization=self.localization,
            batch_size=self.step_samples,
            num_burnin_steps=self.num_burnin_steps,
            num_steps_bw_draws=self.num_steps_bw_draws,
            preconditioner="rmsprop" if self.sampling_method == "rmsprop_sgld" else None,
            integrator="euler",
            control_variate=False,
            noise_correction=False,
        )

    def law(self, masks: dict[str, Tensor | None] | None) -> Law:
        """What of it only devinterp's sampler knows."""
        return Law(
            weight_decay=self.llc_weight_decay,
            noise_level=self.noise_level,
            bounding_box_size=self.bounding_box_size,
            init_noise=self.init_noise,
            alpha=self.sampling_method_kwargs.get("alpha", ALPHA),
            stability=self.sampling_method_kwargs.get("eps", STABILITY),
            shuffle=self.shuffle,
            same_minibatches=self.match_sampling_input_ids_across_chains,
            masks={name: mask for name, mask in (masks or {}).items() if mask is not None},
        )


def stored_config(settings: Settings) -> dict[str, Any]:
    """The settings as their stores keep them."""
    return {**dataclasses.asdict(settings), **FIXED}
