"""The report's parts against known answers; the page itself is opened in test_report_page.py."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lossk
from lossk.cli.label_files import read_classes
from lossk.cli.main import main
from lossk.errors import LosskError
from lossk.report import page, write_report
from lossk.report.findings import disagree, suspects
from lossk.report.matrix import binned_correlation, edges_of, sorted_samples
from lossk.report.payload import pack, to_json, traces_of
from lossk.report.samples import Samples, SamplesError, read_samples, samples_path, thumbnails, write_samples
from lossk.report.sprites import make_sprites


def traces(num_samples: int = 37, dead: tuple[int, ...] = (3,), seed: int = 0) -> torch.Tensor:
    """[2, 20, N] losses with correlations of every size; some never vary."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(2, 20, 3, generator=generator)
    losses = shared @ torch.randn(3, num_samples, generator=generator)
    losses += torch.randn(losses.shape, generator=generator)
    losses[:, :, list(dead)] = 1.0
    return losses


# -- matrix -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bins", [1, 5, 11, 36])
@pytest.mark.parametrize("tile", [7, 16, 64])
def test_binned_matrix_is_the_mean_over_pairs(num_bins: int, tile: int, tmp_path: Path) -> None:
    losses = traces()
    with lossk.TraceWriter(tmp_path / "t.lossk", num_chains=2, num_draws=20, num_samples=37, chunk=tile) as writer:
        writer.append(losses)
    kernel = lossk.open(tmp_path / "t.lossk")
    order = np.random.default_rng(1).permutation(np.flatnonzero(~kernel.dead.numpy()))
    mean = binned_correlation(kernel, order, num_bins)
    truth = kernel.to_numpy(correlation=True).astype(np.float64)[np.ix_(order, order)]
    place = np.arange(len(order)) * num_bins // len(order)
    for a in range(num_bins):
        for b in range(num_bins):
            block = truth[np.ix_(place == a, place == b)]
            if a == b:
                block = block[~np.eye(len(block), dtype=bool)] if len(block) > 1 else np.ones(1)
            # float32 sums of at most 36 entries of size at most 1
            assert abs(mean[a, b] - block.mean()) < 1e-5, (a, b)
    np.testing.assert_array_equal(mean, mean.T)


def test_binned_matrix_refuses_more_bins_than_samples() -> None:
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(traces()))
    with pytest.raises(ValueError, match="num_bins must be from 1 to the 4 samples shown, got 5"):
        binned_correlation(kernel, np.arange(4), 5)


def test_samples_are_sorted_by_the_first_key_then_the_next_without_dead_ones() -> None:
    dead = np.array([False, True, False, False, False])
    order = sorted_samples(dead, np.array([1, 0, 0, 1, 0]), None, np.array([5.0, 0, 2, 4, 1]))
    assert order.tolist() == [4, 2, 3, 0]
    assert edges_of(np.array([0, 0, 1, 3])) == ([0, 2, 3, 4], [0, 1, 3])


# -- samples and images -----------------------------------------------------------------------------------------------


def decode_sheet(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


@pytest.mark.parametrize("shape", [(7, 9), (9, 7, 3), (64, 64)])
def test_every_image_is_at_its_slot_unchanged(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1100, *shape), dtype=np.uint8)
    sprites = make_sprites(images, np.array([0]), budget=10**8)
    assert sprites.rule == ""
    height, width = shape[:2]
    sheets = [decode_sheet(uri) for uri in sprites.sheets]
    assert len(sheets) == -(-1100 // sprites.per_sheet)
    for sample in (0, 1, 64, 1023, 1099):
        number, within = divmod(int(sprites.slot[sample]), sprites.per_sheet)
        y, x = within // sprites.columns * height, within % sprites.columns * width
        np.testing.assert_array_equal(sheets[number][y : y + height, x : x + width], images[sample])


def test_images_beyond_the_budget_are_thinned_by_the_stated_rule() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3000, 16, 16), dtype=np.uint8)
    listed = np.array([5, 17, 2999])
    budget = 100_000
    sprites = make_sprites(images, listed, budget=budget)
    kept = np.flatnonzero(sprites.slot >= 0)
    assert set(listed) <= set(kept.tolist())
    assert 300 < len(kept) < 3000
    size = sum(len(base64.b64decode(uri.split(",", 1)[1])) for uri in sprites.sheets)
    assert size < 1.1 * budget  # what an image takes is learnt from 1,024 of them
    assert np.diff(kept).max() < 3 * 3000 / len(kept)  # evenly spaced
    assert f"thinned to {len(kept):,} of 3,000" in sprites.rule
    assert sorted(sprites.slot[kept].tolist()) == list(range(len(kept)))


