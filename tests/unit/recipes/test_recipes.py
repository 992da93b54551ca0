"""Recipes: the IDX reader, what is said of missing data, the networks' promises, and class purity."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from lossk.analysis.purity import chance_purity, class_purity, neighbor_purity, raw_neighbors
from lossk.recipes import RecipeError, RecipeTask, digits, fashion, packaged_config, packaged_names, require_accuracy
from lossk.recipes.idx import find_idx, read_idx


def idx_bytes(values: np.ndarray, code: int = 0x08) -> bytes:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, code, values.ndim, *values.shape)
    return header + values.astype(values.dtype.newbyteorder(">")).tobytes()


def write_fashion(folder: Path, num_train: int = 300, num_test: int = 60) -> Path:
    """A folder of IDX files in which the class is the row of a bright bar: learnable in an epoch or two."""
    rng = np.random.default_rng(0)
    for stem, count in (("train", num_train), ("t10k", num_test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 40, size=(count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 4 : 2 * label + 7, 4:24] = 255
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(("code", "dtype"), [(0x08, "u1"), (0x09, "i1"), (0x0B, "i2"), (0x0C, "i4"), (0x0E, "f8")])
def test_idx_round_trip(tmp_path: Path, compress: bool, code: int, dtype: str) -> None:
    values = np.arange(2 * 3 * 5).reshape(2, 3, 5).astype(dtype) - (0 if dtype == "u1" else 7)
    content = idx_bytes(values, code)
    path = tmp_path / "values"  # gzip is known by its content, whatever the name
    path.write_bytes(gzip.compress(content) if compress else content)
    found = read_idx(path)
    assert found.dtype == np.dtype(dtype)
    assert found.flags.writeable
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"\x89PNG" + content, "is not an IDX file"),
        (lambda content: b"", "is not an IDX file"),
        (lambda content: content[:2] + b"\x07" + content[3:], "is not an IDX file"),
        (lambda content: content[:9], "header needs 12 bytes, the file has 9"),
        (lambda content: content[:-1], "is truncated: shape"),
        (lambda content: content + b"\0", "is too long"),
        (lambda content: gzip.compress(content)[:-9], "truncated or damaged"),
        (lambda content: gzip.compress(content)[:12] + b"\xff" * 30, "truncated or damaged"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "values"
    path.write_bytes(damage(idx_bytes(np.ones((4, 6), dtype=np.uint8))))
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_plain_files_come_before_gzipped_ones(tmp_path: Path) -> None:
    assert find_idx(tmp_path, "a") is None
    (tmp_path / "a.gz").touch()
    assert find_idx(tmp_path, "a") == tmp_path / "a.gz"
    (tmp_path / "a").touch()
    assert find_idx(tmp_path, "a") == tmp_path / "a"


def test_fashion_says_what_is_missing_and_how_to_get_it(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(RecipeError, match=r"holds no t10k-labels-idx1-ubyte .* apt-get install dataset-fashion-mnist"):
        fashion.make_task(data=tmp_path)


def test_fashion_refuses_images_and_labels_that_do_not_match(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(299, dtype=np.uint8)))
    with pytest.raises(RecipeError, match=r"train must be images \[n, 28, 28\] with labels \[n\], got \[300, 28, 28\]"):
        fashion.make_task(data=tmp_path)


def test_fashion_trains_probes_the_test_images_and_keeps_a_checkpoint(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    weights = tmp_path / "weights.pt"
    task = fashion.make_task(data=tmp_path, epochs=12, num_probe=40, checkpoint=weights)
    assert_consistent(task, num_samples=40, num_train=300, least_accuracy=0.9)
    assert task.held_out is not None
    assert task.held_out.all()
    again = fashion.make_task(data=tmp_path, epochs=0, num_probe=40, checkpoint=weights)  # nothing left to train
    assert torch.equal(again.model(again.samples[0]), task.model(task.samples[0]))


def test_an_undertrained_network_is_an_error_with_its_accuracy() -> None:
    with pytest.raises(RecipeError, match=r"digits: held-out accuracy is \d+\.\d\d%, below the 97%"):
        digits.make_task(epochs=1, weight_decay=0.0, required_accuracy=0.97)


def test_a_network_that_answers_nan_does_not_pass() -> None:
    model = torch.nn.Linear(2, 3)
    with pytest.raises(RecipeError, match="held-out accuracy is nan"):
        require_accuracy(model, torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), at_least=0.0, what="empty")


def test_digits_keep_their_promise_and_are_reproducible() -> None:
    state = torch.random.get_rng_state()
    task = digits.make_task()
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's generator is left alone
    assert_consistent(task, num_samples=1797, num_train=1437, least_accuracy=0.97)
    assert task.held_out is not None
    assert int(task.held_out.sum()) == 360
    assert not task.held_out[:1437].any()
    assert task.labels is not None
    assert torch.bincount(task.labels[task.held_out]).min() >= 34  # stratified
    # Losses that are all nothing would say nothing.
    with torch.inference_mode():
        losses = torch.nn.functional.cross_entropy(task.model(task.samples[0]), task.samples[1], reduction="none")
    assert float(losses.median()) > 1e-4
    assert float(losses.quantile(0.9)) > 10 * float(losses.median())
    again = digits.make_task()
    for one, other in zip(task.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def assert_consistent(task: RecipeTask, *, num_samples: int, num_train: int, least_accuracy: float) -> None:
    inputs, targets = task.samples
    assert task.labels is not None
    assert task.images is not None
    assert len(inputs) == len(targets) == len(task.images) == num_samples
    assert torch.equal(targets, task.labels)
    assert len(task.train[0]) == len(task.train[1]) == num_train
    assert 0.0 <= float(task.images.min()) <= float(task.images.max()) <= 1.0
    assert len(task.class_names) == 10
    assert task.held_out_accuracy is not None
    assert task.held_out_accuracy >= least_accuracy
    assert not any(module.training for module in task.model.modules())


def test_packaged_configs_are_found_by_name() -> None:
    assert packaged_names() == ["digits", "fashion", "imagenet", "multitask", "text"]
    assert packaged_config("fashion") is not None
    assert packaged_config("Fashion") is None
    assert packaged_config("../digits") is None


def test_purity_of_planted_neighbors() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2])
    index = torch.tensor([[1, 2], [0, 3], [3, 0], [4, 2], [-1, -1]])
    assert neighbor_purity(index, labels).tolist() == [0.5, 0.5, 0.5, 0.5, 0.0]  # no neighbor is no match
    assert class_purity(index, labels) == pytest.approx(0.4)


def test_random_neighbors_show_chance_purity() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), 500, replacement=True, generator=rng)
    others = torch.stack([torch.randperm(499, generator=rng)[:20] for _ in range(500)])
    index = others + (others >= torch.arange(500).unsqueeze(1)).long()  # never the sample itself
    chance = chance_purity(labels)
    assert class_purity(index, labels) == pytest.approx(chance, abs=0.02)
    assert chance_purity(torch.tensor([0, 0, 1])) == pytest.approx(1 / 3)
    assert chance_purity(torch.arange(9)) == 0.0


@pytest.mark.parametrize("index", [torch.zeros(3, 2), torch.zeros(4), torch.full((4, 2), 4), torch.full((4, 2), -2)])
def test_purity_refuses_what_is_no_neighbor_table(index: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="index must be"):
        class_purity(index.long(), torch.zeros(4, dtype=torch.int64))


def test_raw_neighbors_leave_the_sample_itself_out_even_among_copies() -> None:
    images = torch.tensor([0.0, 0.0, 0.0, 5.0, 5.1]).reshape(5, 1, 1)
    index = raw_neighbors(images, 2)
    assert not (index == torch.arange(5).unsqueeze(1)).any()
    assert {tuple(sorted(row)) for row in index[:3].tolist()} == {(1, 2), (0, 2), (0, 1)}
    with pytest.raises(ValueError, match="k must be from 1 to N - 1 = 4, got 5"):
        raw_neighbors(images, 5)
