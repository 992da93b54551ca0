"""The report in a real browser: headless Chromium, offline, every request recorded."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

import lossk
from lossk.report import write_report
from planted import planted_traces

N, DEAD = 60, 59
NAMES = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 2'>",
    "<a href='https://a.example'>c</a> &",
]
SHADES = (40, 130, 220)  # of the images of each class
FOCUSED = """() => {
    const focused = document.activeElement;
    const { outlineStyle, outlineWidth } = getComputedStyle(focused);
    return [focused.id || focused.dataset.sample, outlineStyle !== 'none' && parseFloat(outlineWidth) > 0];
}"""
FLAGS = ["--no-sandbox", "--disable-gpu"]  # the page needs no WebGL
ATTEMPTS = ("eval('window.pwned = 3')", "new Function('window.pwned = 4')()", "setTimeout('window.pwned = 5')")


@pytest.fixture(scope="module")
def kernel() -> lossk.LossKernel:
    traces = planted_traces(torch.arange(N) % 3, dead=1)
    traces.meta = {"mean_loss_trace": traces.losses.mean(dim=2).tolist()}
    return lossk.LossKernel.from_traces(traces)


@pytest.fixture(scope="module")
def report(kernel: lossk.LossKernel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = np.arange(N) % 3
    images = np.broadcast_to(np.array(SHADES, dtype=np.uint8)[labels][:, None, None], (N, 8, 8))
    return write_report(
        kernel,
        tmp_path_factory.mktemp("report") / "report.html",
        labels=labels,
        class_names=NAMES,
        images=images,
        predictions=np.where(np.arange(N) == 4, 0, labels),
        config="task: here\n",
        progress=False,
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None and "CI" not in os.environ:
        pytest.skip("no Chromium on this machine; .ci/run installs it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page and all that it asked for and complained of."""

    def __init__(self, browser: Browser, report: Path, **settings: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1366, "height": 768}, offline=True, **settings)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url[:80]))
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.url = report.as_uri()
        self.page.goto(self.url)
        if settings.get("java_script_enabled", True):
            self.page.wait_for_selector("html[data-ready] #details h3", state="attached")


@pytest.fixture(scope="module")
def opened(browser: Browser, report: Path) -> Iterator[Opened]:
    opened = Opened(browser, report, color_scheme="light")
    yield opened
    opened.context.close()


@pytest.fixture
def shown(opened: Opened) -> Page:
    opened.page.evaluate("document.documentElement.style.scrollBehavior = 'auto'; scrollTo(0, 0)")
    return opened.page


def pixels(page: Page, selector: str) -> np.ndarray:
    """[h, w, 3] uint8 of an element as the browser shows it."""
    content = page.locator(selector).screenshot()
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def near(picture: np.ndarray, color: tuple[int, int, int]) -> int:
    """Pixels within 40 of a color in every channel."""
    return int((np.abs(picture.astype(int) - color) < 40).all(axis=2).sum())


def place_of(page: Page, sample: int) -> tuple[float, float]:
    """Where a sample's point is, in the window."""
    x, y = page.evaluate(
        """(sample) => {
            const plot = document.getElementById('map-plot');
            const { xaxis, yaxis } = plot._fullLayout;
            const box = plot.getBoundingClientRect();
            const { x, y } = plot.data[0];
            return [box.left + xaxis._offset + xaxis.l2p(x[sample]), box.top + yaxis._offset + yaxis.l2p(y[sample])];
        }""",
        sample,
    )
    return x, y


def selected(page: Page) -> str:
    return page.locator("#details h3").inner_text()


def test_the_map_is_drawn_in_the_colors_of_the_classes(shown: Page) -> None:
    picture = pixels(shown, "#map-plot")
    for color in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0x00, 0x9E, 0x73)):
        assert near(picture, color) > 100, color


def test_pointing_at_a_sample_shows_its_image_and_loss(shown: Page, kernel: lossk.LossKernel) -> None:
    shown.locator("#map-plot").scroll_into_view_if_needed()
    shown.mouse.move(*place_of(shown, 10))
    card = shown.locator("#card")
    card.wait_for(state="visible")
    assert "sample " in card.inner_text()
    assert "nats" in card.inner_text()
    shown.wait_for_selector("#card canvas[data-drawn]")
    sample = int(card.locator("strong").inner_text().split()[1])
    shade = shown.evaluate("document.querySelector('#card canvas').getContext('2d').getImageData(4, 4, 1, 1).data[0]")
    assert shade == SHADES[sample % 3]
    loss = float(card.inner_text().split("loss ")[1].split()[0])
    assert loss == pytest.approx(float(kernel.mean_loss[sample]), rel=5e-3)
    shown.mouse.move(5, 5)
    card.wait_for(state="hidden")