def test_large_images_are_reduced_to_64_pixels() -> None:
    images = np.zeros((3, 100, 200, 3), dtype=np.uint8)
    images[:, :, 100:] = 200
    small = thumbnails(images)
    assert small.shape == (3, 32, 64, 3)
    assert (small[:, :, :31] == 0).all()
    assert (small[:, :, 33:] == 200).all()
    assert "reduced from 200 x 100 to 64 x 32 pixels" in make_sprites(images, np.array([0])).rule


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("labels", [0, 1], r"labels must have shape \[3\], one entry per sample, got \[2\]"),
        ("labels", [0, -1, 2], "labels must be class numbers, integers from 0, got int64 from -1"),
        ("labels", [0.5, 1, 2], "labels must be class numbers"),
        ("labels", [0.0, float("nan"), 2], "labels must be class numbers"),
        ("texts", ["a"], "texts must have one entry per sample, 3, got 1"),
        ("images", np.zeros((3, 4, 4, 2)), r"images must be \[3, H, W\] or \[3, H, W, 3\], got \[3, 4, 4, 2\]"),
        ("images", np.zeros((3, 4, 4), dtype=np.int64), r"images must be uint8, or floats in \[0, 1\], got int64"),
    ],
)
def test_samples_that_do_not_fit_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Samples(**{field: value}).checked(3)


@pytest.mark.parametrize("bad", [1.5, -0.1, float("nan")])
def test_images_outside_the_unit_interval_are_refused(bad: float) -> None:
    images = np.zeros((2, 3, 3), dtype=np.float32)
    images[1, 1, 1] = bad
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], got floats from"):
        thumbnails(images)


def test_the_file_beside_a_store_gives_back_what_it_was_given(tmp_path: Path) -> None:
    given = Samples(
        labels=np.array([1, 0, 2]),
        class_names=["a", "ü \N{SNOWMAN}", "<b>"],
        images=np.linspace(0, 1, 3 * 4 * 5).reshape(3, 4, 5),
        texts=["one", "", "drei \N{EM DASH}"],
        predictions=np.array([1, 1, 2]),
        held_out=np.array([True, False, True]),
        notes="three: of them",
    ).checked(3)
    path = samples_path(tmp_path / "mine.lossk")
    assert path.name == "mine.samples.npz"
    write_samples(given, path)
    found = read_samples(path, 3)
    assert [found.class_names, found.texts, found.notes] == [given.class_names, given.texts, given.notes]
    for name in ("labels", "predictions", "held_out"):
        np.testing.assert_array_equal(getattr(found, name), getattr(given, name))
    np.testing.assert_array_equal(found.images, thumbnails(given.images))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.samples.npz"]


def test_a_damaged_or_foreign_file_beside_a_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.samples.npz"
    write_samples(Samples(labels=np.arange(4)).checked(4), path)
    with pytest.raises(SamplesError, match=r"does not hold the samples of this store: labels must have shape \[5\]"):
        read_samples(path, 5)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SamplesError, match="does not hold the samples of this store"):
        read_samples(path, 4)
    np.savez(path, labels=np.array([{}, {}, {}, {}], dtype=object))  # pickled
    with pytest.raises(SamplesError, match="allow_pickle"):
        read_samples(path, 4)


