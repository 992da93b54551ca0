"""What an unfinished store says of itself: its log of commits, and what a killed run left lying about."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lossk.disk.files import remove
from lossk.disk.locks import LOCK
from lossk.disk.sealed import MARK, read_log, read_sealed
from lossk.errors import StoreError
from lossk.store.manifest import COMPLETE

COMMITS = "commits.jsonl"
DRAWS = ("distance", "acceptance", "curvature", "variance", "glance")  # what else a commit may say of each draw
TRANSIENT = ("state-*.npz", "tiles*.jsonl", LOCK)  # what only a run in progress has
CUT_OFF = (".*.part", "*.partial")  # what a kill leaves of a write: this version's, and an earlier one's


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One line of the log: a panel of a chain that is durable."""

    chain: int
    first_draw: int
    step: int  # of the chain, after the panel's last draw
    series: dict[str, list[float]]  # "excess" and DRAWS: a number of each draw; an earlier version's may lack some
    chunks: tuple[int, ...] | None  # checksums of its losses; None of an earlier version
    part: int = 0  # of the panels that were committed together
    parts: int = 1
    state: tuple[int, int] | None = None  # length and checksum of the chain's state after it, while it is needed

    @property
    def draws(self) -> int:
        """Of the panel."""
        return len(self.series["excess"])

    @property
    def end(self) -> int:
        """The chain's draws up to its last one."""
        return self.first_draw + self.draws

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Commit:
        """From a line that has been checked."""
        state, chunks = line.get("state"), line.get("chunks")
        return cls(
            chain=line["chain"],
            first_draw=line["first_draw"],
            step=line["step"],
            series={name: line[name] for name in ("excess", *DRAWS) if name in line},
            chunks=None if chunks is None else tuple(chunks),
            part=line.get("part", 0),
            parts=line.get("parts", 1),
            state=None if state is None else (state[0], state[1]),
        )

    def line(self) -> dict[str, Any]:
        """As the log has it."""
        together = {"part": self.part, "parts": self.parts} if self.parts > 1 else {}
        return {
            "chain": self.chain,
            "first_draw": self.first_draw,
            "step": self.step,
            **self.series,
            **({} if self.chunks is None else {"chunks": list(self.chunks)}),
            **together,
            **({} if self.state is None else {"state": list(self.state)}),
        }


def read_commits(path: Path, config: Mapping[str, Any] | None = None) -> tuple[list[Commit], str | None]:
    """The committed panels, in order, and what is wrong with a last line that does not count.

    Of panels that were committed together all count, or none.

    Raises:
        StoreError: a line is not what was written, or cannot be of this run.
    """
    if config is None:
        config = read_sealed(path / "config.json") if (path / "config.json").exists() else {}
    lines, wrong = read_log(path / COMMITS, sealed=MARK in config)
    made: dict[int, int] = {}
    for number, line in enumerate(lines, 1):
        if not _follows(line, made, config):
            raise StoreError(
                f"{COMMITS} of {str(path)!r}, line {number}, is no commit that could follow those before it"
            )
    commits = [Commit.of(line) for line in lines]
    if commits and commits[-1].part + 1 < commits[-1].parts:
        del commits[-1 - commits[-1].part :]
    return commits, wrong


def _follows(commit: Any, made: dict[int, int], config: Mapping[str, Any]) -> bool:
    """Whether a line can be the next commit; `made` has the draws of each chain, and takes in its own."""
    if not isinstance(commit, dict):
        return False
    counts = [commit.get("chain"), commit.get("first_draw"), commit.get("step"), commit.get("part", 0)]
    if not all(type(count) is int and count >= 0 for count in counts):
        return False
    chain, first, _, part = counts
    excess = commit.get("excess", [])
    numbers = [excess, *(commit.get(name, excess) for name in DRAWS)]
    if not all(isinstance(row, list) and all(isinstance(x, int | float) for x in row) for row in numbers):
        return False
    assert isinstance(excess, list)
    draws, panel = len(excess), config.get("panel", len(excess))
    fits = 0 < draws <= panel and all(len(row) == draws for row in numbers) and first == made.get(chain, 0)
    made[chain] = first + draws
    parts = commit.get("parts", 1)
    grouped = type(parts) is int and part < parts
    digests = commit.get("chunks", [])
    whole = isinstance(digests, list) and all(type(crc) is int for crc in digests) and _is_state(commit.get("state"))
    inside = chain < config.get("num_chains", chain + 1) and first + draws <= config.get("num_draws", first + draws)
    return fits and grouped and whole and inside


def _is_state(state: Any) -> bool:
    return state is None or (isinstance(state, list) and len(state) == 2 and all(type(x) is int for x in state))


def progress_of(path: Path) -> str:
    """How far an unfinished store got, in words.

    Raises:
        StoreError: its log is damaged.
    """
    request = read_sealed(path / "config.json") if (path / "config.json").exists() else {}
    commits, _ = read_commits(path, request)
    if not commits or "num_chains" not in request:
        return "no draws are saved yet"
    done = sum(commit.draws for commit in commits)
    tiles = sum(len(read_log(file, sealed=False)[0]) for file in sorted(path.glob("tiles*.jsonl")))
    return f"{done} of {request['num_chains'] * request['num_draws']} draws are saved" + (
        f", and {tiles} tiles" if tiles else ""
    )


def is_transient(name: str) -> bool:
    """Whether a name in a store's folder is of what a finished store has no more use for."""
    return any(fnmatch(name, pattern) for pattern in (*TRANSIENT, *CUT_OFF))


def clear_transient(path: Path) -> None:
    """Remove what a finished store has no more use for; its lock last."""
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name == LOCK):
        if is_transient(entry.name):
            remove(entry)


def clear_cut_off(path: Path) -> None:
    """Remove what kills left of writes into an unfinished store, which is this process's.

    Raises:
        StoreError: it holds a symbolic link, which nothing is read or written through.
    """
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            entry = Path(folder) / name
            if entry.is_symlink():
                raise StoreError(f"{str(entry)!r} is a symbolic link: nothing is written through it; remove it")
            if any(fnmatch(name, pattern) for pattern in CUT_OFF):
                remove(entry)
                folders[:] = [other for other in folders if other != name]
    remove(path / COMPLETE)  # a mark of an earlier version, made by half
