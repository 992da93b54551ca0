"""Sampling the last block of models that do not trace, with and without what frozen modules give; and data in files.

python -m bench.late_blocks [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lossk
from bench.markdown import spread, table
from bench.options import Found, Options, run_alone
from bench.turns import Turn, column, quantiles, ratio, take_turns

KEPT, WHOLE = "frozen modules once", "whole passes"
MEMORY, FILES = "in memory", "in files"
WORDS = 1000


class Blocks(nn.Module):
    """Blocks called with keywords, between what reads the inputs and a head; it cannot be traced."""

    def __init__(self, read: nn.Module, width: int, depth: int, classes: int, *, causal: bool) -> None:
        super().__init__()
        self.read, self.causal = read, causal
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True) for _ in range(depth)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
        for block in self.blocks:
            x = block(src=x, src_mask=mask)
        if bool(x.isnan().any()):
            raise ValueError("NaN")
        return self.head(x if self.causal else x.mean(1))


class Patches(nn.Sequential):
    """[B, 3, H, W] -> [B, T, width]."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Conv2d(3, width, 8, 8), nn.Flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


def losses(model: nn.Module, batch: Any) -> Any:
    """Of a class, or of each next token."""
    logits, targets = model(batch[0]), batch[1]
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets, reduction="none")
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"), targets >= 0


def cases(options: Options) -> dict[str, tuple[nn.Module, tuple[Tensor, Tensor]]]:
    """Models and their data, by name."""
    width, depth, count = options.pick(full=(192, 12, 64), quick=(96, 6, 64), tiny=(16, 2, 12))
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(0, WORDS, (count, 32), generator=numbers, device="cpu")
    images = torch.rand(count, 3, 32, 32, generator=numbers, device="cpu")
    classes = torch.arange(count, device="cpu") % 10
    torch.manual_seed(0)
    words, patches = (lambda: nn.Embedding(WORDS, width)), (lambda: Patches(width))
    return {
        "decoder": (Blocks(words(), width, depth, WORDS, causal=True), (ids, ids.roll(-1, 1))),
        "encoder": (Blocks(words(), width, depth, 10, causal=False), (ids, classes)),
        "vision transformer": (Blocks(patches(), width, depth, 10, causal=False), (images, classes)),
    }


def measure(options: Options) -> Found:
    found = {name: measure_blocks(*case, options) for name, case in cases(options).items()}
    return {"blocks": found, "files": measure_files(options)}


def measure_blocks(model: nn.Module, data: tuple[Tensor, Tensor], options: Options) -> Found:
    """Passes of a build whose last block is sampled."""
    last = f"blocks.{len(model.blocks) - 1}.*"  # type: ignore[arg-type]
    said: dict[str, Any] = {}

    def build(name: str) -> lossk.LossKernel:
        sampler = sgld(32, params=[last])
        passes = lossk.Passes(frozen_prefix=name == KEPT)
        kernel = built(model, data, options, loss=losses, sampler=sampler, passes=passes)
        said[name] = [line for line in kernel.meta["passes_reasons"] if line.startswith("frozen")]
        return kernel

    times = in_turns(dict.fromkeys((KEPT, WHOLE), build), options)
    weights = sum(p.numel() for p in model.parameters())
    return {"weights": weights, "said": said[KEPT], "ratio": ratio(times[WHOLE], times[KEPT]), **seconds(times)}


def measure_files(options: Options) -> Found:
    """Passes of a build over vectors that cost nothing to read: the most that files can cost."""
    count = options.pick(full=40_000, quick=4_000, tiny=64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1000, 64), nn.ReLU(), nn.Linear(64, 10))
    rows = torch.rand(count, 1000, generator=torch.Generator().manual_seed(0), device="cpu")
    loader: Any = DataLoader([(row, i % 10) for i, row in enumerate(rows)], 256)  # type: ignore[arg-type]
    places = {MEMORY: "memory", FILES: "spool"}

    def build(name: str) -> lossk.LossKernel:
        return built(model, loader, options, sampler=sgld(256), passes=lossk.Passes(), data=places[name], form="factor")

    times = in_turns(dict.fromkeys(places, build), options)
    return {"ratio": ratio(times[FILES], times[MEMORY]), "bytes": rows.nbytes, **seconds(times)}


def sgld(batch_size: int, params: list[str] | None = None) -> lossk.SGLD:
    return lossk.SGLD(
        lr=1e-6, n_beta=5.0, localization=1.0, batch_size=batch_size, num_burnin_steps=0, num_steps_bw_draws=4,
        params=params,
    )  # fmt: skip


def built(model: nn.Module, samples: Any, options: Options, **settings: Any) -> lossk.LossKernel:
    num_draws = options.pick(full=6, quick=3, tiny=2)
    return lossk.build_kernel(model, samples, num_chains=1, num_draws=num_draws, tile=512, progress=False, **settings)


def in_turns(builds: dict[str, Callable[[str], lossk.LossKernel]], options: Options) -> dict[str, list[float]]:
    """Seconds of each one's gradient and probe passes, all else left out."""

    def turn(name: str) -> Callable[[], Turn]:
        def run() -> Turn:
            timings = builds[name](name).meta["timings"]
            return {"seconds": timings["gradient"] + timings["probe"]}

        return run

    turns = take_turns({name: turn(name) for name in builds}, options.pick(full=3, quick=2, tiny=1))
    return {name: column(found) for name, found in turns.items()}


def seconds(times: dict[str, list[float]]) -> Found:
    return {"seconds": {name: quantiles(each) for name, each in times.items()}}


def section(found: Found) -> str:
    rows = []
    for name, each in found["blocks"].items():
        times = (spread(each["seconds"][key], "s") for key in (WHOLE, KEPT))
        rows.append([name, f"{each['weights']:,}", *times, spread(each["ratio"])])
    files, size = found["files"], f"{found['files']['bytes'] / 1e6:.0f} MB"
    return "\n\n".join(
        [
            "## The last block of models that do not trace",
            table(["model", "weights", WHOLE, KEPT, "ratio"], rows),
            f"Passes over {size} of vectors in files, over those in memory: {spread(files['ratio'])}.",
        ]
    )


if __name__ == "__main__":
    run_alone(measure, section, __doc__)
