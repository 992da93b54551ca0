"""The log of a run in progress: panels made durable one by one, so that a killed run goes on bitwise."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lossk.accumulate.trace_watch import TraceWatch
from lossk.disk.chunks import ArraySpec, At, ChunkError, Chunks
from lossk.disk.files import Digest, digest, read_file, remove, replace_file, sync_tree
from lossk.disk.locks import LOCK, Lock
from lossk.disk.sealed import MARK, LineLog, read_sealed, write_sealed
from lossk.disk.swap import Parts
from lossk.errors import StoreError
from lossk.samplers.chain import ChainState, Draw, numbers_of
from lossk.store.commits import COMMITS, CUT_OFF, DRAWS, Commit, clear_cut_off, clear_transient, read_commits
from lossk.store.contents import Contents
from lossk.store.manifest import describe_group, digest_of, is_complete
from lossk.store.store import refuse_other_run, write_contents

BEFORE_CONFIG = ("zarr.json", "losses", ".lock", *CUT_OFF)  # what an earlier version's run, killed at its start, leaves
STATE_BYTES = 2**40  # the largest state, of an earlier version's run, that is read


class Sums(Protocol):
    """Tiles or a factor, as panels are added to them."""

    def update(self, chain: int, losses: Tensor) -> Any:
        """Take in losses [k, N] of a chain."""


class RunLog:
    """An open, locked, unfinished store.

    A panel is committed by writing its losses chunk, then the chain's state, then one line of the commit log, each
    made durable before the next. Whatever is not followed by its commit line is written again on resuming. Panels of
    several chains, made side by side by the ranks of a distributed run, are committed together.
    """

    def __init__(self, path: Path, panel: int, *, lock: bool = True) -> None:
        self.path, self.panel = path, panel
        self.commits: list[Commit] = []
        self.chosen: dict[str, Any] | None = None  # the pilot's choices of the run so far
        self.losses: Chunks
        self.known: dict[str, Digest] = {}  # of files that were written
        self._states: dict[int, int | None] = {}  # the number of each chain's state
        self._lines = LineLog(path / COMMITS)
        self._lock = Lock(path) if lock else None

    @classmethod
    def create(cls, path: Path, request: dict[str, Any], chosen: dict[str, Any], columns: int | None = None) -> RunLog:
        """A new store, made beside its place and moved there.

        Args:
            columns: width of a chunk of the log, in samples; None is all of them. Narrow ones are for reading back
                some samples' draws without the others'.
        """
        place = path.resolve()
        _clear_beginning(path)
        parts = Parts(place)
        try:
            log = cls(parts.path, request["panel"])
            try:
                shape = (request["num_chains"], request["num_draws"], request["num_samples"])
                chunks = (1, log.panel, columns or shape[2])
                spec = ArraySpec.of(shape, "float32", ("chain", "draw", "sample"), chunks)
                Chunks.create(parts.path, "losses", spec)
                describe_group(parts.path, [])
                write_sealed(parts.path / "config.json", {**request, "chosen": chosen, MARK: "crc32c"})
                sync_tree(parts.path)
                parts.place()
            except BaseException:
                log.close()
                raise
        finally:
            parts.close()
        log.path, log._lines = path, LineLog(path / COMMITS)
        log.losses = Chunks(path, "losses", spec, log.known)
        return log

    @classmethod
    def open(cls, path: Path, request: dict[str, Any], *, lock: bool = True) -> RunLog | None:
        """The unfinished store at `path`, or None where a run was killed before it had written its config.

        Args:
            lock: False for a process beside the one that has locked and trimmed it.

        Raises:
            StoreError: another run's, being written by another process, finished meanwhile, or not a store at all.
        """
        if not (path / "config.json").exists():
            return None
        log = cls(path, request["panel"], lock=lock)
        try:
            if is_complete(path):
                raise StoreError(f"out={str(path)!r} has been finished by another process; call again to read it")
            log._resume(request, trim=lock)
        except BaseException:
            log.close()
            raise
        return log

    def _resume(self, request: dict[str, Any], *, trim: bool) -> None:
        saved = read_sealed(self.path / "config.json")
        refuse_other_run(self.path, saved, request)
        if not isinstance(saved.get("chosen"), dict):
            raise StoreError(f"config.json of {str(self.path)!r} does not say what was chosen")
        self.chosen = saved["chosen"]
        if trim:
            clear_cut_off(self.path)
        self.losses = Chunks.open(self.path, "losses", self.known)
        spec, shape = self.losses.spec, (saved["num_chains"], saved["num_draws"], saved["num_samples"])
        if (spec.shape, spec.dtype, spec.chunks[:2]) != (shape, "float32", (1, min(self.panel, shape[1]))):
            raise StoreError(
                f"the store's array 'losses' in {str(self.path)!r} is damaged: losses/zarr.json is another's"
            )
        for commit in read_commits(self.path, saved)[0]:
            self._note(commit)
        if trim:
            self._lines = LineLog.begin(self.path / COMMITS, [commit.line() for commit in self.commits])
            kept = {self._state_path(number) for number in self._states.values() if number is not None}
            for state in set(self.path.glob("state-*.npz")) - kept:
                remove(state)

    def restart(self, request: dict[str, Any], chosen: dict[str, Any]) -> None:
        """Forget all draws, for other settings. After a kill in between, the old ones lead here again."""
        self._lines = LineLog.begin(self.path / COMMITS, [])
        write_sealed(self.path / "config.json", {**request, "chosen": chosen, MARK: "crc32c"})
        for state in self.path.glob("state-*.npz"):
            remove(state)
        self.commits, self._states, self.chosen = [], {}, chosen

    def write_losses(self, chain: int, first_draw: int, losses: Tensor, columns: slice = slice(None)) -> list[int]:
        """Make the losses of some draws, [k, N] float32, durable: all, or those of some samples, whole chunks.

        Returns:
            The checksum of each chunk.
        """
        found = []
        for at, span in self._chunks(chain, first_draw, columns):
            found.append(self.losses.write(at, losses[:, span].numpy()[None])[1])
        return found

    def checksums(self, chain: int, first_draw: int, losses: Tensor) -> list[int]:
        """What `write_losses` returns of all samples, whoever writes them."""
        return [
            self.losses.digest(losses[:, span].numpy()[None])[1]
            for _, span in self._chunks(chain, first_draw, slice(None))
        ]

    def write_state(self, state: ChainState, number: int) -> None:
        """Make a chain's state durable, under the number that its commit will have; none is needed after its end."""
        if state.draw == self.num_draws:
            return
        arrays = {"weights": state.weights.numpy(force=True)}
        arrays |= {f"memory.{name}": tensor.numpy(force=True) for name, tensor in state.carried.items()}
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        replace_file(self._state_path(number), content.getbuffer())

    def commit(self, new: list[Commit], *, durable: bool = True) -> None:
        """Commit panels whose losses and states are durable, all or none of them.

        Args:
            durable: False where another process of the run writes the log of commits, and this one only follows it.
        """
        if len(new) > 1:
            new = [replace(commit, part=i, parts=len(new)) for i, commit in enumerate(new)]
        if durable:
            new = [self._with_state(commit, number) for number, commit in enumerate(new, len(self.commits))]
            self._lines.append([commit.line() for commit in new])
        for commit in new:
            outdated = self._note(commit)
            if durable and outdated is not None:
                self._state_path(outdated).unlink(missing_ok=True)

    def _with_state(self, commit: Commit, number: int) -> Commit:
        """With the digest of the chain's state, which one that ends has not."""
        return commit if commit.end == self.num_draws else replace(commit, state=digest_of(self._state_path(number)))

    def _note(self, commit: Commit) -> int | None:
        """Take in a commit; returns the number of the chain's state that it outdates."""
        chain, draws = commit.chain, commit.end
        chunks = self._chunks(chain, commit.first_draw, slice(None))
        for (at, _), crc in zip(chunks, commit.chunks or (), strict=False):
            self.known[self.losses.key(at)] = self.losses.spec.chunk_bytes, crc
        outdated = self._states.get(chain)
        self._states[chain] = len(self.commits) if draws < self.num_draws else None
        self.commits.append(commit)
        return outdated

    def unfinished(self) -> dict[int, int]:
        """The chains that have not all their draws, and how many they have."""
        draws = dict.fromkeys(range(self.losses.shape[0]), 0)
        draws |= {commit.chain: commit.end for commit in self.commits}
        return {chain: count for chain, count in draws.items() if count < self.num_draws}

    @property
    def num_draws(self) -> int:
        """Per chain."""
        return self.losses.shape[1]

    def _chunks(self, chain: int, first_draw: int, columns: slice) -> list[tuple[At, slice]]:
        """The chunks of a panel's losses, for some samples, and the samples of each."""
        total, width = self.losses.shape[2], self.losses.chunks[2]
        start, stop, _ = columns.indices(total)
        row = first_draw // self.panel
        return [
            ((chain, row, column), slice(column * width, min((column + 1) * width, total)))
            for column in range(start // width, -(-stop // width))
        ]

    def _state_path(self, number: int) -> Path:
        return self.path / f"state-{number}.npz"

    def state_of(self, chain: int) -> ChainState | None:
        """Where an unfinished chain's last committed panel left it; None where it has none."""
        number = self._states.get(chain)
        if number is None:
            return None
        commit = self.commits[number]
        try:
            arrays = _read_state(self._state_path(number), commit.state)
            weights = arrays.pop("weights")
        except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, StoreError) as error:
            raise StoreError(
                f"the state of chain {chain} after its last committed panel cannot be read: {error}"
            ) from error
        return ChainState(
            chain,
            commit.step,
            commit.end,
            weights,
            {name.removeprefix("memory."): tensor for name, tensor in arrays.items()},
        )

    def replay(self, sums: Sums, watch: TraceWatch) -> None:
        """Give the committed panels, in order, to what adds up losses and to what watches them."""
        for commit in self.commits:
            losses = self.read_panel(commit)
            sums.update(commit.chain, losses)
            watch.note(losses, self.read_draws(commit))

    def read_draws(self, commit: Commit) -> list[Draw]:
        """What the chain said of a committed panel's draws."""
        unknown = [math.nan] * commit.draws  # a run begun by an earlier version
        names = ("excess", *DRAWS)
        columns = zip(*(commit.series.get(name, unknown) for name in names), strict=True)
        return [Draw(commit.chain, commit.first_draw + i, *numbers) for i, numbers in enumerate(columns)]

    def read_panel(self, commit: Commit, columns: slice = slice(None)) -> Tensor:
        """The losses of a committed panel, or of some samples of it: [k, N] float32."""
        chain, first, count = commit.chain, commit.first_draw, commit.draws
        start, stop, _ = columns.indices(self.losses.shape[2])
        out = np.empty((count, stop - start), dtype=np.float32)
        for at, span in self._chunks(chain, first, columns):
            try:
                values = self.losses.read(at)[0, :count]
            except ChunkError as error:
                what = f"there is no {error.path}" if error.missing else f"{error.reason} ({error.path})"
                state = "missing" if error.missing else "damaged"
                raise StoreError(f"losses of chain {chain}, draw {first} are {state}: {what}") from error
            left, right = max(start, span.start), min(stop, span.stop)
            out[:, left - start : right - start] = values[:, left - span.start : right - span.start]
        return torch.from_numpy(out)

    def finish(self, contents: Contents, *, with_tiles: bool = True) -> None:
        """Write the finished kernel into the store, then drop what only a resume needs."""
        write_contents(contents, self.path, with_tiles=with_tiles, known=self.known)
        clear_transient(self.path)

    def close(self) -> None:
        """Let another process write the store."""
        if self._lock is not None:
            self._lock.release()


