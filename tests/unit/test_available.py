"""What a process may still take: the least of the machine, its limits, its control groups and its batch job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lossk import available as module
from lossk.available import available, available_bytes, group_limits, job_limits
from lossk.memory import Budget

GB = 10**9


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def group(folder: Path, *, v2: bool, limit: str, used: int, idle: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit_name, used_name, field = names if v2 else v1
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / used_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{field} {idle}\n")


@pytest.mark.parametrize("v2", [True, False])
def test_the_tightest_of_a_hierarchy_binds(v2: bool, tmp_path: Path, own: Path) -> None:
    top = tmp_path if v2 else tmp_path / "memory"
    own.write_text("0::/slurm/job/step\n" if v2 else "9:cpu:/elsewhere\n4:memory,x:/slurm/job/step\n0::/\n")
    unlimited = "max" if v2 else str(2**63 - 4096)
    group(top / "slurm" / "job" / "step", v2=v2, limit=unlimited, used=GB)
    group(top / "slurm" / "job", v2=v2, limit=str(4 * GB), used=3 * GB, idle=GB // 2)
    group(top / "slurm", v2=v2, limit=str(9 * GB), used=3 * GB)
    group(top / "other", v2=v2, limit=str(GB), used=GB)
    found = min(group_limits(tmp_path, own), key=lambda room: room.count)
    assert found.count == 4 * GB - (3 * GB - GB // 2)
    assert found.by == f"control group {top / 'slurm' / 'job'}"
    group(top / "slurm", v2=v2, limit=str(3 * GB), used=4 * GB)
    assert min(room.count for room in group_limits(tmp_path, own)) == 0


def test_inside_a_container_the_root_is_the_own_group(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/\n")
    group(tmp_path, v2=True, limit=str(2 * GB), used=GB)
    assert [room.count for room in group_limits(tmp_path, own)] == [GB]
    own.write_text("0::/../../outside\n4:memory:/docker/id\n")  # what is named is not mounted here
    group(tmp_path / "memory", v2=False, limit=str(3 * GB), used=GB)
    assert 2 * GB in [room.count for room in group_limits(tmp_path, own)]


@pytest.mark.parametrize("text", ["", "garbage", "0::\n::::\n", "0::/a\n4:memory:/b\n"])
def test_what_cannot_be_read_limits_nothing(text: str, tmp_path: Path, own: Path) -> None:
    assert list(group_limits(tmp_path, own)) == []
    own.write_text(text)
    assert list(group_limits(tmp_path, own)) == []


@pytest.mark.parametrize(
    ("environment", "megabytes"),
    [
        ({"SLURM_MEM_PER_NODE": "16000"}, 16000),
        ({"SLURM_MEM_PER_CPU": "2000", "SLURM_CPUS_ON_NODE": "4"}, 8000),
        ({"SLURM_MEM_PER_CPU": "2000"}, 2000),
        ({"SLURM_MEM_PER_NODE": "0"}, None),  # all of the node's
        ({"SLURM_MEM_PER_NODE": "many"}, None),
        ({}, None),
    ],
)
def test_a_batch_job(environment: dict[str, str], megabytes: int | None) -> None:
    held = psutil.Process().memory_info().rss
    found = [room.count for room in job_limits(environment)]
    if megabytes is None:
        assert found == []
    else:
        assert found == pytest.approx([megabytes * 2**20 - held], abs=50e6)


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_ulimit_bounds_the_budget(kind: str) -> None:
    program = (
        "import resource, lossk\n"
        "from lossk.available import available\n"
        "from lossk.memory import Budget\n"
        f"limit = getattr(resource, {kind!r})\n"
        "import psutil; used = psutil.Process().memory_info()\n"
        "held = used.vms if limit == resource.RLIMIT_AS else used.data\n"
        "resource.setrlimit(limit, (held + 10**9, -1))\n"
        "print(available().by, available().count, Budget.now('900GB').limit(0))\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *by, count, limit = found.stdout.split()
    assert " ".join(by) == {"RLIMIT_AS": "ulimit -v", "RLIMIT_DATA": "ulimit -d"}[kind]
    assert 0.9e9 < int(count) <= 1e9
    assert 0.85e9 < int(limit) <= int(count)


def test_the_machine_binds_where_nothing_else_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CGROUPS", tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", type("Free", (), {"available": 123}))
    assert (available_bytes(), available().by) == (123, "the machine")
    group(tmp_path / "g", v2=True, limit="100", used=1)
    (tmp_path / "own").write_text("0::/g\n")
    monkeypatch.setattr(module, "OWN_GROUPS", tmp_path / "own")
    assert available_bytes() == 99
    assert Budget(None, 0).limit(10) == 10 + int(0.95 * 99)
