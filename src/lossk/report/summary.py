"""The printed story of a kernel."""

from __future__ import annotations

import torch

from lossk.analysis.purity import chance_purity, class_purity, raw_neighbors
from lossk.available import gigabytes
from lossk.kernel.kernel import LossKernel
from lossk.kernel.neighbors import Neighbors
from lossk.recipes import RecipeTask, predict
from lossk.timings import duration

K = 10


def describe(kernel: LossKernel) -> str:
    """What a kernel is and how much to trust it."""
    lines = [repr(kernel)]
    if kernel.diagnostics is not None:
        lines.append(str(kernel.diagnostics))
    seconds = kernel.meta.get("timings", {})
    if seconds:
        stages = ("anchor", "fit", "pilot", "gradient", "step", "probe", "update", "store", "wait")
        split = ", ".join(f"{stage} {_span(seconds[stage])}" for stage in stages if stage in seconds)
        lines.append(f"time         {duration(seconds['total'])}: {split}")
    if "peak_rss_bytes" in kernel.meta:
        lines.append(f"peak memory  {gigabytes(kernel.meta['peak_rss_bytes'])} (whole process)")
    return "\n".join(lines)


def _span(seconds: float) -> str:
    """Of a stage: tenths below 10 s, else as people say it."""
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def describe_neighbors(kernel: LossKernel, task: RecipeTask, neighbors: Neighbors) -> str:
    """Purity of the neighbors beside chance and raw inputs, and the samples of largest variance."""
    lines = []
    inputs = task.samples[0] if isinstance(task.samples, tuple) else None  # other forms need not be classifiable
    # Labels need not be what the network is asked for: a network of several tasks is colored by task.
    are_targets = task.labels is not None and inputs is not None and torch.equal(task.samples[1], task.labels)
    floor = neighbors.noise_floor.unsqueeze(1)
    above = float(((neighbors.correlation > floor) & (neighbors.index >= 0)).float().mean())
    k = neighbors.index.shape[1]
    if task.labels is not None:
        purity, chance = class_purity(neighbors.index, task.labels), chance_purity(task.labels)
        lines.append(f"Of each sample's {k} nearest neighbors, these show the same {task.label_word}:")
        lines.append(f"  loss kernel  {purity:7.2%}")
        if task.images is not None:
            raw = class_purity(raw_neighbors(task.images, k), task.labels)
            lines.append(f"  raw pixels   {raw:7.2%}")
            if purity < raw:
                lines.append("  (raw pixels do better here: this kernel adds nothing to them on this measure)")
        lines.append(f"  chance       {chance:7.2%}")
        if are_targets:
            lines.append("  The losses are computed with the true labels, so the kernel knows them: this says that the")
            lines.append("  probe resolves the classes, not that it would classify.")
    lines.append(f"Neighbors above the noise floor: {above:.1%} (unrelated samples: about {1 / k:.0%})")
    lines.append("Largest self-covariance (losses that move most when the weights are jiggled):")
    predicted = None
    if are_targets and inputs is not None:
        predicted = predict(task.model, inputs, transform=task.transform)
    for i in torch.argsort(kernel.variance, descending=True)[:5].tolist():
        text = f"  sample {i:5d}  loss {float(kernel.mean_loss[i]):7.3f}  std {float(kernel.variance[i]) ** 0.5:6.3f}"
        if task.labels is not None and predicted is not None:
            label, guess = int(task.labels[i]), int(predicted[i])
            verdict = "right" if label == guess else f"predicted {task.class_names[guess]}"
            if task.held_out is not None:
                verdict += ", held out" if bool(task.held_out[i]) else ", trained on"
            text += f"  label {task.class_names[label]} ({verdict})"
        lines.append(text)
    return "\n".join(lines)
