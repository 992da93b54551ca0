"""`lossk run --overwrite`: the old store stays until the new one is complete, whenever the run is cut off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import lossk
import lossk.accumulate.runlog
from lossk.cli import main as cli
from lossk.disk.replacement import Replacement
from lossk.disk.swap import REPLACED
from lossk.recipes import RecipeTask

Same = Callable[[lossk.LossKernel, lossk.LossKernel], None]


def make_task() -> RecipeTask:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return RecipeTask(model=model, samples=(torch.randn(20, 4, generator=generator), torch.arange(20) % 3))


def kernel_of(seed: int) -> lossk.LossKernel:
    losses = torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(seed))
    return lossk.LossKernel.from_traces(lossk.LossTraces(losses))


CONFIG: dict[str, Any] = {
    "task": f"{__name__}:make_task",
    "build": {"num_chains": 2, "num_draws": 4, "tile": 16, "panel": 2, "backend": "torch"},
    "sampler": {"lr": 1e-3, "localization": 10.0, "num_burnin_steps": 1, "num_steps_bw_draws": 1, "batch_size": 8},
    "passes": {"probe_batch": 32},
    "picture": None,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Draws of 4 or 6, in an empty folder where k.lossk of 4 is."""
    monkeypatch.chdir(tmp_path)
    for draws in (4, 6):
        content = {**CONFIG, "build": {**CONFIG["build"], "num_draws": draws}, "out": "k.lossk"}
        Path(f"of{draws}.yaml").write_text(yaml.safe_dump(content))
    assert cli.main(["run", "of4.yaml"]) == 0
    return lambda *arguments: cli.main(["run", *arguments])


def cut_off(monkeypatch: pytest.MonkeyPatch, where: str, after: int = 1) -> Any:
    """Within it, a run is interrupted in its second panel, or where it would have moved its store."""
    patch = pytest.MonkeyPatch.context()
    inside = patch.__enter__()
    left, commit = [after], lossk.accumulate.runlog.RunLog.commit

    def stopping(log: Any, new: Any, **how: Any) -> None:
        commit(log, new, **how)
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    if where == "panel":
        inside.setattr(lossk.accumulate.runlog.RunLog, "commit", stopping)
    else:
        inside.setattr(Replacement, "place", stopped)
    return patch


@pytest.mark.parametrize("where", ["panel", "place"])
@pytest.mark.parametrize("then", ["--resume", "--overwrite"])
def test_the_old_store_stays_until_the_new_one_is_complete(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, assert_same_kernel: Same, where: str, then: str
) -> None:
    replay, old = Path("k.yaml").read_text(), lossk.open("k.lossk").to_numpy()
    patch = cut_off(monkeypatch, where)
    assert run("of6.yaml", "--overwrite") == 130
    patch.__exit__(None, None, None)
    assert (lossk.open("k.lossk").to_numpy() == old).all()
    assert Path("k.yaml").read_text() == replay
    assert sorted(path.name for path in Path(".k.lossk.new").iterdir()) == ["k.lossk"]

    written: list[int] = []
    commit = lossk.accumulate.runlog.RunLog.commit
    monkeypatch.setattr(
        lossk.accumulate.runlog.RunLog, "commit", lambda *a, **how: (written.append(1), commit(*a, **how))[1]
    )
    assert run("of6.yaml", then) == 0
    assert len(written) == {"--overwrite": 6, "--resume": 4 if where == "panel" else 0}[then]
    assert lossk.open("k.lossk").num_draws == 6
    assert yaml.safe_load(Path("k.yaml").read_text())["build"]["num_draws"] == 6
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["k.lossk", "k.yaml", "of4.yaml", "of6.yaml"]
    assert run("of6.yaml", "--out", "fresh.lossk") == 0
    assert_same_kernel(lossk.open("k.lossk"), lossk.open("fresh.lossk"))


def test_a_run_that_fails_leaves_the_old_store_and_nothing_else(run: Callable[..., int]) -> None:
    assert run("of6.yaml", "--overwrite", "--set", "build.memory=1kB") == 2
    assert lossk.open("k.lossk").num_draws == 4
    assert not Path(".k.lossk.new").exists()


def test_two_runs_do_not_replace_one_store(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    first = Replacement(Path("k.lossk"), overwrite=True)
    capsys.readouterr()
    assert run("of6.yaml", "--overwrite") == 2
    assert "is being replaced by another process" in capsys.readouterr().err
    first.close()
    assert run("of6.yaml", "--overwrite") == 0


def test_what_is_beside_is_not_begun_again_unasked(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where somebody has removed the old store and its replay meanwhile."""
    patch = cut_off(monkeypatch, "panel")
    assert run("of6.yaml", "--overwrite") == 130
    patch.__exit__(None, None, None)
    Path("k.lossk").rename("elsewhere.lossk")
    Path("k.yaml").unlink()
    capsys.readouterr()
    assert run("of6.yaml") == 2
    assert "of a run that was cut off exists; pass --resume, or --overwrite" in capsys.readouterr().err
    assert run("of6.yaml", "--resume") == 0
    assert lossk.open("k.lossk").num_draws == 6
    assert not Path(".k.lossk.new").exists()


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_a_kill_after_the_exchange_is_told_from_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Two complete stores, and which of them is the old one: a save in between must not confuse them."""
    if way == "renames":
        monkeypatch.setattr("lossk.disk.swap.exchange", lambda a, b: False)
    path = tmp_path / "k.lossk"
    kernels = [kernel_of(i) for i in range(3)]
    kernels[0].save(path)
    place = Replacement(path, overwrite=True)
    place.begin()
    kernels[1].save(place.path)
    with monkeypatch.context() as patch:
        patch.setattr("lossk.disk.replacement.remove", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            place.place()
    place.close()
    assert (path / REPLACED).exists()
    assert torch.equal(lossk.open(path)[:], kernels[1][:])
    kernels[2].save(path, overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["k.lossk"]
    resumed = Replacement(path, overwrite=False)
    assert resumed.path == path
    resumed.close()
    assert torch.equal(lossk.open(path)[:], kernels[2][:])


def test_a_store_that_is_written_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "k.lossk"
    kernel = kernel_of(0)
    kernel.save(path)
    place = Replacement(path, overwrite=True)
    place.begin()
    kernel.save(place.path)
    lock = lossk.accumulate.runlog.Lock(path)
    with pytest.raises(lossk.StoreError, match="is being written by another process"):
        place.place()
    lock.release()
    assert place.path.exists()
    place.place()
    place.close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["k.lossk"]
