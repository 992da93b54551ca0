"""What a notebook shows of a kernel: names of its rows, tables, pictures; and what their store keeps."""

from __future__ import annotations

import io
import pickle
import struct
import tomllib
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lossk
from conftest import sgld
from damage import flipped
from lossk.analysis import significant_neighbors
from lossk.errors import LosskError, MissingPackageError, StoreError
from lossk.forms.names import pack_texts, read_names, unpack_texts
from lossk.kernel import views
from lossk.kernel.card import CELLS, colored, png
from lossk.kernel.chance import Chance
from lossk.store.verify import verify_store

N = 37  # prime
IDS = [f"é{i:02d}" for i in range(N)]
WORDS = ["owl", "<b>cat", "dog"]
LABELS = [WORDS[i % 3] for i in range(N)]


def traces() -> lossk.LossTraces:
    rng = np.random.default_rng(7)
    common = rng.standard_normal((3, 40, 3))[..., np.arange(N) % 3]
    return lossk.LossTraces(4.0 + common + rng.standard_normal((3, 40, N)))


@pytest.fixture(scope="module")
def plain() -> lossk.LossKernel:
    return lossk.LossKernel.from_traces(traces())


@pytest.fixture(scope="module")
def named(plain: lossk.LossKernel) -> lossk.LossKernel:
    return plain.named(ids=IDS, labels=LABELS)


# --- names -------------------------------------------------------------------------------------------------------


def test_classes_are_numbered_in_alphabetical_order(named: lossk.LossKernel) -> None:
    assert named.class_names == sorted(WORDS)
    assert [named.class_names[i] for i in named.labels] == LABELS
    assert named.ids.tolist() == IDS


def test_naming_changes_no_number(plain: lossk.LossKernel, named: lossk.LossKernel) -> None:
    assert torch.equal(plain[:], named[:])
    assert plain.ids is None
    assert plain.labels is None
    again = named.named(labels=range(N))
    assert again.ids.tolist() == IDS
    assert again.class_names == []
    assert again.labels.tolist() == list(range(N))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"ids": ["a"] * N}, ValueError, r"ids must each be another, got .*a.* 37 times"),
        ({"ids": range(N - 1)}, ValueError, "ids must have one entry for each of the 37 rows, got 36"),
        ({"labels": [0] * (N + 1)}, ValueError, "labels must have one entry for each of the 37 rows, got 38"),
        ({"labels": [-1] * N}, ValueError, "labels must be at least 0 and less than 1,000,000, got -1"),
        ({"labels": [0.5] * N}, TypeError, "labels must be"),
        ({"labels": "cat"}, TypeError, "labels must be integers or texts, one for each row"),
        ({"ids": [1, "a"] * 18 + [3]}, TypeError, "ids must be"),
        ({"ids": ["a", 1] * 18 + ["c"]}, TypeError, "ids must be all texts or all integers, got 1 among texts"),
        ({"ids": ["a\x1b", *IDS[1:]]}, ValueError, "ids must be texts of 1 to 256 bytes without control characters"),
        ({"ids": ["", *IDS[1:]]}, ValueError, "ids must be texts of 1 to 256 bytes"),
        ({"ids": ["x" * 257, *IDS[1:]]}, ValueError, "ids must be texts of 1 to 256 bytes"),
    ],
)
def test_wrong_names_are_refused(
    plain: lossk.LossKernel, given: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        plain.named(**given)


@pytest.mark.parametrize("ids", [IDS, list(range(5, 5 + N)), [2**40 + i for i in range(N)]])
@pytest.mark.parametrize("labels", [LABELS, [i % 3 for i in range(N)], None])
def test_a_store_keeps_them(plain: lossk.LossKernel, tmp_path: Path, ids: list[Any], labels: list[Any] | None) -> None:
    kernel, path = plain.named(ids=ids, labels=labels), tmp_path / "k.lossk"
    kernel.save(path)
    opened = lossk.open(path)
    assert opened.ids.tolist() == ids
    assert opened.class_names == kernel.class_names
    assert (labels is None) == (opened.labels is None)
    if labels is not None:
        assert torch.equal(opened.labels, kernel.labels)
    assert verify_store(path).problems == []


def test_a_store_without_names_has_none_of_it(plain: lossk.LossKernel, tmp_path: Path) -> None:
    """So it is what an earlier version wrote, and reads."""
    plain.save(tmp_path / "k.lossk")
    assert not {"ids", "labels"} & {entry.name for entry in (tmp_path / "k.lossk").iterdir()}
    assert "class_names" not in (tmp_path / "k.lossk/config.json").read_text()
    assert lossk.open(tmp_path / "k.lossk").labels is None


@pytest.mark.parametrize("name", ["ids/c/0/0", "labels/c/0"])
def test_damaged_names_are_found(named: lossk.LossKernel, tmp_path: Path, name: str) -> None:
    path = tmp_path / "k.lossk"
    named.save(path)
    flipped(0.5)(path / name)
    with pytest.raises(StoreError, match=f"array '{name.partition('/')[0]}'"):
        lossk.open(path)
    assert verify_store(path).problems


@pytest.mark.parametrize("form", ["tiles", "factor"])
@pytest.mark.parametrize("stored", [False, True])
def test_a_run_keeps_them(tmp_path: Path, form: str, stored: bool) -> None:
    model, data = torch.nn.Linear(3, 4), (torch.randn(N, 3), torch.arange(N) % 4)
    settings: dict[str, Any] = {"sampler": sgld(), "num_chains": 2, "num_draws": 4, "tile": 16, "progress": False}
    out = tmp_path / "k.lossk" if stored else None
    kernel = lossk.build_kernel(model, data, **settings, form=form, out=out, ids=IDS, labels=LABELS)
    for found in [kernel, lossk.open(out)] if stored else [kernel]:
        assert found.ids.tolist() == IDS
        assert [found.class_names[i] for i in found.labels] == LABELS
    plain = lossk.build_kernel(model, data, **settings, form=form)
    assert torch.equal(plain[:], kernel[:])
    with pytest.raises(ValueError, match="labels must have one entry for each of the 37 rows, got 36"):
        lossk.build_kernel(model, data, **settings, labels=LABELS[1:])


def test_texts_survive_packing() -> None:
    texts = np.array(["a", "éé", "日本", "x" * 40, "tab\tin"])
    np.testing.assert_array_equal(unpack_texts(pack_texts(texts)), texts)


def test_no_names_are_none() -> None:
    assert len(read_names()) == 0
    assert read_names().row(3) == "3"
    assert read_names([7, 8], [1, 0]).row(1) == "8 (0)"


# --- neighbors ---------------------------------------------------------------------------------------------------


def test_neighbors_stay_a_tuple(named: lossk.LossKernel) -> None:
    found = named.neighbors(4)
    index, correlation, floor = found
    assert found[0] is index is found.index
    assert correlation.shape == (N, 4)
    assert floor.shape == (N,)
    assert isinstance(found, tuple)
    assert len(found) == 3
    copied = pickle.loads(pickle.dumps(found))
    assert torch.equal(copied.rows, found.rows)
    assert copied.names.ids.tolist() == IDS


def test_the_table_says_what_the_arrays_say(named: lossk.LossKernel) -> None:
    rows = [5, 2, 36]
    found = named.neighbors(3, rows)
    frame = found.to_dataframe()
    assert list(frame) == ["sample", "id", "label", "rank", "neighbor", "neighbor_id", "neighbor_label",
                           "correlation", "noise_floor"]  # fmt: skip
    for place, line in enumerate(frame.itertuples()):
        i, j = divmod(place, 3)
        other = int(found.index[i, j])
        assert (line.sample, line.id, line.label, line.rank) == (rows[i], IDS[rows[i]], LABELS[rows[i]], j + 1)
        assert (line.neighbor, line.neighbor_id, line.neighbor_label) == (other, IDS[other], LABELS[other])
        assert line.correlation == pytest.approx(float(found.correlation[i, j]))
        assert line.noise_floor == pytest.approx(float(found.noise_floor[i]))


def test_a_missing_neighbor_has_no_name() -> None:
    losses = traces().losses.clone()
    losses[..., 1:] = losses[:1, :1, 1:]  # all but one are dead
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(losses)).named(ids=IDS, labels=LABELS)
    frame = kernel.neighbors(2).to_dataframe()
    assert (frame.neighbor == -1).all()
    assert (frame.neighbor_id == "").all()
    assert "none" in repr(kernel.neighbors(2))


