"""The peer's side of `bench.peers`: warm up, say so, and run once for every line that comes in.

Runs in the peer's Python: nothing of lossk here.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], dict[str, float]]


def serve(prepare: Callable[[dict[str, Any]], Run]) -> None:
    """`prepare(spec)` reads the data and returns the run; it also does a small one, which loads what loads lazily."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peer prints must not be taken for an answer
    warnings.filterwarnings("ignore")
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    run = prepare(spec)
    versions = {name: version(name) for name in ("devinterp", "torch", "numpy")}
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(run()), file=answers, flush=True)
