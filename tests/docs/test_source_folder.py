"""lossk from a source folder: nothing built, and the packages of stores and diagnoses not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = ("zarr", "numcodecs", "google_crc32c", "arviz_stats", "arviz_base", "arviz")
# `-S` leaves out the installed lossk and its compiled extension; packages come back by their folders.
BEGIN = f"""
import sys
for name in {HIDDEN}:
    sys.modules[name] = None
import torch, lossk
model = torch.nn.Linear(4, 3)
data = torch.randn(20, 4), torch.arange(20) % 3
settings = dict(sampler=lossk.Gaussian(sigma=0.1), num_chains=2, num_draws=4, progress=False)
def refused(call, text):
    try:
        call()
    except lossk.errors.MissingPackageError as error:
        assert text in str(error), error
    else:
        raise AssertionError("not refused")
"""


def run(code: str, *, installed: bool = False) -> str:
    """What a fresh Python says, that has `src` on its path and whatever site-packages hold but lossk's own build."""
    folders = [path for path in sys.path if path.endswith("site-packages")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *folders]), "TRITON_INTERPRET": "1"}
    begin = BEGIN.replace(f"{HIDDEN}", "()") if installed else BEGIN
    told = subprocess.run(
        [sys.executable, "-S", "-c", begin + code],
        cwd=ROOT / "tests", env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-3000:]
    return told.stdout


def test_losses_need_none_of_the_packages_of_stores_and_diagnoses() -> None:
    run("assert lossk.sample_losses(model, data, **settings).losses.shape == (2, 4, 20)")


def test_what_a_call_will_need_at_its_end_is_named_at_its_beginning() -> None:
    told = run(
        "def fail(*given): raise AssertionError('the model was run')\n"
        "model.forward = fail\n"
        "refused(lambda: lossk.build_kernel(model, data, **settings), 'arviz-stats: pip install arviz-stats')\n"
        "refused(lambda: lossk.cross_kernel(model, data, data, **settings), 'arviz-stats')\n"
        "refused(lambda: lossk.TraceWriter('x', num_chains=1, num_draws=2, num_samples=3), 'arviz-stats')\n"
        "import types, importlib.machinery\n"
        "there = sys.modules['arviz_stats'] = types.ModuleType('arviz_stats')\n"
        "there.__spec__ = importlib.machinery.ModuleSpec('arviz_stats', None)\n"
        "refused(lambda: lossk.build_kernel(model, data, out='a.lossk', **settings), 'a store needs numcodecs')\n"
        "import os; assert not os.path.exists('a.lossk')\n"
        "print('refused')"
    )
    assert told == "refused\n"


def test_nothing_built_runs_in_torch_and_says_so() -> None:
    told = run(
        "from lossk.ops import extension, triton_kernels\n"
        "assert not extension.status().available\n"
        "kernel = lossk.build_kernel(model, data, **settings)\n"
        "assert set(kernel.meta['ops'].values()) == {'torch'}\n"
        "print([line for line in kernel.meta['passes_reasons'] if line.startswith('ops')])\n"
        "try: lossk.build_kernel(model, data, backend='cpp', **settings)\n"
        "except lossk.BackendError as error: print(error)\n"
        "found = triton_kernels.status('sgld_step', torch.device('cpu'))\n"
        "assert found.available, found.reason\n"
        "import lossk.kernels.sgld_step as kernel; print(kernel.__file__)\n",
        installed=True,
    ).splitlines()
    assert "ops = torch: lossk._C does not import" in told[0]
    assert "backend='cpp' cannot run here: lossk._C does not import" in told[1]
    assert told[2] == str(ROOT / "kernels" / "sgld_step.py")


@pytest.mark.parametrize("module", ["lossk", "lossk.cli.main", "lossk.analysis", "lossk.ops.triton_kernels"])
def test_importing_lossk_imports_none_of_them(module: str) -> None:
    run(f"import importlib; importlib.import_module({module!r}); print('ok')")
