"""The multitask recipe: every input once, both tasks' answers right, generalisation demanded of each task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lossk
from lossk.data.reading import read_samples
from lossk.recipes import RecipeError, RecipeTask, multitask, predict
from lossk.recipes.arithmetic import COEFFICIENTS, Disjoint, OneNetwork, SharedTrunk, arithmetic


@pytest.fixture(scope="module")
def task() -> RecipeTask:
    """p = 11 is too few pairs to generalise from in seconds; the accuracy asked for is what chance does not reach."""
    return multitask.make_task(p=11, train_share=0.9, epochs=400, required_accuracy=0.25)


def test_every_input_is_there_once_with_its_answer() -> None:
    p = 7
    inputs, targets, tasks, num_train = arithmetic(p, 0.75, seed=3)
    a, b, token = inputs[:, :p].argmax(dim=1), inputs[:, p : 2 * p].argmax(dim=1), inputs[:, 2 * p :].argmax(dim=1)
    assert inputs.shape == (98, 16)
    assert torch.equal(inputs.sum(dim=1), torch.full((98,), 3.0))  # three ones each
    assert torch.equal(token, tasks)
    assert sorted(zip(tasks.tolist(), a.tolist(), b.tolist(), strict=True)) == [
        (t, i, j) for t in (0, 1) for i in range(p) for j in range(p)
    ]
    for t, i, j, answer in zip(tasks.tolist(), a.tolist(), b.tolist(), targets.tolist(), strict=True):
        assert answer == (i + j if t == 0 else i - j) % p
    assert num_train == 2 * 37
    assert torch.bincount(tasks[:num_train]).tolist() == [37, 37]
    assert not torch.equal(pairs_of(inputs, tasks, 0), pairs_of(inputs, tasks, 1))  # each task has a split of its own
    assert not torch.equal(inputs, arithmetic(p, 0.75, seed=4)[0])


def pairs_of(inputs: torch.Tensor, tasks: torch.Tensor, task: int) -> torch.Tensor:
    return inputs[tasks == task][:, :14]


def test_the_task_is_consistent(task: RecipeTask) -> None:
    samples = read_samples(task.samples, "samples")
    inputs, targets = samples.tree
    assert len(samples) == 242
    assert task.labels is not None
    assert task.held_out is not None
    assert torch.equal(task.labels, inputs[:, 22:].argmax(dim=1))  # the label is the task, not the target
    assert list(task.class_names) == ["a + b", "a - b"]
    assert task.images is None
    num_train = len(task.train[1])
    assert torch.equal(task.held_out, torch.arange(242) >= num_train)
    assert torch.equal(task.train[0], inputs[:num_train])
    assert torch.equal(task.train[1], targets[:num_train])
    assert not any(module.training for module in task.model.modules())
    right = (predict(task.model, inputs) == targets)[task.held_out]
    assert task.held_out_accuracy == pytest.approx(right.double().mean().item())
    assert right.double().mean() >= 0.25


def test_the_same_seed_trains_the_same_network_and_leaves_the_callers_generator_alone() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (multitask.make_task(p=5, epochs=8, required_accuracy=0.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(one.model.parameters(), same.model.parameters(), strict=True))
    assert not torch.equal(next(one.model.parameters()), next(other.model.parameters()))


def test_a_checkpoint_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    first = multitask.make_task(p=5, epochs=8, required_accuracy=0.0, checkpoint=path)
    again = multitask.make_task(p=5, epochs=0, required_accuracy=0.0, checkpoint=path)  # nothing left to train
    assert all(torch.equal(x, y) for x, y in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_a_network_that_knows_one_task_only_is_refused(tmp_path: Path) -> None:
    """One hidden unit for each of the 50 inputs, and a table of answers behind them: here a + b, whatever the task."""
    p, path = 5, tmp_path / "weights.pt"
    state = multitask.make_task(p=p, epochs=0, required_accuracy=0.0).model.state_dict()
    for values in state.values():
        values.zero_()
    for unit, (a, b, task) in enumerate((a, b, task) for a in range(p) for b in range(p) for task in (0, 1)):
        state["pairs.weight"][unit, [a, p + b]] = 1.0
        state["token.weight"][unit, task] = 1 / 3  # three times as loud
        state["pairs.bias"][unit] = -2.0
        state["head.weight"][(a + b) % p, unit] = 1.0
    torch.save(state, path)
    with pytest.raises(RecipeError, match=r"multitask, a - b: held-out accuracy is \d+\.\d\d%, below the 99%"):
        multitask.make_task(p=p, checkpoint=path)


def test_the_default_network_generalises_in_half_its_epochs() -> None:
    task = multitask.make_task(epochs=500, required_accuracy=0.9)
    assert task.held_out is not None
    assert task.held_out_accuracy is not None
    assert int(task.held_out.sum()) == 212
    assert task.held_out_accuracy >= 0.9
    with torch.inference_mode():  # losses that are all nothing would say nothing
        losses = torch.nn.functional.cross_entropy(task.model(task.train[0]), task.train[1], reduction="none")
    assert float(losses.median()) > 1e-3


def test_four_tasks_have_their_own_answers() -> None:
    p = 5
    inputs, targets, tasks, num_train = arithmetic(p, 0.6, seed=0, num_tasks=4)
    a, b = inputs[:, :p].argmax(dim=1), inputs[:, p : 2 * p].argmax(dim=1)
    assert num_train == 60
    assert torch.bincount(tasks[:num_train]).tolist() == [15] * 4
    for task, (of_a, of_b) in enumerate(COEFFICIENTS):
        own = tasks == task
        assert torch.equal(targets[own], (of_a * a[own] + of_b * b[own]) % p)


def test_random_answers_are_memorised_and_no_more() -> None:
    task = multitask.make_task(p=7, answers="random", epochs=200)
    assert torch.equal(predict(task.model, task.train[0]), task.train[1])
    assert task.held_out_accuracy is not None
    assert task.held_out_accuracy < 0.5
    with pytest.raises(RecipeError, match=r"only \d+\.\d\d% of the answers were memorised; raise epochs"):
        multitask.make_task(p=7, answers="random", epochs=1)


@pytest.mark.parametrize("network", multitask.NETWORKS)
def test_each_network_takes_the_token_only_as_it_says(network: str) -> None:
    inputs = arithmetic(5, 0.6, seed=0)[0]
    model = multitask.make_network(network, 5, 2, 8, 3.0, seed=0)
    out = model(inputs)
    assert out.shape == (50, 5)
    pair, token = inputs[:1, :10], torch.eye(2)
    one, other = (torch.cat([pair, token[[task]]], dim=1) for task in (0, 1))
    if isinstance(model, SharedTrunk):
        hidden = model.pairs(pair).relu()
        torch.testing.assert_close(model(other), model.heads(hidden)[:, 5:])
    elif isinstance(model, Disjoint):
        torch.testing.assert_close(model(other), model.networks[1](pair))
    else:
        assert isinstance(model, OneNetwork)
        both = model.pairs(pair) + 3.0 * model.token.weight[:, [0]].T
        torch.testing.assert_close(model(one), model.head(both.relu()))


def test_disjoint_networks_show_no_correlation_across_tasks_beyond_chance() -> None:
    """T6 of the theory: full gradients, so that no minibatch couples them. Their own law is sampled independently."""
    task = multitask.make_task(p=5, network="disjoint", hidden=16, epochs=60, required_accuracy=0.0)
    sampler = lossk.SGLD(
        lr=2e-3, n_beta=10.0, localization=100.0, batch_size=None, num_burnin_steps=20, num_steps_bw_draws=10,
        control_variate=False,
    )  # fmt: skip
    kernel = lossk.build_kernel(
        task.model, task.samples, train=task.train, sampler=sampler, num_chains=4, num_draws=100, progress=False
    )
    assert task.labels is not None
    first, second = (task.labels == 0).nonzero().squeeze(1), (task.labels == 1).nonzero().squeeze(1)
    # Entries are not independent: a task's R of participation ratio m = n^2 / sum R^2 has about m independent losses.
    modes = [float(len(rows) ** 2 / kernel.correlation(rows, rows).double().square().sum()) for rows in (first, second)]
    across = kernel.correlation(first, second) / kernel.standard_error(first, second, correlation=True)
    share = float((across.abs() > 1.96).double().mean())
    assert share < 0.05 + 3 * (0.05 * 0.95 / (modes[0] * modes[1])) ** 0.5
    within = kernel.correlation(first, first) / kernel.standard_error(first, first, correlation=True)
    within.fill_diagonal_(0)
    assert float((within.abs() > 1.96).double().mean()) > 0.3
    assert modes[0] * modes[1] > 8  # or the bound above would not say much


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1}, "p must be at least 2, got 1"),
        ({"num_tasks": 5}, "num_tasks must be from 2 to 4, got 5"),
        ({"network": "two"}, r"network must be one of \['one', 'trunk', 'disjoint'\], got 'two'"),
        ({"answers": "none"}, r"answers must be one of \['rules', 'random'\], got 'none'"),
        ({"loudness": 0.0}, "loudness must be finite and greater than 0, got 0.0"),
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"p": 3, "train_share": 0.99}, "train_share must leave training and held-out inputs of each task, got 0.99"),
        ({"p": 3, "train_share": 0.01}, "train_share must leave training and held-out inputs of each task, got 0.01"),
        ({"plain_share": -0.1}, "plain_share must be finite and at least 0, got -0.1"),
        ({"plain_share": 1.5}, "plain_share must be at most 1, got 1.5"),
        ({"train_share": 0.0}, "train_share must be finite and greater than 0, got 0.0"),
    ],
)
def test_bad_arguments_are_refused_before_training(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multitask.make_task(**arguments)