def _clear_beginning(path: Path) -> None:
    """Take what an earlier version's run, killed at its very start, left at `path`; refuse anything else."""
    if not path.is_dir():
        return
    foreign = sorted(
        entry.name for entry in path.iterdir() if not any(fnmatch(entry.name, name) for name in BEFORE_CONFIG)
    )
    if foreign:
        raise StoreError(f"out={str(path)!r} is taken: it holds {foreign[:4]}")
    if not any(path.iterdir()):
        return
    lock = Lock(path)
    try:
        for entry in sorted(path.iterdir(), key=lambda entry: entry.name == LOCK):
            remove(entry)
    finally:
        lock.release()


def _read_state(path: Path, written: Sequence[int] | None) -> dict[str, Tensor]:
    """The arrays of a chain's state: stored as they are, so that no few bytes become many."""
    content = read_file(path, STATE_BYTES if written is None else written[0])
    if written is not None and digest(content) != tuple(written):
        raise StoreError(f"{path.name} does not fit its checksum in {COMMITS}")
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in packed.infolist()):
            raise StoreError(f"{path.name} is compressed, which no state is")
    with np.load(io.BytesIO(content), allow_pickle=False) as saved:
        return {name: torch.from_numpy(saved[name]) for name in saved.files}


def commit_of(chain: int, first_draw: int, step: int, draws: Sequence[Draw], chunks: list[int]) -> Commit:
    """The line of the commit log for a panel; `chunks` are the checksums of its losses."""
    series = zip(("excess", *DRAWS), zip(*map(numbers_of, draws), strict=True), strict=True)
    return Commit(
        chain=chain,
        first_draw=first_draw,
        step=step,
        series={name: list(numbers) for name, numbers in series},
        chunks=tuple(chunks),
    )
