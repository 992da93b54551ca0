"""What a release needs says the same everywhere."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml

import lossk

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_one_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(cited["version"]) == PROJECT["project"]["version"] == lossk.__version__
    assert cited["license"] == PROJECT["project"]["license"]


def test_wheels_are_for_the_pythons_that_are_tested() -> None:
    tested = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    built = PROJECT["tool"]["cibuildwheel"]["build"].split()
    assert built == [f"cp{version.replace('.', '')}-*" for version in tested["python"]]
    assert PROJECT["project"]["requires-python"] == f">={tested['python'][0]}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_only_reads(path: Path) -> None:
    """It may not write to the repository, and calls nothing that is not there."""
    plain = yaml.safe_load(path.read_text())
    assert plain["permissions"] == {"contents": "read"}
    targets = {line.partition(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if ":" in line}
    for job in plain["jobs"].values():
        for step in job["steps"]:
            words = step.get("run", "").split()
            if words[:1] == ["make"]:
                assert words[1] in targets
            if words and words[0].startswith(".ci/"):
                assert (ROOT / words[0]).is_file()
