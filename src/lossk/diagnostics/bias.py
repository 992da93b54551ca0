"""By how much a step of Langevin dynamics makes the variance of a direction wrong, and the correction that helps most.

In a direction of curvature a (of n_beta L_n + localization/2 |w - w*|^2) with step lr and minibatches of m of n samples

    s = lr a / 4                      the share of the stability limit,
    r = lr n_beta^2 f lambda / 4      minibatch noise per injected noise, with lambda the variance of the per-sample
                                      gradients along the direction and f = (n - m) / (m (n - 1)),

the deviation from the mean moves by x <- (1 - 2 s) x + sqrt(lr) (eta + zeta), where zeta is the minibatch noise of
variance r, independent from step to step, and eta the injected noise. White noise of variance v leaves the variance
v lr / (1 - (1 - 2 s)^2) = v / (a (1 - s)); noise averaged over two steps, of variance 1/2 and covariance 1/4 with the
next step's, leaves 1 / a. So the variance times a is

    (1 + r) / (1 - s)                 for Euler's step,
    1 + r / (1 - s)                   with averaged noise.

The correction injects eta - (alpha lr n_beta^2 f / 8) C_B eta, C_B the minibatch's own covariance of gradients. Along
an eigenvector of their covariance that is (1 - alpha r / 2) eta in the mean, so the injected share becomes
(1 - alpha r / 2)^2 = 1 - alpha r + (alpha r / 2)^2. With alpha = 1 the noise of small steps is taken back to first
order, whatever its direction (S. J. Vollmer, K. C. Zygalakis, Y. W. Teh, "Exploration of the (Non-)Asymptotic Bias and
Variance of Stochastic Gradient Langevin Dynamics", JMLR 17, 2016, section 4.3); the rest below is ours.

Left out: the scatter of C_B, which adds up to (alpha r / 2)^2 tr C / (m lambda), half of it with averaged noise, and
whatever makes the loss no quadratic.
"""

from __future__ import annotations

import math

BIAS_BUDGET = 0.05  # of the variance of the stiffest and noisiest mode, that "auto" allows
STEEPEST_BUDGET = 0.7  # of the stability limit, at the steepest draw of a thousand
UNEVEN = 3.0  # times the mean curvature at the steepest draw of a thousand, from where on rare draws decide: linear
# models and trained networks have 1 to 2.1, products of weights near 0, as f = a b x, 4 to 140
HALVINGS = 60  # of the interval of alpha: below float64's resolution


def foreseen_bias(s: float, r: float, *, averaged: bool, alpha: float = 0.0) -> float:
    """The largest relative error of a variance, over all directions with at most these s and r.

    Args:
        s: share of the stability limit, lr a / 4, in the steepest direction; 0 <= s < 1.
        r: minibatch noise per injected noise in the noisiest direction, before any correction; >= 0.
        averaged: whether the noise of a step is averaged with the next step's.
        alpha: strength of the noise correction, as `correction_strength` gives it; 0 is none.

    Returns:
        The relative excess of the variance, or its relative deficit where that is larger; >= 0.
    """
    _check(s, r)
    if not alpha >= 0.0:
        raise ValueError(f"alpha must be >= 0, got {alpha}")
    # A larger s makes a variance larger, and it is convex in r: the extremes are at the ends, or at the vertex.
    excess = max(_excess(s, ours, averaged, alpha) for ours in (0.0, r))
    return max(excess, -_excess(0.0, _vertex(r, alpha), averaged, alpha))


def correction_strength(s: float, r: float, *, averaged: bool) -> tuple[float, float]:
    """(alpha, the bias that remains): the alpha whose worst case over all directions is least.

    A direction of large s keeps some of its minibatch noise where one of small s loses more than it has: alpha weighs
    these against each other. The excess of Euler's step itself, s / (1 - s), is there without noise and remains.
    """
    _check(s, r)
    if r == 0.0:
        return 1.0, foreseen_bias(s, r, averaged=averaged)
    without_noise = _excess(s, 0.0, averaged, 0.0)
    low, high = 0.0, 2.0 / r  # beyond 2 / r the injected noise changes sign and grows again
    for _ in range(HALVINGS):  # the excess falls with alpha where the deficit rises
        alpha = (low + high) / 2
        if _excess(s, r, averaged, alpha) > max(without_noise, -_excess(0.0, _vertex(r, alpha), averaged, alpha)):
            low = alpha
        else:
            high = alpha
    return high, foreseen_bias(s, r, averaged=averaged, alpha=high)


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


def _excess(s: float, r: float, averaged: bool, alpha: float) -> float:
    """The relative excess of the variance of one direction."""
    injected = (1.0 - alpha * r / 2) ** 2
    return injected - 1.0 + r / (1.0 - s) if averaged else (injected + r) / (1.0 - s) - 1.0


def _vertex(r: float, alpha: float) -> float:
    """The noise, at most r, whose direction loses most of its variance where s is 0."""
    return min(max(2.0 * (alpha - 1.0) / alpha**2, 0.0), r) if alpha > 0.0 else 0.0


def _check(s: float, r: float) -> None:
    if not 0.0 <= s < 1.0:
        raise ValueError(f"s must be at least 0 and less than 1, got {s}")
    if not r >= 0.0:
        raise ValueError(f"r must be >= 0, got {r}")
