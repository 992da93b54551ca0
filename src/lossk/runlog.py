"""The log of a run in progress: panels made durable one by one, so that a killed run goes on bitwise."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import zarr
from torch import Tensor

from lossk.chain import ChainState, Draw
from lossk.disk import read_json, replace_file, sync, write_json
from lossk.errors import StoreError
from lossk.kernel import LossKernel
from lossk.panel import Panel
from lossk.store import read_commits, refuse_other_run, write_kernel
from lossk.stored_tiles import CHECKED, WRITE_ALL

BEFORE_CONFIG = {"zarr.json", "losses", ".lock", ".config.json.part"}  # what a run killed at its very start leaves


class RunLog:
    """An open, locked, unfinished store.

    A panel is committed by writing its losses chunk, then the chain's state, then one line of the commit log, each
    made durable before the next. Whatever is not followed by its commit line is written again on resuming. Panels of
    several chains, made side by side by the ranks of a distributed run, are committed together.
    """

    def __init__(self, path: Path, panel: int, *, lock: bool = True) -> None:
        self.path, self.panel = path, panel
        self.commits: list[dict[str, Any]] = []
        self.chosen: dict[str, Any] | None = None  # the pilot's choices of the run so far
        self.losses: zarr.Array
        self._states: dict[int, int | None] = {}  # the number of each chain's state
        self._lock_file = self._lock() if lock else None

    @classmethod
    def create(cls, path: Path, request: dict[str, Any], chosen: dict[str, Any], columns: int | None = None) -> RunLog:
        """A new store. What a run killed at its very start left at `path` is taken over.

        Args:
            columns: width of a chunk of the log, in samples; None is all of them. Narrow ones are for reading back
                some samples' draws without the others'.
        """
        foreign = sorted(entry.name for entry in path.glob("*") if entry.name not in BEFORE_CONFIG)
        if foreign:
            raise StoreError(f"out={str(path)!r} is taken: it holds {foreign[:4]}")
        group = zarr.open_group(path, mode="a", zarr_format=3)
        log = cls(path, request["panel"])
        shape = (request["num_chains"], request["num_draws"], request["num_samples"])
        try:
            log.losses = group.create_array(
                "losses",
                shape=shape,
                chunks=(1, log.panel, columns or shape[2]),
                dtype="float32",
                dimension_names=("chain", "draw", "sample"),
                compressors=CHECKED,
                config=WRITE_ALL,
                overwrite=True,
            )
            write_json(path / "config.json", {**request, "chosen": chosen})
        except BaseException:
            log.close()
            raise
        return log

    @classmethod
    def open(cls, path: Path, request: dict[str, Any], *, lock: bool = True) -> RunLog | None:
        """The unfinished store at `path`, or None where a run was killed before it had written its config.

        Args:
            lock: False for a process beside the one that has locked and trimmed it.

        Raises:
            StoreError: another run's, being written by another process, or not a store at all.
        """
        if not (path / "config.json").exists():
            return None
        log = cls(path, request["panel"], lock=lock)
        try:
            saved = read_json(path / "config.json")
            refuse_other_run(path, saved, request)
            log.chosen = saved["chosen"]
            log.losses = zarr.open_array(path / "losses", mode="r+", config=WRITE_ALL)
            for commit in read_commits(path):
                log._note(commit)
            if lock:
                log._trim()
        except BaseException:
            log.close()
            raise
        return log

    def _lock(self) -> IO[str]:
        file = (self.path / ".lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise StoreError(f"out={str(self.path)!r} is being written by another process") from error
        return file

    def _trim(self) -> None:
        """Drop a torn last line, so that the next commit starts on a fresh one."""
        content = "".join(json.dumps(commit) + "\n" for commit in self.commits).encode()
        replace_file(self.path / "commits.jsonl", content)

    def append(self, panel: Panel) -> None:
        """Make a panel durable."""
        self.write_losses(panel.chain, panel.first_draw, panel.losses)
        self.write_state(panel.state, len(self.commits))
        self.commit([commit_of(panel.chain, panel.first_draw, panel.state.step, panel.draws)])

    def write_losses(self, chain: int, first_draw: int, losses: Tensor, columns: slice = slice(None)) -> None:
        """Make the losses of some draws, [k, N] float32, durable: all, or those of some samples, whole chunks."""
        self.losses[chain, first_draw : first_draw + len(losses), columns] = losses[:, columns].numpy()
        for chunk in self._chunks(chain, first_draw, columns):
            sync(chunk)

    def write_state(self, state: ChainState, number: int) -> None:
        """Make a chain's state durable, under the number that its commit will have; none is needed after its end."""
        if state.draw == self.num_draws:
            return
        arrays = {"weights": state.weights.numpy(force=True)}
        arrays |= {f"memory.{name}": tensor.numpy(force=True) for name, tensor in state.memory.items()}
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        replace_file(self._state_path(number), content.getvalue())

    def commit(self, new: list[dict[str, Any]], *, durable: bool = True) -> None:
        """Commit panels whose losses and states are durable, all or none of them.

        Args:
            durable: False where another process of the run writes the log of commits, and this one only follows it.
        """
        if len(new) > 1:
            new = [{**commit, "part": i, "parts": len(new)} for i, commit in enumerate(new)]
        if durable:
            with (self.path / "commits.jsonl").open("ab") as log:
                log.write(b"".join(json.dumps(commit).encode() + b"\n" for commit in new))
                log.flush()
                os.fsync(log.fileno())
            sync(self.path)
        for commit in new:
            outdated = self._note(commit)
            if durable and outdated is not None:
                self._state_path(outdated).unlink(missing_ok=True)

    def _note(self, commit: dict[str, Any]) -> int | None:
        """Take in a commit; returns the number of the chain's state that it outdates."""
        chain, draws = commit["chain"], commit["first_draw"] + len(commit["excess"])
        outdated = self._states.get(chain)
        self._states[chain] = len(self.commits) if draws < self.num_draws else None
        self.commits.append(commit)
        return outdated

    def unfinished(self) -> dict[int, int]:
        """The chains that have not all their draws, and how many they have."""
        draws = dict.fromkeys(range(self.losses.shape[0]), 0)
        draws |= {commit["chain"]: commit["first_draw"] + len(commit["excess"]) for commit in self.commits}
        return {chain: count for chain, count in draws.items() if count < self.num_draws}

    @property
    def num_draws(self) -> int:
        """Per chain."""
        return self.losses.shape[1]

    def _chunks(self, chain: int, first_draw: int, columns: slice) -> list[Path]:
        """The files of a panel's losses, for some samples."""
        folder, width = self.path / "losses" / "c" / str(chain) / str(first_draw // self.panel), self.losses.chunks[2]
        start, stop, _ = columns.indices(self.losses.shape[2])
        return [folder / str(column) for column in range(start // width, -(-stop // width))]

    def _state_path(self, number: int) -> Path:
        return self.path / f"state-{number}.npz"

    def state_of(self, chain: int) -> ChainState | None:
        """Where an unfinished chain's last committed panel left it; None where it has none."""
        number = self._states.get(chain)
        if number is None:
            return None
        commit = self.commits[number]
        try:
            with self._state_path(number).open("rb") as file, np.load(file, allow_pickle=False) as saved:
                arrays = {name: torch.from_numpy(saved[name]) for name in saved.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise StoreError(
                f"the state of chain {chain} after its last committed panel cannot be read: {error}"
            ) from error
        return ChainState(
            chain,
            commit["step"],
            commit["first_draw"] + len(commit["excess"]),
            arrays.pop("weights"),
            {name.removeprefix("memory."): tensor for name, tensor in arrays.items()},
        )

    def read_draws(self, commit: dict[str, Any]) -> list[Draw]:
        """What the chain said of a committed panel's draws."""
        first = commit["first_draw"]
        unknown = [math.nan] * len(commit["excess"])  # a run begun by an earlier version
        names = ("excess", "distance", "acceptance", "curvature", "variance")
        columns = zip(*(commit.get(name, unknown) for name in names), strict=True)
        return [Draw(commit["chain"], first + i, *numbers) for i, numbers in enumerate(columns)]

    def read_panel(self, commit: dict[str, Any], columns: slice = slice(None)) -> Tensor:
        """The losses of a committed panel, or of some samples of it: [k, N] float32."""
        first = commit["first_draw"]
        for chunk in self._chunks(commit["chain"], first, columns):
            if not chunk.exists():  # Zarr would read zeros
                raise StoreError(f"losses of chain {commit['chain']}, draw {first} are missing: there is no {chunk}")
        try:
            rows = self.losses[commit["chain"], first : first + len(commit["excess"]), columns]
        except ValueError as error:
            raise StoreError(f"losses of chain {commit['chain']}, draw {first} are damaged: {error}") from error
        return torch.from_numpy(np.asarray(rows))

    def finish(self, kernel: LossKernel, *, with_tiles: bool = True) -> None:
        """Write the finished kernel into the store, then drop what only a resume needs."""
        write_kernel(kernel, self.path, with_tiles=with_tiles)
        for file in (*self.path.glob("state-*.npz"), *self.path.glob("tiles*.jsonl"), self.path / ".lock"):
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process write the store."""
        if self._lock_file is not None:
            self._lock_file.close()


def commit_of(chain: int, first_draw: int, step: int, draws: Sequence[Draw]) -> dict[str, Any]:
    """The line of the commit log for a panel."""
    return {
        "chain": chain,
        "first_draw": first_draw,
        "step": step,
        "excess": [draw.excess_loss for draw in draws],
        "distance": [draw.distance for draw in draws],
        "acceptance": [draw.acceptance for draw in draws],
        "curvature": [draw.curvature for draw in draws],
        "variance": [draw.variance for draw in draws],
    }