def test_a_replaced_field_keeps_the_rows(named: lossk.LossKernel) -> None:
    found = named.neighbors(2, [4])._replace(noise_floor=torch.zeros(1, dtype=torch.float32, device="cpu"))
    assert found.rows.tolist() == [4]
    assert found.to_dataframe().id.tolist() == [IDS[4]] * 2


def test_significant_neighbors_have_all_their_columns(named: lossk.LossKernel) -> None:
    found = significant_neighbors(named, 3, [8])
    frame = found.to_dataframe()
    assert {"standard_error", "significant", "by_chance", "table_false_share", "neighbor_id"} <= set(frame)
    assert len(frame) == 3
    index, *_, null = found
    assert torch.equal(index, named.neighbors(3, [8]).index)
    assert null in Chance.__doc__ or null in ("rows", "watched", "lag1")


def test_a_table_prints_its_first_rows(named: lossk.LossKernel) -> None:
    text = repr(named.neighbors(7))
    assert text.splitlines()[0].startswith("Neighbors of 37 samples, 7 each")
    assert "é00 (owl)" in text
    assert text.splitlines()[-1] == "... 29 more samples"
    page = named.neighbors(7)._repr_html_()
    assert "<b>cat" not in page
    assert "&lt;b&gt;cat" in page


def test_without_pandas_a_table_says_what_to_install(named: lossk.LossKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingPackageError, match=r'a table needs pandas: pip install "lossk\[analysis\]"'):
        named.neighbors(2).to_dataframe()