@pytest.mark.parametrize(
    ("content", "labels", "names"),
    [
        ("3\n1\n2\n", [3, 1, 2], []),
        ("cat\ndog\ncat\n", [0, 1, 0], ["cat", "dog"]),
        ("id,label\n7,dog\n8,cat\n9,dog\n", [1, 0, 1], ["cat", "dog"]),
    ],
)
def test_labels_are_read_from_csv(content: str, labels: list[int], names: list[str], tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(content)
    found, found_names = read_classes(path)
    assert found.tolist() == labels
    assert found_names == names


def test_a_csv_without_a_label_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("1,2\n3,4\n")
    with pytest.raises(ValueError, match="must have one column, or a heading with a column 'label'"):
        read_classes(path)


# -- lists and numbers ------------------------------------------------------------------------------------------------


def test_a_planted_wrong_label_is_the_most_suspicious() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 60, 2, generator=generator)
    of = torch.arange(40) % 2
    losses = shared[:, :, of] + 0.5 * torch.randn(4, 60, 40, generator=generator)
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(losses))
    labels = of.numpy().copy()
    labels[11] = 1 - labels[11]
    near = page.find.__globals__["significant_neighbors"](kernel, 10)
    share = disagree(near, labels)
    assert share[11] == 1.0
    assert np.delete(share, 11).max() < 0.5
    assert suspects(share, kernel.mean_loss.numpy())[0] == 11


def test_packed_arrays_are_little_endian_bytes() -> None:
    packed = pack(np.array([1, -2, 300]), "int32")
    assert packed is not None
    assert np.frombuffer(base64.b64decode(packed["base64"]), "<i4").tolist() == [1, -2, 300]


def test_json_in_a_script_element_cannot_end_it() -> None:
    hostile = {"a": "</script><script>alert(1)</script><!-- & \u2028"}
    text = to_json(hostile)
    assert not re.search(r"[<>&\u2028]", text)
    assert json.loads(text) == hostile


def test_unknown_and_long_traces() -> None:
    assert traces_of({}) == {"every": 1, "mean_loss": None, "excess": None}
    long = traces_of({"mean_loss_trace": [[0.0] * 5000], "excess_trace": [[float("nan")] * 5000]})
    assert long["excess"] is None
    assert long["every"] == 3
    assert len(long["mean_loss"][0]) == 1667


# -- the file ---------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """All start tags with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


HOSTILE = '"><script>window.pwned = 1</script><img src=x onerror="window.pwned = 2">'


def planted_kernel(meta: dict[str, Any] | None = None) -> lossk.LossKernel:
    return lossk.LossKernel.from_traces(lossk.LossTraces(traces(30), meta=meta))


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "hostile.html"
    meta = {"sampler": {"lr": HOSTILE}, "reasons": [f"lr = 1: {HOSTILE}"], "versions": {HOSTILE: HOSTILE}}
    write_report(
        planted_kernel(meta),
        path,
        labels=np.arange(30) % 3,
        class_names=[HOSTILE, "b", "c"],
        texts=[HOSTILE] * 30,
        title=HOSTILE,
        config=HOSTILE,
        progress=False,
    )
    return path.read_text()


def test_strings_of_a_store_are_text_in_the_page(hostile_page: str) -> None:
    found = Elements(hostile_page)
    assert [tag for tag, _ in found.found].count("script") == 3  # data, plotly.js, the page's own
    assert not [a for _, attributes in found.found for a in attributes if a.startswith("on")]
    assert all(a["src"] != "x" for tag, a in found.found if tag == "img")
    assert sum(HOSTILE in text for text in found.text) >= 4  # as text: title, heading, cards, config


