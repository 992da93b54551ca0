"""The picture: what is chosen for it, and that it is drawn."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import lossk
from lossk.report.picture import MOST_SAMPLES, Pictured, choose_queries, draw, draw_picture, embed, picture_data, thin


def planted(num_classes: int = 3, per_class: int = 20) -> tuple[lossk.LossKernel, torch.Tensor]:
    """A kernel in which losses of a class move together; sample 0 is dead."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(num_classes).repeat(per_class)
    common = torch.randn(2, 40, num_classes, generator=rng)
    losses = common[:, :, labels] + 0.5 * torch.randn(2, 40, len(labels), generator=rng)
    losses[:, :, 0] = 1.0
    return lossk.LossKernel.from_traces(lossk.LossTraces(losses)), labels


@pytest.fixture
def pixels():
    """Read a PNG as [height, width, 4] in [0, 1]."""
    return pytest.importorskip("matplotlib.image").imread


def what(labels: torch.Tensor, images: torch.Tensor | None) -> Pictured:
    return Pictured(labels, ["ankle boot", "b", "c"], images, "Loss kernel of planted classes", "60 samples")


def test_picture_is_written_and_shows_all_three_parts(tmp_path: Path, pixels) -> None:
    kernel, labels = planted()
    images = torch.rand(len(labels), 8, 8, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "new" / "picture.png"
    draw_picture(kernel, what(labels, images), path, neighbors=kernel.neighbors(10))
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (2400, 1170)
    shown = pixels(path)[..., :3]
    height, width = shown.shape[:2]
    for left, right in ((0.06, 0.385), (0.40, 0.675), (0.69, 1.0)):
        part = shown[int(0.2 * height) : int(0.8 * height), int(left * width) : int(right * width)]
        assert 0.004 < (part < 0.9).any(axis=2).mean() < 1.0  # frames alone come to 0.003
    edge = np.concatenate([shown[:5].reshape(-1, 3), shown[-5:].reshape(-1, 3), shown[:, :5].reshape(-1, 3),
                           shown[:, -5:].reshape(-1, 3)])  # fmt: skip
    assert (edge == 1.0).all()  # nothing is cut off


def test_picture_without_images_has_no_grid(tmp_path: Path, pixels) -> None:
    kernel, labels = planted()
    path = tmp_path / "picture.png"
    draw_picture(kernel, what(labels, None), path, neighbors=kernel.neighbors(10))
    shown = pixels(path)[..., :3]
    assert (shown[150:, int(0.69 * shown.shape[1]) :] == 1.0).all()


def test_a_neighbor_that_is_missing_leaves_a_gap(tmp_path: Path) -> None:
    kernel, labels = planted()
    data = picture_data(kernel, what(labels, torch.zeros(len(labels), 4, 4)), kernel.neighbors(3))
    assert 0 not in data.queries  # the dead sample has nothing to show
    draw(data, tmp_path / "picture.png")
    missing = np.full_like(data.neighbors, -1)
    draw(type(data)(**{**vars(data), "neighbors": missing}), tmp_path / "gaps.png")
    assert (tmp_path / "gaps.png").stat().st_size < (tmp_path / "picture.png").stat().st_size


def test_same_kernel_same_picture(tmp_path: Path) -> None:
    kernel, labels = planted()
    for name in ("a.png", "b.png"):
        draw_picture(kernel, what(labels, None), tmp_path / name, neighbors=kernel.neighbors(5))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_matrix_is_sorted_by_class_and_matches_the_kernel() -> None:
    kernel, labels = planted()
    data = picture_data(kernel, what(labels, None), kernel.neighbors(5))
    order = torch.argsort(labels, stable=True)
    assert (np.diff(data.labels) >= 0).all()
    np.testing.assert_array_equal(data.correlation, kernel.correlation(order, order).numpy())


def test_map_puts_classes_apart() -> None:
    kernel, labels = planted()
    correlation = kernel.correlation().numpy()[1:, 1:]
    points = embed(correlation, seed=0)
    assert np.isfinite(points).all()
    centers = np.stack([points[labels[1:] == c].mean(axis=0) for c in range(3)])
    within = max(np.linalg.norm(points[labels[1:] == c] - centers[c], axis=1).mean() for c in range(3))
    between = min(np.linalg.norm(centers[a] - centers[b]) for a in range(3) for b in range(a))
    assert between > 1.5 * within


def test_thinning_keeps_the_shares_of_the_classes() -> None:
    labels = np.repeat([0, 1, 2], [6000, 3000, 3])
    rows = thin(labels, MOST_SAMPLES, seed=0)
    counts = np.bincount(labels[rows])
    assert len(rows) <= MOST_SAMPLES + 3
    assert len(np.unique(rows)) == len(rows)
    assert counts[0] == pytest.approx(2 * counts[1], rel=0.01)
    assert counts[2] >= 1  # a rare class does not vanish
    np.testing.assert_array_equal(thin(labels[:50], MOST_SAMPLES, seed=0), np.arange(50))


def test_queries_are_the_largest_variances_then_other_classes() -> None:
    variance = np.array([9.0, 8, 7, 6, 1, 2, 3, 0.5, 0.4, 0.3])
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    neighbors = np.zeros((10, 2), dtype=np.int64)
    queries, notes = choose_queries(variance, labels, neighbors, ["x", "y"], seed=0)
    assert queries[:4].tolist() == [0, 1, 2, 3]
    assert sorted(queries[4:].tolist()) == [5, 8]  # the median of class 1, and of class 2
    assert notes[0] == "x\nlargest\nvariance"
    assert "2\nmedian\nof class" in notes  # a class without a name shows its number
