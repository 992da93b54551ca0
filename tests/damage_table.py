"""The table of damages: every file of finished and unfinished stores, damaged in every way, and what comes of it.

`python tests/damage_table.py FOLDER` prints it as Markdown. Each case is read (or, of an unfinished store, taken up
again, as far as that reads) and verified. It is *named* by a StoreError; or it is *as it was*, all numbers the same; or
it is a fault: *silent*, other numbers without a word, or *raw*, an error of somebody else's.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lossk
from damage import ANY, LINES, TEXT, Damage, changed_text, files_of
from lossk.accumulate.runlog import RunLog
from lossk.disk.sealed import read_sealed
from lossk.store.verify import verify_store
from sweep_kinds import build, losses, out_of_core

METADATA: dict[str, Damage] = {
    "another dtype": changed_text(b'"float64"', b'"int64"'),
    "another shape": changed_text(b"37", b"38"),
    "another fill": changed_text(b'"fill_value"', b'"fill_valve"'),
    "no checksums": changed_text(b'"crc32c"', b'"crc32d"'),
}
SETTINGS: dict[str, Any] = {"num_chains": 1, "panel": 2}


@dataclass(frozen=True)
class Case:
    """A damage of a file: what reading the store, and verifying it, said."""

    store: str
    file: str
    damage: str
    read: str
    verified: str


def everything(kernel: lossk.LossKernel) -> list[np.ndarray]:
    """All that can be read of it."""
    moments = [
        kernel.variance,
        kernel.mean_loss,
        kernel.lag1,
        kernel.contents.moments.scale,
        kernel.contents.moments.chain_mean,
    ]
    tokens = [] if kernel.tokens is None else [kernel.tokens]
    kept = kernel._watched()
    watched = [] if kept is None else [kept.index, kept.losses]
    return [part.numpy() for part in (*moments, *tokens, *watched, kernel[:])] + [np.array(str(kernel.diagnostics))]


def taken_up(path: Path) -> list[np.ndarray]:
    """All that a resume reads of it, as far as it counts as made: commits, losses, states."""
    config = build_request(path)
    log = RunLog.open(path, config) or RunLog.create(path, config, {})
    try:
        found = [np.array(str(commit)) for commit in log.commits]
        found += [log.read_panel(commit).numpy() for commit in log.commits]
        states = [log.state_of(chain) for chain in sorted(log.unfinished())]
        return found + [part.weights.numpy() for part in states if part is not None]
    finally:
        log.close()


def build_request(path: Path) -> dict[str, Any]:
    """The request that the store at `path` was begun with."""
    return REQUESTS[path.name.split(".")[0].split(" ")[0]]


REQUESTS: dict[str, dict[str, Any]] = {}


def make_stores(folder: Path) -> dict[str, Path]:
    """Finished ones: of a run, of traces of tokens, of a factor saved from memory; and two that were stopped."""
    stores = {name: folder / f"{name}.lossk" for name in ("run", "traces", "saved", "stopped", "making")}
    build(stores["run"], **SETTINGS)
    tokens = torch.stack([torch.arange(37) // 5, torch.arange(37) % 5], dim=1)
    lossk.LossTraces(losses(), tokens=tokens).save(stores["traces"])
    lossk.LossKernel.from_traces(lossk.LossTraces(losses())).save(stores["saved"])
    _stop(RunLog, "write_losses", 3, lambda: build(stores["stopped"]))
    (folder / "making").mkdir()
    _stop(lossk.accumulate.tile_pass.TileWriter, "_write", 3, lambda: out_of_core(folder / "making"))
    (folder / "making" / "k.lossk").rename(stores["making"])
    (folder / "making").rmdir()
    for name in ("stopped", "making"):
        saved = read_sealed(stores[name] / "config.json")
        REQUESTS[name] = {key: saved[key] for key in saved if key not in ("chosen", "checksums")}
    return stores


def _stop(kind: Any, method: str, after: int, run: Callable[[], Any]) -> None:
    """Have a run end after some calls of a method."""
    call, count = getattr(kind, method), [0]

    def stopping(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] > after:
            raise KeyboardInterrupt
        return call(*arguments, **options)

    setattr(kind, method, stopping)
    try:
        run()
    except KeyboardInterrupt:
        return
    finally:
        setattr(kind, method, call)
    raise AssertionError("it was not stopped")


def replaced_by(content: bytes) -> Damage:
    return lambda file: file.write_bytes(content)


def damages_of(store: Path, other: Path, name: str) -> dict[str, Damage]:
    """What is done to one file."""
    found = dict(ANY)
    files = files_of(store)
    same = [file for file in files if file != name and Path(file).suffix == Path(name).suffix]
    place = files.index(name)
    content = (store / name).read_bytes()
    near = [file for file in same if files.index(file) > place][:1] or same[:1]
    for label, file in [("another file of it", store / "".join(near)), ("that file of another", other / name)]:
        if file.is_file() and file.read_bytes() != content:
            found[label] = replaced_by(file.read_bytes())
    if name.endswith((".json", ".jsonl")):
        found |= TEXT
    if name.endswith(".jsonl") and (store / name).read_bytes().count(b"\n") > 1:
        found |= LINES
    if name.endswith("zarr.json"):
        probes = {"another dtype": b'"float64"', "another shape": b"37", "another fill": b'"fill_value"',
                  "no checksums": b'"crc32c"'}  # fmt: skip
        found |= {label: METADATA[label] for label, text in probes.items() if text in content}
    return found


def outcome(read: Callable[[], list[np.ndarray]], expected: list[np.ndarray], *, prefix: bool) -> str:
    """Of reading a damaged store."""
    try:
        found = read()
    except lossk.StoreError:
        return "named"
    except BaseException as error:
        return f"raw {type(error).__name__}: {error}"
    same = len(found) == len(expected) and all(map(np.array_equal, found, expected))
    if prefix and not same:  # what was made last does not count, and is made again
        same = all(any(np.array_equal(part, other) for other in expected) for part in found)
        return "made again" if same else "silent"
    return "as it was" if same else "silent"


def verified(path: Path) -> str:
    try:
        problems = verify_store(path).problems
    except lossk.StoreError:
        return "named"
    except BaseException as error:
        return f"raw {type(error).__name__}: {error}"
    finished = [problem for problem in problems if not problem.startswith("unfinished: ") or "not known" in problem]
    return "named" if finished else "nothing"


def cases(folder: Path) -> Iterator[Case]:
    """Every case, one after the other."""
    stores = make_stores(folder)
    others = make_others(folder, stores)
    for name, store in stores.items():
        unfinished = name in ("stopped", "making")
        read = taken_up if unfinished else (lambda path: everything(lossk.open(path)))
        copy = folder / f"{name} damaged.lossk"
        shutil.copytree(store, copy)
        expected = read(copy)
        shutil.rmtree(copy)
        for file in files_of(store):
            for label, damage in damages_of(store, others[name], file).items():
                shutil.copytree(store, copy)
                damage(copy / file)
                said = verified(copy)
                yield Case(name, file, label, outcome(lambda: read(copy), expected, prefix=unfinished), said)  # noqa: B023
                shutil.rmtree(copy)


def make_others(folder: Path, stores: dict[str, Path]) -> dict[str, Path]:
    """Stores like them, of other numbers."""
    other = folder / "other.lossk"
    build(other, **SETTINGS, seed=1)
    more = folder / "other traces.lossk"
    lossk.LossTraces(2 * losses()[:, ::-1].copy()).save(more)
    return {name: more if name in ("traces", "saved") else other for name in stores}


def as_table(found: list[Case]) -> str:
    """Cases by the kind of file, and what came of them."""
    kinds: dict[tuple[str, str], Counter[str]] = {}
    for case in found:
        parts = case.file.split("/")
        label = {1: case.file, 2: "ARRAY/zarr.json"}.get(len(parts), f"{parts[0]}/c/...")
        state = "unfinished" if case.store in ("stopped", "making") else "finished"
        key = (state, "state-K.npz" if label.startswith("state-") else label)
        counts = kinds.setdefault(key, Counter())
        counts["cases"] += 1
        counts[case.read.split(" ")[0]] += 1
        counts["verify"] += case.verified == "named"
    lines = ["| store | file | cases | named | as it was | made again | silent | raw | named by verify |"]
    lines.append("|" + "---|" * 9)
    shown = ("cases", "named", "as", "made", "silent", "raw", "verify")
    for (state, label), counts in sorted(kinds.items()):
        row = [counts[key] for key in shown]
        lines.append(f"| {state} | `{label}` | " + " | ".join(map(str, row)) + " |")
    total = [sum(counts[key] for counts in kinds.values()) for key in shown]
    return "\n".join([*lines, "| all | | " + " | ".join(map(str, total)) + " |"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    every = list(cases(Path(sys.argv[1])))
    print(as_table(every))
    for case in every:
        if case.read.startswith(("silent", "raw")) or case.verified.startswith("raw") or (
            case.verified == "nothing" and case.store not in ("stopped", "making")
        ):  # fmt: skip
            print(case, file=sys.stderr)