def test_a_click_shows_the_neighbors_with_their_significance(shown: Page, kernel: lossk.LossKernel) -> None:
    shown.locator("#map-plot").scroll_into_view_if_needed()
    before = selected(shown)
    wanted = 11 if before != "Sample 11" else 14
    shown.mouse.click(*place_of(shown, wanted))
    shown.wait_for_function("before => document.querySelector('#details h3').textContent !== before", arg=before)
    sample = int(selected(shown).split()[1])
    rows = shown.locator("#details table[data-kind=near] tbody tr")
    found = kernel.neighbors(12, [sample])
    assert rows.count() == 12
    error = kernel.standard_error([sample], found.index[0], correlation=True)[0]
    for row, index, correlation, se in zip(rows.all(), found.index[0], found.correlation[0], error, strict=True):
        text = row.inner_text().replace("\N{MINUS SIGN}", "-")
        assert row.locator("a").get_attribute("data-sample") == str(int(index))
        assert f"{float(correlation):.2f} ± {float(se):.2f}" in text
        significant = bool(correlation > found.noise_floor[0])
        assert ("\N{BLACK CIRCLE}" in text) == significant
    assert f"{float(found.noise_floor[0]):.2f}" in shown.locator("#details dl").inner_text()


def test_a_number_typed_selects_a_sample_and_a_wrong_one_is_refused(shown: Page) -> None:
    shown.focus("#sample-number")
    shown.keyboard.press("Control+A")
    shown.keyboard.type("23")
    shown.keyboard.press("Enter")
    assert selected(shown) == "Sample 23"
    shown.keyboard.press("Control+A")
    shown.keyboard.type("60")
    shown.keyboard.press("Enter")
    assert selected(shown) == "Sample 23"
    assert shown.locator("#sample-wrong").inner_text() == "a whole number from 0 to 59"
    shown.keyboard.press("Control+A")
    shown.keyboard.type(str(DEAD))
    shown.keyboard.press("Enter")
    assert "Its loss never varied" in shown.locator("#details").inner_text()


def test_keys_move_and_zoom_the_map(shown: Page) -> None:
    def ranges() -> tuple[float, float]:
        return tuple(shown.evaluate("document.getElementById('map-plot')._fullLayout.xaxis.range"))

    shown.locator("#map-plot").focus()
    start = ranges()
    shown.keyboard.press("+")
    zoomed = ranges()
    assert zoomed[1] - zoomed[0] == pytest.approx(0.7 * (start[1] - start[0]), rel=1e-6)
    shown.keyboard.press("ArrowRight")
    moved = ranges()
    assert moved[0] - zoomed[0] == pytest.approx((zoomed[1] - zoomed[0]) / 8, rel=1e-6)
    shown.keyboard.press("0")
    assert ranges() == pytest.approx(start)


def test_the_tab_key_reaches_everything_with_a_visible_focus(shown: Page) -> None:
    shown.focus(".skip")
    seen = []
    for _ in range(200):
        shown.keyboard.press("Tab")
        seen.append(shown.evaluate(FOCUSED))
        if seen[-1][0] == "config":
            break
    reached = {name for name, _ in seen}
    assert {"color", "sample-number", "map-in", "map-home", "map-plot", "matrix-in", "copy", "config"} <= reached
    assert all(visible for _, visible in seen)


def test_arrows_and_enter_select_from_a_list(shown: Page) -> None:
    cards = shown.locator("ol.cards").first.locator("a")
    cards.nth(0).focus()
    shown.keyboard.press("ArrowRight")
    shown.keyboard.press("Enter")
    assert selected(shown) == f"Sample {cards.nth(1).get_attribute('data-sample')}"


def test_colors_follow_the_choice(shown: Page) -> None:
    for choice in ("mean loss", "self-covariance", "cluster", "prediction", "class"):
        shown.select_option("#color", choice)
        shown.wait_for_timeout(50)
        bar = shown.locator("#map-plot .colorbar")
        assert bar.count() == (1 if choice in ("mean loss", "self-covariance") else 0)
        if bar.count():
            assert f"{choice}, nats" in bar.first.inner_html()
    assert shown.locator("#legend button").count() == 3


def test_the_legend_shows_one_class_alone(shown: Page) -> None:
    shown.locator("#legend button").nth(1).click()
    shown.wait_for_timeout(100)
    picture = pixels(shown, "#map-plot")
    assert near(picture, (0xE6, 0x9F, 0x00)) > 100
    assert near(picture, (0x00, 0x72, 0xB2)) < 20
    shown.locator("#legend button").nth(1).click()


