"""How much too large a chain makes the variance of a mode, foreseen: discretisation and minibatch noise together.

A mode of curvature a, step eps: s = eps a / 4, its share of the longest stable step, and r = eps n_beta^2 f lambda / 4,
minibatch noise over injected noise (f: variance of a minibatch mean over that of one sample; lambda: variance of the
samples' gradients along the mode). The chain is linear in a quadratic, rho = 1 - 2 s, and its stationary variance is

    Euler:           (1 + r) / (1 - s) / a
    averaged noise:  (1 + r / (1 - s)) / a

for white noise of variance V adds V / (1 - rho^2) with 1 - rho^2 = 4 s (1 - s): eps (1 + r) / (4 s (1 - s)) = (1 + r) /
(a (1 - s)) for Euler's step, and averaged noise alone has no bias in a quadratic (Leimkuhler and Matthews 2013).
"""

from __future__ import annotations

import math


def foreseen_bias(s: float, r: float, *, averaged: bool) -> float:
    """Relative excess of a mode's variance; infinite where the step is not stable.

    Args:
        s: eps a / 4 of the mode, at least 0.
        r: minibatch noise over injected noise along the mode, at least 0.
        averaged: whether the noise of two consecutive steps is averaged.
    """
    if s >= 1.0:
        return math.inf
    return r / (1.0 - s) if averaged else (1.0 + r) / (1.0 - s) - 1.0


def longest_step(stiffness: float, noise: float, most: float, *, averaged: bool) -> float:
    """The step at which `foreseen_bias` is `most`; infinite where no step reaches it.

    Args:
        stiffness: a of the mode, so that s = eps stiffness / 4.
        noise: r / eps.
        most: relative excess, greater than 0.
    """
    rate = noise + (most if averaged else 1.0 + most) * stiffness / 4.0  # of the excess, where it is `most`
    if averaged and noise == 0.0:
        return math.inf
    return most / rate if rate > 0 else math.inf
