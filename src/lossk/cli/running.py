"""`lossk demo` and `lossk run`: a config's task, its kernel, the printed story, the pictures, the replay."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import lossk
from lossk.analysis.purity import chance_purity, class_purity
from lossk.cli.checkpoints import checkpoint_outputs, show_checkpoints
from lossk.cli.config import RunConfig, load_config, parse_override
from lossk.cli.ranks import build_at, follow, share_threads
from lossk.cli.wordnet import show_wordnet, wordnet_picture
from lossk.disk.replacement import Replacement
from lossk.errors import LosskError
from lossk.kernel.kernel import LossKernel
from lossk.kernel.neighbors import Neighbors
from lossk.ranks.distributed import joined
from lossk.ranks.world import World
from lossk.recipes import RecipeTask


def run_demo(options: argparse.Namespace) -> None:
    folder = Path(options.out)
    require_plotting()
    config = load_config("digits", {"out": str(folder / "demo.lossk"), "picture": str(folder / "demo.png")})
    execute(config, overwrite=options.overwrite)


def run_config(options: argparse.Namespace) -> None:
    overrides = dict(parse_override(text) for text in options.set)
    if options.out is not None:
        overrides["out"] = options.out
        if "picture" not in overrides:
            overrides["picture"] = str(Path(options.out).with_suffix(".png"))
    config, source = load_config(options.config, overrides), Path(options.config)
    if options.out is not None and config.report is not None and "report" not in overrides:
        config = dataclasses.replace(config, report=str(Path(options.out).with_suffix(".html")))
    if overrides and source.exists() and source.resolve() == Path(config.out).with_suffix(".yaml").resolve():
        raise ValueError(f"a changed config would be written over {options.config!r} itself; give another --out")
    execute(config, source=source, overwrite=options.overwrite, resume=options.resume)


def execute(
    config: RunConfig, *, source: Path | None = None, overwrite: bool = False, resume: bool = False
) -> LossKernel:
    """Run a config: its task, its kernel, the printed story, the picture, and the config that replays it.

    A config that already lies where the replay goes (`source`) is the replay, and stays as it is.
    """
    threads = torch.get_num_threads()
    try:
        with joined(None) as world:
            share_threads(world, config.threads)
            if not world.first:
                return follow(world, config, resume=resume)
            return _execute(config, source, world, overwrite=overwrite, resume=resume)
    finally:
        torch.set_num_threads(threads)


def _execute(config: RunConfig, source: Path | None, world: World, *, overwrite: bool, resume: bool) -> LossKernel:
    from lossk.report.page import write_report
    from lossk.report.samples import samples_of, samples_path, write_samples
    from lossk.report.summary import K, describe, describe_neighbors

    out, replay = Path(config.out), Path(config.out).with_suffix(".yaml")
    picture = None if config.picture is None else Path(config.picture)
    report = None if config.report is None else Path(config.report)
    is_replay = source is not None and source.exists() and source.resolve() == replay.resolve()
    written = (out, replay, samples_path(out), picture, report)
    outputs = [path for path in written if path is not None and not (is_replay and path == replay)]
    begin = partial(_begin, config, outputs, overwrite=overwrite, resume=resume)
    begun = world.first_makes(begin)
    assert begun is not None
    task, place = begun
    replaces = place.beside  # the replay of the old store stays as long as that does
    new_replay = replay in outputs and (replaces or not (resume and replay.exists()))
    try:
        if new_replay and not replaces:
            replay.write_text(config.to_yaml())
        kernel = build_at(world.decide(lambda: str(place.path)), task, config, resume)
        world.decide(place.place)
    except BaseException:
        if new_replay and not replaces and not out.exists():  # do not stand in the way of the next attempt
            replay.unlink(missing_ok=True)
        raise
    finally:
        place.close()
    if replaces:
        kernel = lossk.open(out)
    if new_replay:
        replay.write_text(dataclasses.replace(config, passes=kernel.meta["passes"]).to_yaml())
    print(describe(kernel))
    neighbors = kernel.neighbors(min(K, kernel.num_samples - 1))
    print(describe_neighbors(kernel, task, neighbors))
    samples = samples_of(task, kernel.num_samples)
    if samples is not None:
        write_samples(samples, samples_path(out))
    if picture is not None and task.labels is not None:
        from lossk.report.picture import Pictured, draw_picture

        what = Pictured(task.labels, task.class_names, task.images, *captions(kernel, task, neighbors))
        draw_picture(kernel, what, picture, neighbors=neighbors)
    if report is not None:
        write_report(out, report, overwrite=True)
    if task.row_texts is not None:
        from lossk.report.contexts import describe_contexts, write_page

        print(describe_contexts(kernel, task.row_texts, neighbors))
        outputs.append(contexts_page(out))
        write_page(kernel, task.row_texts, neighbors, outputs[-1], title=captions(kernel, task, neighbors)[0])
    if task.checkpoints:
        outputs += show_checkpoints(kernel, task, config, out)
    if task.labels is not None and task.synsets is not None:
        outputs.append(show_wordnet(kernel, task.labels, task.class_names, task.synsets, neighbors, out))
    print("wrote " + ", ".join(str(path) for path in outputs if path.exists()))
    return kernel


def _begin(
    config: RunConfig, outputs: Sequence[Path], *, overwrite: bool, resume: bool
) -> tuple[RecipeTask, Replacement]:
    """Refuse to overwrite, and make the task; with where its store is made."""
    out = Path(config.out)
    taken = [str(path) for path in outputs if path.exists()]
    if taken and not (overwrite or resume):
        raise FileExistsError(f"{', '.join(taken)} exists; pass --overwrite to replace it, or another --out")
    place = Replacement(out, overwrite=overwrite)
    try:
        if place.beside and not (overwrite or resume):
            raise FileExistsError(f"{place.path} of a run that was cut off exists; pass --resume, or --overwrite")
        task = _make_task(config, outputs, again=overwrite or resume)
        place.begin()
    except BaseException:
        place.close()
        raise
    return task, place


def _make_task(config: RunConfig, outputs: Sequence[Path], *, again: bool) -> RecipeTask:
    """What a config says to run, once its outputs can be written; `again` over what is there."""
    if config.picture is not None:
        require_plotting()
    if config.report is not None:
        from lossk.report.page import require_packages

        require_packages()
    for path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    task = config.make_task()
    more = [path for path in of_task(task, Path(config.out)) if path.exists()]
    if more and not again:
        raise FileExistsError(f"{more[0]} exists; pass --overwrite to replace it, or another --out")
    print(task.notes)
    if task.held_out_accuracy is not None:
        print(f"held-out accuracy {task.held_out_accuracy:.2%}")
    return task


def of_task(task: RecipeTask, out: Path) -> list[Path]:
    """What a run writes besides, of a task that knows its texts, its checkpoints or its classes' synsets."""
    return [
        *([] if task.row_texts is None else [contexts_page(out)]),
        *(checkpoint_outputs(out) if task.checkpoints else ()),
        *([] if task.synsets is None else [wordnet_picture(out)]),
    ]


