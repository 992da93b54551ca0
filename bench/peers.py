"""A peer in a process of its own Python, which takes its turns when it is told to."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.jobs import Job
from bench.machine import ROOT
from bench.turns import Turn


class PeerError(RuntimeError):
    """The peer's process ended or said something else than a result."""


class Peer:
    """`PYTHON -m MODULE SPEC`, started, warmed up and waiting; as a context manager.

    Only its turn itself is timed, by itself: no start of Python, no imports, no reading of data.

    Attributes:
        versions: of the packages that the peer's Python has.
    """

    def __init__(self, python: str, module: str, spec: dict[str, Any], job: Job | None = None) -> None:
        self.python, self.module, self.spec, self.job = python, module, spec, job

    def __enter__(self) -> Peer:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        if self.job is not None:
            self.job.save(folder / "job.pt")
        (folder / "spec.json").write_text(json.dumps({**self.spec, "job": str(folder / "job.pt")}))
        self._errors = (folder / "stderr").open("w+")
        # It must find its own packages, not those of the Python that runs the benchmark.
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [self.python, "-m", self.module, str(folder / "spec.json")],
            cwd=ROOT, env=own, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        try:
            self.versions = self._answer()["versions"]
        except PeerError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()
        self._folder.cleanup()

    def turn(self) -> Turn:
        """Let it run once."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise PeerError(f"{self.module} ended without a result:\n{self._errors.read()[-2000:]}")
        return json.loads(line)
