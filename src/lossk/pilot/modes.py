"""One mode of a BAOAB chain on a quadratic: an exact linear map, and the step count and friction that follow from it.

For a mode of curvature a, one step with step size h and c = exp(-friction h) takes (w, v), w counted from the mean, to
M (w, v) + noise. Its stationary law is w ~ N(0, 1/a), v ~ N(0, 1 - h^2 a / 4), independent, for h^2 a < 4: the
position has no discretisation bias (Leimkuhler and Matthews 2013, section 4). So the autocorrelation of w at a lag of
k steps is (M^k)[0, 0], and a start at w = 0, v ~ N(0, 1) lacks the share (M^k)[0,0]^2 - a h^2 a/4 (M^k)[0,1]^2 of its
stationary variance after k steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NUM_MODES = 64
FRICTIONS = np.geomspace(0.5, 4.0, 25)  # in units of sqrt(lowest curvature); 2 is critical damping


def baoab_map(step_size: float, friction: Array, curvature: Array) -> Array:
    """M [..., 2, 2] of friction [...] and curvature [...], which broadcast."""
    h = step_size
    a, c = np.broadcast_arrays(np.asarray(curvature, dtype=np.float64), np.exp(-np.asarray(friction) * h))
    kick = np.zeros((*a.shape, 2, 2))
    kick[..., 0, 0] = kick[..., 1, 1] = 1.0
    kick[..., 1, 0] = -h * a / 2
    drift = np.array([[1.0, h / 2], [0.0, 1.0]])
    thermostat = np.zeros_like(kick)
    thermostat[..., 0, 0] = 1.0
    thermostat[..., 1, 1] = c
    return kick @ drift @ thermostat @ drift @ kick


def mode_grid(lowest: float, highest: float) -> Array:
    """[m] curvatures from the lowest to the highest, in equal ratios."""
    return np.geomspace(lowest, max(highest, lowest), NUM_MODES)


def choose_friction(step_size: float, lowest: float, highest: float, longest: int) -> float:
    """The friction at which every mode forgets soonest: least k with |autocorrelation| <= 1/e from lag k on.

    Low friction makes stiff modes ring (their envelope falls as exp(-friction h k / 2)), high friction makes flat ones
    creep (at rate lowest / friction); between lies about critical damping of the flattest modes. Where even the best
    needs more than `longest` steps, critical damping, 2 sqrt(lowest).
    """
    frictions = FRICTIONS * np.sqrt(lowest)
    steps = _spacing(step_size, frictions[:, None], mode_grid(lowest, highest), np.exp(-1.0), longest)
    best = int(steps.min())
    if best > longest:
        return float(2 * np.sqrt(lowest))
    return float(frictions[steps == best].max())  # of equals the largest: it damps minibatch noise most


def steps_to_forget(step_size: float, friction: float, lowest: float, highest: float, target: float, most: int) -> int:
    """The least k with |autocorrelation| <= target of every mode from lag k on; `most` where it takes longer."""
    grid = mode_grid(lowest, highest)
    return min(int(_spacing(step_size, np.array([[friction]]), grid, target, most)[0]), most)


def lag_correlation(step_size: float, friction: float, lowest: float, highest: float, steps: int) -> float:
    """The largest |autocorrelation| of any mode at a lag of `steps`."""
    m = baoab_map(step_size, np.array(friction), mode_grid(lowest, highest))
    return float(np.abs(np.linalg.matrix_power(m, steps)[..., 0, 0]).max())


def steps_to_spread(step_size: float, friction: float, lowest: float, highest: float, target: float, most: int) -> int:
    """The least k after which every mode has at least `target` of its stationary variance, from w*; at most `most`."""
    grid = mode_grid(lowest, highest)
    last = 0
    for k, power in _powers(baoab_map(step_size, np.array(friction), grid), _horizon(step_size, lowest, most)):
        if float(_missing(power, step_size, grid).max()) > 1.0 - target:
            last = k
    return min(last + 1, most)


def spread(step_size: float, friction: float, lowest: float, highest: float, steps: int) -> float:
    """The least share of its stationary variance that a mode has after `steps` from w*."""
    grid = mode_grid(lowest, highest)
    power = np.linalg.matrix_power(baoab_map(step_size, np.array(friction), grid), steps)
    return float(1.0 - _missing(power, step_size, grid).max())


def _missing(power: Array, step_size: float, curvature: Array) -> Array:
    return power[..., 0, 0] ** 2 - curvature * (step_size**2 * curvature / 4) * power[..., 0, 1] ** 2


def _spacing(step_size: float, friction: Array, grid: Array, target: float, most: int) -> NDArray[np.int64]:
    """[f] int: for frictions [f, 1], the last lag at which some mode's |autocorrelation| exceeds `target`, plus one."""
    maps = baoab_map(step_size, friction, grid)
    last = np.zeros(len(maps), dtype=np.int64)
    for k, power in _powers(maps, _horizon(step_size, float(grid[0]), most)):
        last[np.abs(power[..., 0, 0]).max(axis=-1) > target] = k
    return last + 1


def _horizon(step_size: float, lowest: float, most: int) -> int:
    """Far enough that a near-critically damped mode is forgotten, and no farther than matters."""
    return int(min(np.ceil(20.0 / (step_size * np.sqrt(lowest))), most)) + 1


def _powers(m: Array, most: int) -> Iterator[tuple[int, Array]]:
    power = m
    for k in range(1, most + 1):
        yield k, power
        power = power @ m
