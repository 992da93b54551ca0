"""Which weights are sampled, said beside the sampler."""

from __future__ import annotations

from typing import Any

import pytest

import lossk


def test_params_beside_the_sampler(problem: Any, build: Any, sgld: Any, assert_same_kernel: Any) -> None:
    """What everyone types first: the weights to sample as an argument of the call."""
    names = ["2.*"]
    expected = build(problem.model(), problem.data, sampler=sgld(params=names))
    assert_same_kernel(build(problem.model(), problem.data, sampler=sgld(), params=names), expected)
    assert_same_kernel(build(problem.model(), problem.data, sampler=sgld(params=names), params=names), expected)
    automatic = build(problem.model(), problem.data, sampler=None, params=names)
    assert list(automatic.meta["sampler"]["params"]) == names
    with pytest.raises(ValueError, match=r"params must be given once, got params=\['0.\*'\] beside .*'2.\*'"):
        build(problem.model(), problem.data, sampler=sgld(params=names), params=["0.*"])
    with pytest.raises(TypeError, match="params must be"):
        build(problem.model(), problem.data, params=problem.model().parameters())
    x, y = problem.data
    cross = lossk.cross_kernel(
        problem.model(), (x, y), (x[:4], y[:4]), sampler=sgld(), params=names, num_draws=4, progress=False
    )
    assert cross.shape == (21, 4)