def test_the_matrix_is_drawn_and_a_click_selects(shown: Page) -> None:
    shown.locator("#matrix-plot").scroll_into_view_if_needed()
    picture = pixels(shown, "#matrix-plot .nsewdrag")
    side = len(picture) // 3
    own, other = picture[5 : side - 5, 5 : side - 5], picture[5 : side - 5, side + 5 : 2 * side - 5]
    assert own[..., 0].mean() > own[..., 2].mean() + 30  # red: R = 0.7 within a class
    assert abs(other[..., 0].mean() - other[..., 2].mean()) < 20  # R = 0 across
    box = shown.locator("#matrix-plot .nsewdrag").bounding_box()
    assert box is not None
    shown.mouse.move(box["x"] + 3, box["y"] + 3)
    shown.mouse.move(box["x"] + 4, box["y"] + 0.5 * box["height"])
    readout = shown.locator("#matrix-readout").inner_text()
    assert "R = " in readout
    assert NAMES[1] in readout
    shown.mouse.click(box["x"] + 4, box["y"] + 0.5 * box["height"])
    assert int(selected(shown).split()[1]) % 3 == 1


def test_hostile_names_are_shown_as_text(shown: Page) -> None:
    assert shown.locator("#legend").inner_text().splitlines() == NAMES
    for plot in ("#dendrogram-plot", "#matrix-plot", "#classes-plot"):
        assert set(NAMES) <= set(shown.locator(f"{plot} text").all_text_contents()), plot
        assert shown.locator(f"{plot} svg a").count() == 0
    assert shown.evaluate("window.pwned") is None


def test_nothing_was_asked_for_and_nothing_complained(opened: Opened) -> None:
    """Last of those that share the page: whatever they did is counted."""
    assert opened.page.evaluate("window.pwned") is None
    assert [url for url in opened.requests if not url.startswith(("data:", "blob:"))] == [opened.url[:80]]
    assert opened.complaints == []


def test_the_policy_of_the_page_stops_a_request(browser: Browser, report: Path) -> None:
    """What the last test relies on can fail: the page itself refuses a request, and says so."""
    opened = Opened(browser, report)
    answer = opened.page.evaluate("fetch('https://a.example/').then(() => 'sent', (error) => String(error))")
    assert "sent" not in answer
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)
    opened.context.close()


def test_the_policy_of_the_page_makes_no_code_of_strings(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report)
    for number, attempt in enumerate(ATTEMPTS):
        append = f"const s = document.createElement('script'); s.textContent = {attempt!r}; document.body.append(s)"
        opened.page.evaluate(f"() => {{ setTimeout(() => {{ {append} }}) }}")  # later: what a debugger runs may do all
        opened.page.wait_for_timeout(50)
        assert opened.page.evaluate("() => window.pwned") is None, attempt
        assert sum("unsafe-eval" in complaint for complaint in opened.complaints) > number, opened.complaints
    opened.context.close()


def test_points_follow_a_drag_before_it_ends(shown: Page) -> None:
    shown.locator("#map-plot").scroll_into_view_if_needed()
    blue = (0x00, 0x72, 0xB2)
    before = np.argwhere((np.abs(pixels(shown, "#map-plot").astype(int) - blue) < 40).all(axis=2))
    box = shown.locator("#map-plot .nsewdrag").bounding_box()
    assert box is not None
    shown.mouse.move(box["x"] + 2, box["y"] + 2)
    shown.mouse.down()
    shown.mouse.move(box["x"] + 32, box["y"] + 22, steps=4)
    shown.wait_for_timeout(100)
    during = np.argwhere((np.abs(pixels(shown, "#map-plot").astype(int) - blue) < 40).all(axis=2))
    shown.mouse.up()
    shown.wait_for_timeout(100)
    assert during.min(axis=0) - before.min(axis=0) == pytest.approx([20, 30], abs=2)
    shown.locator("#map-home").click()


def test_dark_mode_switches_every_color(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report, color_scheme="dark")
    page = opened.page
    parts = ("header", "#map-plot", "#matrix-plot", "#classes-plot")
    dark = {part: pixels(page, part) for part in parts}
    for part, picture in dark.items():
        assert np.median(picture) < 60, part
    page.emulate_media(color_scheme="light")
    page.wait_for_function("() => document.documentElement.dataset.ready === '2'")  # a string is no code in this page
    for part in parts:
        assert np.median(pixels(page, part)) > 200, part
    assert opened.complaints == []
    opened.context.close()


def test_without_javascript_the_words_and_numbers_can_be_read(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report, java_script_enabled=False)
    text = opened.page.locator("body").inner_text()
    for words in ("Verdict", "need JavaScript", "Most self-influential", "R-hat, mean loss", "task: here", NAMES[0]):
        assert words in text
    shown = [image.evaluate("image => image.naturalWidth") for image in opened.page.locator("img").all()[:3]]
    assert shown == [8, 8, 8]
    opened.context.close()
