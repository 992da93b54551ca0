"""The command line: a thin shell over the library."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import lossk
from lossk import provenance
from lossk.analysis.purity import chance_purity, class_purity
from lossk.cli import attribution, insight, stores, tune
from lossk.cli import report as cli_report
from lossk.cli.checkpoints import checkpoint_outputs, show_checkpoints
from lossk.cli.config import RunConfig, load_config, parse_override
from lossk.cli.options import Parser, folder, store_path
from lossk.cli.ranks import build_at, follow, share_threads
from lossk.cli.wordnet import show_wordnet, wordnet_picture
from lossk.disk.replacement import Replacement
from lossk.errors import LosskError
from lossk.kernel.kernel import LossKernel
from lossk.kernel.neighbors import Neighbors
from lossk.ranks.distributed import joined, rank_name
from lossk.ranks.world import World
from lossk.recipes import RecipeTask, packaged_names
from lossk.run.allocation import shortage_named


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Exit status: 0 done, 1 a store that fails `verify`, 2 a clear error (one line on stderr),
    130 interrupted."""
    options = argparse.Namespace(debug=False)
    try:
        options = build_parser().parse_args(arguments)
        with shortage_named():
            return options.run(options) or 0
    except KeyboardInterrupt:
        print("lossk: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, MemoryError, LosskError, ModuleNotFoundError) as error:
        if options.debug:
            raise
        print(f"lossk: {rank_name()}{' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lossk", description=lossk.__doc__.splitlines()[0] if lossk.__doc__ else None)
    parser.add_argument("--version", action="version", version=f"lossk {lossk.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train on real digits, build their kernel, draw it (about a minute)")
    demo.add_argument(
        "--out", type=folder, default=".", metavar="DIR", help="folder for demo.lossk, demo.yaml and demo.png"
    )
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo's files")
    demo.set_defaults(run=run_demo)

    run = commands.add_parser("run", help="run a recipe or a config file")
    run.add_argument("config", help=f"a YAML file, or a recipe: {', '.join(packaged_names())}")
    run.add_argument("--out", type=store_path, metavar="STORE", help="path of the store, instead of the config's")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. build.num_draws=50")
    group = run.add_mutually_exclusive_group()
    group.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote")
    group.add_argument("--resume", action="store_true", help="continue an interrupted run")
    run.set_defaults(run=run_config)

    tune.add_command(commands, packaged_names())

    stores.add_commands(commands)
    cli_report.add_command(commands)

    insight.add_commands(commands)

    attribution.add_command(commands)

    doctor = commands.add_parser("doctor", help="what is compiled, what passes its self-test, and why not")
    doctor.set_defaults(run=run_doctor)
    return parser


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


def run_doctor(options: argparse.Namespace) -> None:
    from lossk.ops.extension import status

    for package, version in provenance.versions().items():
        print(f"{package:12s} {version}")
    extension = status()
    if extension.available:
        print(f"backend cpp    ok: self-test passed, SIMD level {extension.simd}")
    else:
        print(f"backend cpp    not usable: {extension.reason}")
    print("backend torch  ok: the reference")
    devices = torch.cuda.device_count()
    for line in describe_triton(torch.device("cuda" if devices else "cpu")):
        print(f"backend triton {line}")
    print("backend cuda   not in this version: it has no CUDA C++ kernels, and backend='cuda' raises")
    print(f"CUDA devices   {devices}" + (f" ({torch.cuda.get_device_name(0)})" if devices else ""))
    print(f"torch threads  {torch.get_num_threads()}")


def describe_triton(device: torch.device) -> list[str]:
    """Each op's Triton kernel on `device`: passed, or why not; one line where the reason is the same for all."""
    from lossk.ops import triton_kernels

    found = {op: triton_kernels.status(op, device) for op in triton_kernels.OPS}
    reasons = {status.reason for status in found.values()}
    if len(reasons) == 1 and reasons != {""}:
        return [f"not usable: {reasons.pop()}"]
    how = "interpreted on the CPU" if next(iter(found.values())).interpreted else f"on {device}"
    return [
        f"{op:16s} {f'ok: self-test passed, {how}' if status.available else f'not usable: {status.reason}'}"
        for op, status in found.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