# --- one entry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", [3, np.int64(3), torch.tensor(3), -34])
def test_two_integers_give_a_scalar(plain: lossk.LossKernel, i: Any) -> None:
    assert plain[i, 5].shape == ()
    assert float(plain[i, 5]) == pytest.approx(float(np.asarray(plain)[3, 5]), rel=1e-5)
    assert plain[i, i] == plain.variance[3].float()
    assert plain[[i], [5]].shape == (1, 1)
    assert plain[i].shape == (1, N)


# --- pictures ----------------------------------------------------------------------------------------------------


def read_png(file: bytes) -> np.ndarray:
    """[h, w, 4] uint8, of a PNG of one block of unfiltered rows."""
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(file):
        (size,) = struct.unpack(">I", file[at : at + 4])
        kind, data = file[at + 4 : at + 8], file[at + 8 : at + 8 + size]
        assert struct.unpack(">I", file[at + 8 + size : at + 12 + size]) == (zlib.crc32(kind + data),)
        parts[kind] = data
        at += 12 + size
    width, height = struct.unpack(">II", parts[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, 1 + 4 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 4)


def test_a_small_picture_is_a_png() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4)).astype(np.uint8)
    np.testing.assert_array_equal(read_png(png(pixels)), pixels)
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(png(pixels)))
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_opacity_is_the_size_of_a_correlation() -> None:
    found = colored(np.array([[0.0, 0.5], [-2.0, np.nan]]))
    assert found[..., 3].tolist() == [[0, 128], [255, 0]]
    assert found[0, 1, 0] > found[0, 1, 2]  # red
    assert found[1, 0, 0] < found[1, 0, 2]  # blue


def test_the_card_says_how_far_to_trust(named: lossk.LossKernel) -> None:
    page = named._repr_html_()
    for word in ("verdict", "R-hat", "effective draws", "reliability of R", "reliability of K", "noise floor",
                 "37 x 37", "prefers-color-scheme: dark", "data:image/png;base64,", "sorted by class"):  # fmt: skip
        assert word in page, word


def test_the_card_reads_one_tile_and_few_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = np.random.default_rng(0).standard_normal((2, 8, 5000)).astype(np.float32)
    kernel = lossk.LossKernel.from_traces(lossk.LossTraces(losses))
    asked: list[tuple[int, int, int]] = []
    gather = kernel.contents.blocks.gather

    def watched(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        asked.append((len(rows), len(columns), int(rows.max())))
        return gather(rows, columns)

    monkeypatch.setattr(kernel.contents.blocks, "gather", watched)
    kernel._repr_html_()
    assert len(asked) == 1
    assert asked[0][:2] == (CELLS, CELLS)
    assert asked[0][2] < kernel.tile


def test_diagnostics_are_a_table(plain: lossk.LossKernel) -> None:
    lines = repr(plain.diagnostics).splitlines()
    assert lines[0].split()[0] == "verdict"
    assert any(line.startswith("reliability of R") for line in lines)
    assert not any("None" in line or "unknown" in line for line in lines)
    rhat = next(line for line in lines if line.startswith("R-hat ")).split()[1]
    assert rhat == f"{plain.diagnostics.rhat:.4g}"
    assert "<table>" in plain.diagnostics._repr_html_()


def test_pictures_are_drawn(named: lossk.LossKernel, plain: lossk.LossKernel) -> None:
    pytest.importorskip("matplotlib")
    figure = named.plot_matrix()
    image = figure.axes[0].images[0].get_array()
    order = np.argsort(named.labels.numpy(), kind="stable")
    np.testing.assert_allclose(image, named.correlation(order, order).numpy())
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == sorted(WORDS)
    assert figure._repr_png_()[:4] == b"\x89PNG"
    assert plain.plot_matrix([3, 1, 2]).axes[0].images[0].get_array().shape == (3, 3)
    chains = plain.plot_chains()
    assert len(chains.axes[0].lines) == 3
    np.testing.assert_allclose(chains.axes[0].lines[1].get_ydata(), traces().losses[1].double().mean(dim=-1), rtol=1e-5)
    assert plain.plot_chains(ax=figure.axes[0]) is figure


def test_a_map_is_drawn(named: lossk.LossKernel) -> None:
    pytest.importorskip("umap")
    figure = named.plot_map()
    assert sum(len(dots.get_offsets()) for dots in figure.axes[0].collections) == N


def test_a_report_shows_the_names(named: lossk.LossKernel, tmp_path: Path) -> None:
    pytest.importorskip("umap")
    path = named.report(tmp_path / "k.html", progress=False)
    page = path.read_text()
    assert "\\u00e912" in page or "é12" in page
    assert "owl" in page


def test_every_view_is_an_entry_point(monkeypatch: pytest.MonkeyPatch, plain: lossk.LossKernel) -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    said = tomllib.loads(text)["project"]["entry-points"][views.GROUP]
    public = {name for name in vars(views.Views) if not name.startswith("_")}
    assert set(said) == public
    assert all(value.startswith("lossk.report.") for value in said.values())
    assert all(callable(views.view(name)) for name in public)
    monkeypatch.setattr(views, "entry_points", lambda **_: ())
    with pytest.raises(LosskError, match=r"kernel\.plot_matrix is part of an installed lossk"):
        plain.plot_matrix()
