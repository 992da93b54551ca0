"""Who finds wrong labels?  Scores of the loss kernel beside loss, features and gradients, on Fashion-MNIST.

    python -m bench.studies.mislabels --out docs/mislabels.md

For each seed a random subset of the training images gets 5 % wrong labels (another class, uniformly), the recipe's CNN
is trained on it, and every score ranks the training images; AUROC of finding the wrong ones, mean and standard error
over seeds. No score sees which labels are wrong, and none is tuned. A JSON record goes to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lossk
from bench.machine import deliver, described, environment
from bench.markdown import table
from lossk.analysis import baselines
from lossk.analysis.attribution import class_scores, mislabel_scores
from lossk.analysis.evaluate import auroc
from lossk.recipes import predict, train_classifier
from lossk.recipes.fashion import DEBIAN_FOLDER, fashion_cnn, read_fashion

NAMES = {
    "kernel mean_loss": "loss kernel: mean loss over the draws",
    "kernel self_influence": "loss kernel: self-influence K_ii",
    "kernel class_correlation": "loss kernel: correlation with its own class",
    "kernel class_margin": "loss kernel: correlation with another class less its own",
    "loss": "loss at w*",
    "gradient norm": "gradient norm at w*",
    "gradient class_correlation": "gradient cosine with its own class",
    "gradient class_margin": "gradient cosine with another class less its own",
    "feature kNN": "feature kNN (penultimate, cosine, k = 10)",
}


def noisy_labels(labels: Tensor, rate: float, rng: np.random.Generator, num_classes: int = 10) -> tuple[Tensor, Tensor]:
    """(labels with round(rate N) of them moved to another class, which are wrong [N] bool)."""
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[torch.from_numpy(rng.choice(len(labels), round(rate * len(labels)), replace=False))] = True
    shift = torch.from_numpy(rng.integers(1, num_classes, len(labels)))
    return torch.where(wrong, (labels + shift) % num_classes, labels), wrong


def trained_cnn(inputs: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = fashion_cnn()
    train_classifier(model, inputs, labels, epochs=epochs, batch_size=128, lr=1e-2, weight_decay=0.05, seed=seed)
    return model


def scores_of(model: nn.Module, data: tuple[Tensor, Tensor], options: argparse.Namespace, seed: int) -> Any:
    """(every score [N], verdict of the kernel's run)."""
    traces = lossk.sample_losses(
        model, data, sampler=lossk.BAOAB(), num_chains=options.num_chains, num_draws=options.num_draws, seed=seed,
        progress=False,
    )  # fmt: skip
    kernel = lossk.LossKernel.from_traces(traces)
    scores = {f"kernel {name}": score for name, score in mislabel_scores(kernel, data[1]).items()}
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in data[0].split(1000)])
        scores["loss"] = nn.functional.cross_entropy(logits.double(), data[1], reduction="none")
    cosine = baselines.gradient_cosine(model, data, seed=seed)
    scores["gradient norm"] = cosine.variance.sqrt()  # within 2 %, from the sketch: a second pass is spared
    scores |= {f"gradient {name}": score for name, score in class_scores(cosine, data[1]).items()}
    scores["feature kNN"] = baselines.knn_disagreement(baselines.penultimate_features(model, data), data[1])
    assert kernel.diagnostics is not None
    return scores, kernel.diagnostics.verdict


def one_seed(seed: int, data: tuple[Tensor, ...], options: argparse.Namespace) -> dict[str, Any]:
    began = time.process_time()
    inputs, labels, test_inputs, test_labels = data
    noise, draw = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    rows = torch.from_numpy(draw.choice(len(labels), options.num_train, replace=False))
    given, wrong = noisy_labels(labels[rows], options.rate, noise)
    model = trained_cnn(inputs[rows], given, options.epochs, seed)
    trained = time.process_time() - began
    guesses = predict(model, inputs[rows])
    scores, verdict = scores_of(model, (inputs[rows], given), options, seed)
    return {
        "seed": seed,
        "auroc": {name: auroc(score, wrong)[0] for name, score in scores.items()},
        "test accuracy": float((predict(model, test_inputs) == test_labels).double().mean()),
        "fits the wrong labels": float((guesses == given)[wrong].double().mean()),
        "verdict": verdict,
        "seconds": {"training": trained, "all": time.process_time() - began},
    }


def spread(values: np.ndarray) -> str:
    """Mean ± standard error."""
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{error}"


def page(record: dict[str, Any]) -> str:
    runs, options = record["runs"], record["options"]
    by_name = {name: np.array([run["auroc"][name] for run in runs]) for name in NAMES}
    order = sorted(by_name, key=lambda name: -by_name[name].mean())

    rows = [[NAMES[name], spread(by_name[name]), *(f"{value:.3f}" for value in by_name[name])] for name in order]
    accuracy, fitted = (np.array([run[key] for run in runs]) for key in ("test accuracy", "fits the wrong labels"))
    seconds = sum(run["seconds"]["all"] for run in runs)
    return "\n".join([
        "# Finding wrong labels on Fashion-MNIST",
        "",
        f"`python -m bench.studies.mislabels --out docs/mislabels.md`: {options['num_train']:,} training images, "
        f"{options['rate']:.0%} of their labels moved to another class at random, the recipe's CNN trained for "
        f"{options['epochs']} epochs, {len(runs)} seeds (images, noise, weights and chains all anew). The kernel is of "
        f"the training images with the labels they were given, {options['num_chains']} chains x {options['num_draws']} "
        "draws of `lossk.BAOAB()`; gradients are sketched in 2,048 dimensions. AUROC of ranking the wrong labels "
        "first: 1 is perfect, 0.5 is chance. Mean ± standard error over seeds, best first.",
        "",
        table(["score", "AUROC", *(f"seed {run['seed']}" for run in runs)], rows),
        "",
        f"Test accuracy {spread(accuracy)}; the networks fit {spread(fitted)} of the wrong labels. Verdicts of the "
        f"runs: {', '.join(run['verdict'] for run in runs)}. {seconds:.0f} processor seconds in all, one thread.",
        "",
        f"{described(record['environment']['versions'])}; git {record['environment']['git_sha']}.",
    ]) + "\n"  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the page (Markdown); default: printed")
    parser.add_argument("--record", type=Path, default=None, help="JSON; default: bench/results/ with --out")
    parser.add_argument("--data", default=DEBIAN_FOLDER, help="folder with the IDX files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-train", type=int, default=5000)
    parser.add_argument("--num-test", type=int, default=2000, help="test images for the accuracy")
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--num-chains", type=int, default=4)
    parser.add_argument("--num-draws", type=int, default=25)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    train_images, train_labels, images, labels = read_fashion(options.data)
    mean, std = train_images.mean(), train_images.std()
    inputs, test_inputs = (((part - mean) / std).unsqueeze(1) for part in (train_images, images))
    data = (inputs, train_labels, test_inputs[: options.num_test], labels[: options.num_test])
    record: dict[str, Any] = {"environment": environment(1), "options": {**vars(options), "out": None, "record": None}}
    record["runs"] = []
    for seed in range(options.seeds):
        record["runs"].append(one_seed(seed, data, options))
        print(json.dumps(record["runs"][-1]), flush=True)
    deliver(page(record), record, "mislabels", out=options.out, target=options.record)


if __name__ == "__main__":
    main()
