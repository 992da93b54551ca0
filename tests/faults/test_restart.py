"""Automatic runs whose chains explode: they begin again with half the step, say so, and stay resumable."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.invariances.test_distributed import said, same_store, torchrun

import distributed_worker as worker
import lossk
import lossk.run.run
from lossk.accumulate.runlog import RunLog

HALF = dataclasses.replace(
    worker.too_long_a_step()[0], lr=0.5, num_burnin_steps=4, num_steps_bw_draws=6
)  # every number as the restart chooses it


def build(sampler: lossk.SGLD, **changes: Any) -> lossk.LossKernel:
    return lossk.build_kernel(worker.network(), worker.data(), **worker.settings(sampler=sampler, **changes))


def test_a_run_begins_again_with_half_the_step_and_says_so() -> None:
    """To the bit the run that was asked for half the step and twice the steps."""
    found = worker.restarted(None)
    assert found["sampler"] == HALF.to_dict()
    asked = {key: value for key, value in worker.settings().items() if key not in ("sampler", "tile", "panel")}
    expected = lossk.sample_losses(worker.network(), worker.data(), sampler=HALF, **asked)
    assert torch.equal(torch.tensor(found["losses"]), expected.losses)
    assert found["variance"] == build(HALF).variance.tolist()
    for reasons in found["reasons"]:
        assert reasons[0] == "lr = 1: made up"
        assert [line for line in reasons if line.startswith("restart")] == reasons[1:]
        assert len(reasons) == 2
        assert "diverged at step" in reasons[1]


def test_a_step_that_was_given_is_not_shortened() -> None:
    with pytest.raises(lossk.DivergedError, match="try lr="):
        build(worker.too_long_a_step()[0])


def test_a_run_that_never_holds_ends_after_its_last_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    def far_too_long(*_: Any, **__: Any) -> Any:
        sampler, pilot, reasons = worker.too_long_a_step()
        return dataclasses.replace(sampler, lr=1e6), pilot, reasons

    monkeypatch.setattr(lossk.run.run, "choose", far_too_long)
    with pytest.raises(lossk.DivergedError, match="diverged"):
        build(lossk.SGLD())


@pytest.mark.parametrize("panels", [1, 4])
def test_killed_after_a_restart_it_goes_on_to_the_same_bits(
    panels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the fresh log after its first panel, or among those of the second chain."""
    commit, written = RunLog.commit, [0]

    def killed(log: RunLog, new: Any, **how: Any) -> None:
        commit(log, new, **how)
        written[0] += any(line.startswith("restart") for line in (log.chosen or {}).get("reasons", []))
        if written[0] == panels:
            raise KeyboardInterrupt

    monkeypatch.setattr(lossk.run.run, "choose", worker.too_long_a_step)
    whole, cut = tmp_path / "whole.lossk", tmp_path / "cut.lossk"
    build(lossk.SGLD(), out=whole)
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            build(lossk.SGLD(), out=cut)
    monkeypatch.setattr(lossk.run.run, "choose", None)  # what was chosen is in the store
    build(lossk.SGLD(), out=cut, resume=True)
    same_store(cut, whole)
    assert json.loads((cut / "config.json").read_text())["chosen"]["sampler"]["lr"] == 0.5


def test_two_ranks_restart_as_one_process_does(tmp_path: Path) -> None:
    """The chain of one rank explodes before the other's; both begin again, and agree on everything."""
    torchrun(2, tmp_path, ["restart"])
    first, second = said(tmp_path, "restart")
    assert first == second
    alone = worker.restarted(None)
    for key in ("variance", "losses", "sampler"):
        assert first[key] == alone[key], key
    for reasons in first["reasons"]:
        assert sum(line.startswith("restart") for line in reasons) == 1
    lossk.open(tmp_path / "restart.lossk")
