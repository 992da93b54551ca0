"""Every Python snippet of the documentation runs, page by page, on a small network that it is told about."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lossk

DOCS = Path(__file__).resolve().parents[2] / "docs"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = (
    "index.md",
    "start.md",
    "settings.md",
    "large.md",
    "language.md",
    "data.md",
    "probe.md",
    "localization.md",
    "reading.md",
    "analysis.md",
    "attribution.md",
    "distributed.md",
    "report.md",
    "gpu.md",
    "recipes/imagenet.md",
    "factor.md",
)
ELSEWHERE = {
    "gpu.md": ('device="cuda"', 'device="cpu"'),  # tests cannot count on a GPU
    "start.md": ("(model, loader)", "(model, loader, num_draws=20)"),  # the page's own run takes 14 s
}
CLASSES = ("Bag", "Shirt", "Sneaker")


def snippets(page: str) -> list[str]:
    return FENCE.findall((DOCS / page).read_text())


def names() -> dict[str, Any]:
    """What the pages take for granted: a trained `model`, its `train`ing data, a `probe`, a `loader`."""
    inputs = torch.randn(96, 6)
    targets = (inputs[:, :3].argmax(dim=1) + (torch.rand(96) < 0.1)) % 3
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    train, probe = (inputs, targets), (inputs[:40], targets[:40])
    sampler = lossk.SGLD(lr=1e-3, n_beta=20.0, localization=20.0, num_burnin_steps=5, num_steps_bw_draws=2)
    kernel, other = (
        lossk.build_kernel(model, probe, train=train, sampler=sampler, num_chains=2, num_draws=40, seed=seed)
        for seed in (0, 1)
    )
    kernel.save("fashion.lossk")
    return {
        "lossk": lossk,
        "torch": torch,
        "model": model,
        "train": train,
        "probe": probe,
        "loader": DataLoader(TensorDataset(*probe), batch_size=16),
        "query": (inputs[40:50], targets[40:50]),
        "data": probe,
        "kernel": kernel,
        "other": other,
        "labels": probe[1],
        "class_names": CLASSES,
        "names": CLASSES,
        "wnids": ["n02774152", "n04197391", "n03472535"],
        "synsets": {"Bag": "bag.n.04", "Shirt": "shirt.n.01", "Sneaker": "gym_shoe.n.01"},
        "images": torch.rand(40, 8, 8),
        "predicted": model(probe[0]).argmax(dim=1),
        "as_floats": lambda batch: batch,
    }


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found, known = snippets(page), names()
    assert found
    for number, code in enumerate(found, 1):
        code = code.replace(*ELSEWHERE.get(page, ("", "")))
        exec(compile(code, f"{page}, snippet {number}", "exec"), known)
    assert isinstance(known["kernel"], lossk.LossKernel)


def test_every_page_with_a_snippet_is_tested() -> None:
    """A page of snippets is run here, or by a test that names it."""
    others = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    untested = [
        page.name
        for page in DOCS.rglob("*.md")
        if FENCE.search(page.read_text()) and str(page.relative_to(DOCS)) not in PAGES and page.name not in others
    ]
    assert not untested


def test_the_pages_in_the_menu_exist() -> None:
    menu = (DOCS.parent / "mkdocs.yml").read_text()
    named = re.findall(r"([\w/]+\.md)$", menu, re.MULTILINE)
    assert named
    assert [page for page in named if not (DOCS / page).exists()] == []
    assert sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")) == sorted(named)