def test_the_page_names_no_other_file(hostile_page: str) -> None:
    found = Elements(hostile_page)
    links = [a[name] for tag, a in found.found for name in ("src", "href", "action") if a.get(name)]
    assert links
    assert all(link is not None and link.startswith(("#", "data:")) for link in links)
    assert not [tag for tag, _ in found.found if tag in ("link", "iframe", "object", "base", "form")]
    policy = next(a["content"] for _, a in found.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "connect-src" not in policy


def test_an_existing_file_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "there.html"
    path.write_text("mine")
    monkeypatch.setattr(page, "find", lambda *a, **k: pytest.fail("work was begun"))
    with pytest.raises(FileExistsError, match=r"there.html' exists; pass overwrite=True"):
        write_report(planted_kernel(), path)
    assert path.read_text() == "mine"


def test_a_kernel_that_hardly_varies_is_refused(tmp_path: Path) -> None:
    losses = torch.ones(2, 4, 10)
    losses[:, :, :3] = torch.rand(2, 4, 3)
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(losses))
    with pytest.raises(ValueError, match="a report needs at least 4 samples whose loss varies, got 3 of 10"):
        write_report(kernel, tmp_path / "r.html")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(page.PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(LosskError, match=r'a report needs no-such-package: pip install "lossk\[report\]"'):
        write_report(planted_kernel(), tmp_path / "r.html")


# -- the command line -------------------------------------------------------------------------------------------------


def test_run_keeps_the_samples_and_report_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lossk run` with `report:`, then `lossk report` on the store alone: no network is trained for it."""
    import sys

    import yaml
    from tests.unit.cli.test_cli import CONFIG

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("mine.yaml").write_text(yaml.safe_dump({**CONFIG, "report": "tiny.html"}))
    assert main(["run", "mine.yaml"]) == 0
    samples = read_samples(Path("tiny.samples.npz"), 30)
    assert samples.class_names == ["a", "b", "c"]
    assert samples.predictions is not None
    first = Path("tiny.html").read_text()
    monkeypatch.setattr("lossk.cli.config.RunConfig.make_task", lambda self: pytest.fail("a task was made"))
    assert main(["report", "tiny.lossk"]) == 2  # there is one already
    assert main(["report", "tiny.lossk", "--overwrite"]) == 0
    assert Path("tiny.html").read_text() == first
    texts = Elements(first).text
    for expected in (f"task: {CONFIG['task']}", "planted classes: three", "Most suspicious labels"):
        assert any(expected in text for text in texts), expected
    Path("tiny.samples.npz").unlink()
    Path("labels.csv").write_text("label\n" + "x\ny\nz\n" * 10)
    assert main(["report", "tiny.lossk", "--labels", "labels.csv", "--out", "other.html", "--title", "Mine"]) == 0
    other = Elements(Path("other.html").read_text())
    assert any("Mine" in text for text in other.text)
    assert not [tag for tag, _ in other.found if tag == "img"]


@pytest.mark.slow
def test_fifty_thousand_samples(tmp_path: Path) -> None:
    """50,000 samples with images: under 50 MB, and within memory that an N x N matrix (10 GB) would not fit into."""
    import psutil

    count, rng = 50_000, np.random.default_rng(0)
    labels = np.arange(count) % 10
    shared = rng.standard_normal((2, 50, 10)).astype(np.float32)
    path = tmp_path / "large.lossk"
    with lossk.TraceWriter(path, num_chains=2, num_draws=50, num_samples=count) as writer:
        for start in range(0, count, 5000):
            part = labels[start : start + 5000]
            writer.append(shared[:, :, part] + rng.standard_normal((2, 50, 5000)).astype(np.float32))
    images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)  # incompressible
    write_report(path, tmp_path / "large.html", labels=labels, images=images, progress=False)
    assert (tmp_path / "large.html").stat().st_size < 50e6
    assert psutil.Process().memory_info().rss < 4e9
