"""`write_report`: one HTML file that shows a kernel, complete in itself.

plotly.js draws (from the PyPI package `plotly`, whose wheel carries it; MIT). Of the libraries looked at, it is the
one that does all that the page needs inside one file: it pans and zooms, finds the one of 50,000 points under the
pointer, a click is an event, axes, color bars and legends come from the same library for every plot, and colors can
be changed in place (dark mode). The points themselves are the page's own (`page/points.js`), as Plotly's WebGL layer
makes functions from strings: a page that allows that has a hole where hostile strings could become code. It takes
4.8 MB of the file. Bokeh is smaller (about 1.2 MB) and close; its themes are fixed when the page is made. deck.gl has
no axes or color bars, and DataMapPlot, which carries it, draws maps only. Keyboard use is the page's own, as none of
them has enough of it.

The page's own parts are in `page/`: a Jinja2 template (autoescape on: a store's strings are not trusted), a style sheet
and scripts, which put strings into the page as text only. A content security policy in the page forbids every request
and `eval`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lossk import provenance
from lossk.checks import check_flag, check_integer, check_optional, check_path, check_text, shown
from lossk.errors import LosskError
from lossk.forms.names import Names
from lossk.kernel.from_store import open_kernel
from lossk.kernel.kernel import LossKernel
from lossk.report.findings import STEPS, check_memory, check_size, find
from lossk.report.payload import make_payload, to_json
from lossk.report.samples import Samples, read_samples, samples_path
from lossk.report.sprites import make_sprites
from lossk.report.view import make_view

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("data.js", "theme.js", "details.js", "points.js", "map.js", "matrix.js", "charts.js", "main.js")
PACKAGES = {"jinja2": "jinja2", "plotly": "plotly", "PIL": "pillow", "umap": "umap-learn", "sklearn": "scikit-learn"}


def write_report(
    kernel_or_store: LossKernel | str | Path,
    path: str | Path,
    *,
    labels: Any = None,
    class_names: Any = (),
    images: Any = None,
    texts: Any = None,
    predictions: Any = None,
    held_out: Any = None,
    title: str | None = None,
    config: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a report on a kernel as one self-contained HTML file. Needs lossk[report].

    Of a store, the samples that `lossk run` saved beside it (STORE.samples.npz) and the config that replays it
    (STORE.yaml) are used where they are there; what is given here comes first, the kernel's own names last.

    The pairs of samples are read about six times, a tile at a time (of a kernel in tiles, some 40 times more for its
    eigenvectors; of one in factor form, once per chain for the error bars of class means). Memory beyond the kernel's
    own: of order N (30 neighbors of each sample, the images as bytes), the matrix in at most 1,600 x 1,600 bins, and
    the page itself.

    Args:
        path: of the HTML file.
        labels: [N] integers from 0.
        class_names: of label 0, 1, ...
        images: [N, H, W] or [N, H, W, 3], uint8 or floats in [0, 1]; reduced to 64 pixels, and thinned where they would
            take more than 20 MB of the page (the page says how).
        texts: [N] strings.
        predictions: [N] integers, the network's own answers.
        held_out: [N] bool, True where the network was not trained on the sample.
        title: None = the store's name.
        config: the YAML that replays the run.
        seed: of the map.

    Returns:
        The path.

    Raises:
        FileExistsError: `path` exists, unless `overwrite`.
        ValueError: what is given does not fit the kernel, or the kernel is too small or too large for a report.
        MemoryError: more than the memory now available.
        LosskError: a package of lossk[report] is missing.
    """
    overwrite, progress = check_flag("overwrite", overwrite), check_flag("progress", progress)
    path, seed = check_path("path", path), check_integer("seed", seed, 0, 2**32 - 1)
    title, config = check_optional(check_text, "title", title), check_optional(check_text, "config", config)
    if not isinstance(kernel_or_store, LossKernel):
        check_path("kernel_or_store", kernel_or_store)
    if path.exists() and not overwrite:
        raise FileExistsError(f"path {str(path)!r} exists; pass overwrite=True to replace it")
    require_packages()
    store = None if isinstance(kernel_or_store, LossKernel) else Path(kernel_or_store)
    kernel = kernel_or_store if isinstance(kernel_or_store, LossKernel) else open_kernel(kernel_or_store)
    check_size(kernel)
    given = {
        "labels": labels, "class_names": class_names, "images": images, "texts": texts, "predictions": predictions,
        "held_out": held_out,
    }  # fmt: skip
    saved = with_names(saved_samples(store, kernel.num_samples), kernel.names)
    samples = merge(given, saved).checked(kernel.num_samples)
    check_memory(kernel, samples)
    if config is None and store is not None and store.with_suffix(".yaml").is_file():
        config = store.with_suffix(".yaml").read_text(encoding="utf-8", errors="replace")  # shown, never parsed
    if title is None:
        title = "Loss kernel" if store is None else store.stem
    if progress:
        pairs = kernel.num_samples**2 / 2
        print(f"report: {len(STEPS)} steps; {pairs:.3g} pairs of samples are read about 6 times", file=sys.stderr)
    found = find(kernel, samples, seed=seed, progress=progress)
    sprites = None if samples.images is None else make_sprites(samples.images, found.listed())
    view = make_view(kernel, samples, found, sprites, title=title, config=config)
    data = to_json(make_payload(kernel, samples, found, sprites))
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, render(view, data))
    return path


def require_packages() -> None:
    """A missing package is better known before the work than after it."""
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise LosskError(f'a report needs {", ".join(missing)}: pip install "lossk[report]"')


def saved_samples(store: Path | None, num_samples: int) -> Samples:
    """What lies beside a store, or nothing."""
    if store is None or not samples_path(store).exists():
        return Samples()
    return read_samples(samples_path(store), num_samples)


def with_names(saved: Samples, names: Names) -> Samples:
    """What was saved; where that says nothing, the kernel's own classes, and its ids as texts."""
    if saved.labels is None and names.labels is not None:
        saved = replace(saved, labels=names.labels, class_names=names.class_names)
    if saved.texts is None and names.ids is not None:
        saved = replace(saved, texts=[str(one) for one in names.ids])
    return saved


def merge(given: dict[str, Any], saved: Samples) -> Samples:
    """What is given, and of what is not given, what was saved. Names belong to the labels that they came with."""
    kept = {name: getattr(saved, name) for name in given}
    if given["labels"] is not None:
        kept["class_names"] = ()
    found = {name: kept[name] if _absent(name, value) else value for name, value in given.items()}
    return Samples(**found, notes=saved.notes)


def _absent(name: str, value: Any) -> bool:
    if value is None:
        return name != "class_names"
    if isinstance(value, str | bytes | bytearray) or not (hasattr(value, "__iter__") or hasattr(value, "shape")):
        raise TypeError(f"{name} must be an array or a list, an entry per sample or class, got {shown(value)}")
    return isinstance(value, list | tuple) and not value


def render(view: dict[str, Any], data: str) -> str:
    """The page from its template. Everything in `view` is escaped; `data` is JSON that may stand in a script."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return environment.get_template("template.html").render(
        **view,
        version=provenance.versions()["lossk"],
        style=Markup((PAGE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        plotly=Markup(get_plotlyjs()),
        data=Markup(data),
    )


def _write(path: Path, page: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(page, encoding="utf-8", newline="\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
