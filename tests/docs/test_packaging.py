"""The built wheel and sdist, each installed into a virtual environment of its own."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.long("builds a wheel and a source distribution, and installs each")
ROOT = Path(__file__).resolve().parents[2]
USE_IT = """
import json, pathlib, sys, torch, lossk
from lossk.ops.extension import status
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
data = (torch.randn(20, 3), torch.randint(0, 2, (20,)))
sampler = lossk.SGLD(lr=1e-3, localization=10.0, num_burnin_steps=2, num_steps_bw_draws=1)
kernel = lossk.build_kernel(model, data, sampler=sampler, num_chains=2, num_draws=5, progress=False)
print(json.dumps({
    "file": lossk.__file__, "extension": status().available, "reason": status().reason,
    "backend": kernel.meta["backend"], "kernels": __import__("lossk.kernels").kernels.__file__,
    "yaml": sorted(p.name for p in pathlib.Path(lossk.__file__).parent.rglob("*.yaml")),
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist of the tree, and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


def fresh_environment(folder: Path) -> Path:
    """A virtual environment without lossk that sees this one's other packages, after its own."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installs_and_runs_in_a_fresh_environment(kind: str, distributions: dict[str, Path], tmp_path: Path) -> None:
    import json

    python = fresh_environment(tmp_path / "venv")
    pip = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    run(*pip, distributions[kind], cwd=tmp_path)
    found = json.loads(run(python, "-W", "error", "-c", USE_IT, cwd=tmp_path).splitlines()[-1])
    assert Path(found["file"]).is_relative_to(tmp_path)
    assert Path(found["kernels"]).is_relative_to(tmp_path)
    assert found["extension"], found["reason"]
    assert found["backend"] == "cpp"
    assert {"digits.yaml", "fashion.yaml"} <= set(found["yaml"])
    assert "cpp" in run(tmp_path / "venv" / "bin" / "lossk", "doctor", cwd=tmp_path)


def test_the_archives_hold_what_they_should(distributions: dict[str, Path]) -> None:
    wheel = zipfile.ZipFile(distributions["wheel"]).namelist()
    assert any(name.startswith("lossk/_C.") for name in wheel)
    assert "lossk/kernels/__init__.py" in wheel
    assert {f"lossk/report/page/{name}" for name in ("template.html", "report.css", "map.js", "main.js")} <= set(wheel)
    assert not [name for name in wheel if name.startswith(("tests", "bench", "csrc"))]
    with tarfile.open(distributions["sdist"]) as archive:
        sdist = archive.getnames()
    for needed in (
        "CMakeLists.txt",
        "csrc/bindings.cpp",
        "kernels/__init__.py",
        "LICENSE",
        "tests/docs/test_packaging.py",
    ):
        assert any(name.endswith("/" + needed) for name in sdist), needed
