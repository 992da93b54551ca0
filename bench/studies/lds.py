"""Which attribution predicts retraining?  Linear datamodeling scores on scikit-learn's digits.

    python -m bench.studies.lds --out docs/lds.md

A small MLP is trained on 400 digits with each of several seeds, and retrained on random halves of them. Every
attribution (training samples x queries, of the networks trained on all 400, averaged over the seeds) predicts the query
losses of the retrained networks; the score is Spearman's correlation over the halves, averaged over queries. Nothing is
tuned: influence functions are damped by the kernel's own localization / n_beta, and by 0.01 beside.
A JSON record goes to bench/results/.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lossk
from bench.machine import deliver, described, environment
from bench.markdown import table
from lossk.analysis import baselines, influence_functions
from lossk.analysis.evaluate import linear_datamodeling_score, random_subsets, retrain_on_subsets
from lossk.recipes import train_classifier

Data = tuple[Tensor, Tensor]
DAMPINGS = (1e-2,)  # nats per squared weight


def digits(num_train: int, num_query: int, seed: int) -> tuple[Data, Data]:
    """Disjoint training and query samples, stratified; inputs [n, 64] in [0, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(
        torch.from_numpy(x).float() / 16.0, torch.from_numpy(y).long(), train_size=num_train, test_size=num_query,
        stratify=y, random_state=seed,
    )  # fmt: skip
    return (parts[0], parts[2]), (parts[1], parts[3])


def trained(data: Data, options: argparse.Namespace, seed: int) -> nn.Module:
    """64 -> hidden -> 10, by the recipes' AdamW."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, options.hidden), nn.ReLU(), nn.Linear(options.hidden, 10))
    train_classifier(model, *data, epochs=options.epochs, batch_size=100, lr=2e-2, weight_decay=0.5, seed=seed)
    return model


def losses_of(model: nn.Module, data: Data) -> Tensor:
    with torch.inference_mode():
        return nn.functional.cross_entropy(model(data[0]).double(), data[1], reduction="none")


def attributions(model: nn.Module, train: Data, query: Data, options: argparse.Namespace, seed: int) -> Any:
    """({name: helpfulness [n, q]}, {name: processor seconds}, facts of the kernel's run)."""
    sets = lossk.ProbeSets(train=train, query=query)
    found: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}

    def note(name: str, began: float, block: Tensor) -> None:
        found[name], seconds[name] = block, time.process_time() - began

    began = time.process_time()
    cross = lossk.cross_kernel(
        model, train, query, sampler=lossk.BAOAB(), num_chains=options.num_chains, num_draws=options.num_draws,
        seed=seed, progress=False,
    )  # fmt: skip
    note("loss kernel K (= -BIF)", began, cross[:])
    found["loss kernel, correlation R"] = cross.correlation()
    sampler = cross.meta["sampler"]
    matched = sampler["localization"] / sampler["n_beta"]
    for damping, label in ((matched, "the kernel's localization / n_beta"), *((d, f"{d:g}") for d in DAMPINGS)):
        began = time.process_time()
        base = influence_functions.damped_influence(model, sets, train=train, damping=damping)
        name = f"influence functions (Gauss-Newton), damping {label}"
        note(name, began, base[base.sets["train"], base.sets["query"]])
    began = time.process_time()
    cosine = baselines.gradient_cosine(model, sets, dimensions=None)
    note("gradient cosine", began, cosine.correlation(cosine.sets["train"], cosine.sets["query"]))
    found["gradient product"] = cosine[cosine.sets["train"], cosine.sets["query"]]
    for base in (baselines.penultimate_features(model, sets), baselines.raw_inputs(sets)):
        found[f"{base.name}, cosine"] = base.correlation(base.sets["train"], base.sets["query"])
    assert cross.diagnostics is not None
    facts = {"verdict": cross.diagnostics.verdict, "n_beta": sampler["n_beta"], "localization": sampler["localization"]}
    return found, seconds, facts


def measure(options: argparse.Namespace) -> dict[str, Any]:
    train, query = digits(options.num_train, options.num_query, 0)
    seeds = range(options.seeds)
    masks = random_subsets(options.num_train, options.subsets, seed=1)
    began = time.process_time()
    by_seed = [
        retrain_on_subsets(
            lambda rows, seed: losses_of(trained((train[0][rows], train[1][rows]), options, seed), query),
            masks,
            seeds=[seed],
        )
        for seed in seeds
    ]
    outcomes = torch.stack(by_seed).mean(dim=0)
    retraining = time.process_time() - began
    sums: dict[str, Tensor] = {}
    times: dict[str, float] = {}
    facts, accuracies = [], []
    for seed in seeds:
        model = trained(train, options, seed)
        accuracies.append(float((model(query[0]).argmax(dim=1) == query[1]).double().mean()))
        found, seconds, fact = attributions(model, train, query, options, seed)
        facts.append(fact)
        for name, block in found.items():
            sums[name] = sums.get(name, torch.zeros(block.shape, dtype=torch.float64)) + block.double()
        for name, value in seconds.items():
            times[name] = times.get(name, 0.0) + value
    scores = {}
    for name, block in sums.items():
        score = linear_datamodeling_score(block, masks, outcomes)
        scores[name] = {"lds": score.mean, "error": score.standard_error, "seconds": times.get(name)}
    return {"scores": scores, "ceiling": ceiling(by_seed), "facts": facts, "accuracy": accuracies,
            "retraining_seconds": retraining}  # fmt: skip


def ceiling(by_seed: list[Tensor]) -> float | None:
    """What a perfect prediction could reach: the square root of the outcomes' reliability.

    Half of the seeds against the other half, over the subsets, Spearman-Brown corrected to all seeds.
    """
    if len(by_seed) < 2:
        return None
    half = len(by_seed) // 2
    a, b = (torch.stack(part).mean(dim=0) for part in (by_seed[:half], by_seed[half : 2 * half]))
    # A diagonal "attribution": subset s predicts the outcome of subset s alone.
    eye = ~torch.eye(len(a), dtype=torch.bool)
    r = linear_datamodeling_score(a, eye, b).mean
    return max(2 * r / (1 + r), 0.0) ** 0.5


def page(record: dict[str, Any]) -> str:
    found, options = record["found"], record["options"]
    order = sorted(found["scores"], key=lambda name: -found["scores"][name]["lds"])
    rows = []
    for name in order:
        score = found["scores"][name]
        seconds = "" if score["seconds"] is None else f"{score['seconds']:.1f} s"
        rows.append([name, f"{score['lds']:.3f} ± {score['error']:.3f}", seconds])
    top = "" if found["ceiling"] is None else (
        f" The outcomes' own noise lets a perfect prediction reach about {found['ceiling']:.2f}."
    )  # fmt: skip
    laws = "; ".join(
        f"n_beta {fact['n_beta']:.0f}, localization {fact['localization']:.3g}: {fact['verdict']}"
        for fact in found["facts"]
    )
    accuracy = ", ".join(f"{value:.1%}" for value in found["accuracy"])
    return "\n".join([
        "# Linear datamodeling score on digits",
        "",
        f"`python -m bench.studies.lds --out docs/lds.md`: an MLP 64-{options['hidden']}-10 trained on "
        f"{options['num_train']} digits with {options['seeds']} seeds "
        f"(accuracy on {options['num_query']} other digits, the queries: "
        f"{accuracy}), and retrained on {options['subsets']} random halves with the same seeds, whose query losses are "
        "averaged. Each attribution is averaged over the networks trained on all samples. Spearman's correlation over "
        "the halves between the sum of a half's attributions and the query's loss (sign such that right is positive), "
        f"mean over queries ± bootstrap standard error over halves and queries, best first.{top}",
        "",
        table(["attribution", "LDS", "processor time"], rows),
        "",
        f"Kernels of {options['num_chains']} chains x {options['num_draws']} draws of `lossk.BAOAB()` ({laws}). "
        f"Retraining took {found['retraining_seconds']:.0f} processor seconds. One thread.",
        "",
        f"{described(record['environment']['versions'])}; git {record['environment']['git_sha']}.",
    ]) + "\n"  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the page (Markdown); default: printed")
    parser.add_argument("--record", type=Path, help="JSON; default: bench/results/lds.json with --out")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--subsets", type=int, default=60)
    parser.add_argument("--num-train", type=int, default=400)
    parser.add_argument("--num-query", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--num-chains", type=int, default=4)
    parser.add_argument("--num-draws", type=int, default=150)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record: dict[str, Any] = {"environment": environment(1), "options": {**vars(options), "out": None, "record": None}}
    record["found"] = measure(options)
    deliver(page(record), record, "lds", out=options.out, target=options.record)


if __name__ == "__main__":
    main()