def contexts_page(out: Path) -> Path:
    """Where a run of a text recipe shows rows and their neighbors in context."""
    return out.with_suffix(".contexts.html")


def captions(kernel: LossKernel, task: RecipeTask, neighbors: Neighbors) -> tuple[str, str]:
    """Title and subtitle of the picture."""
    diagnostics = kernel.diagnostics
    title = task.notes.splitlines()[0] if task.notes else "Loss kernel"
    parts = [f"{kernel.num_samples:,} samples", f"{kernel.num_chains} chains x {kernel.num_draws} draws"]
    if task.held_out_accuracy is not None:
        parts.append(f"held-out accuracy {task.held_out_accuracy:.1%}")
    if task.labels is not None:
        purity, chance = class_purity(neighbors.index, task.labels), chance_purity(task.labels)
        parts.append(f"{purity:.1%} of {neighbors.index.shape[1]} neighbors in the same class (chance {chance:.1%})")
    if diagnostics is not None and diagnostics.llc is not None and diagnostics.rhat is not None:
        parts.append("no LLC: w* is no minimum" if diagnostics.no_minimum else f"LLC {diagnostics.llc:.1f}")
        parts.append(f"R-hat {diagnostics.rhat:.2f}")
        if diagnostics.reliability is not None:
            parts.append(f"reliability of R {diagnostics.reliability:.2f}")
        parts.append(f"verdict: {diagnostics.verdict}")
    return f"Loss kernel of {title}", "   |   ".join(parts)


def require_plotting() -> None:
    """A missing package is better known before the work than after it."""
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        names = " and ".join(missing)
        raise LosskError(
            f'the picture needs {names}: pip install "lossk[demo]" (or, with lossk run: --set picture=null)'
        )
