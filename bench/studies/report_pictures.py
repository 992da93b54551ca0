"""The pictures of docs/report.md: a report in headless Chromium, at the size of a laptop's screen.

    python -m bench.studies.report_pictures fashion.html --out docs/images

Needs lossk[dev] and Chromium. No GPU is needed.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

SCREEN = {"width": 1366, "height": 768}
FLAGS = ["--no-sandbox", "--disable-gpu"]
MOST_BYTES = 380_000  # of a picture; larger ones are reduced to 256 colors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("report", type=Path, help="an HTML file of `lossk report`")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_context(viewport=SCREEN, offline=True, color_scheme="light").new_page()
        page.goto(options.report.resolve().as_uri())
        settle(page, "1")
        take(page, options.out / "report_top.png")
        card = page.locator("ol.cards").last.locator("a").first
        page.fill("#sample-number", card.get_attribute("data-sample") or "0")
        page.keyboard.press("Enter")
        for part in ("map", "look", "classes"):
            show(page, part)
            take(page, options.out / f"report_{part}.png")
        page.emulate_media(color_scheme="dark")
        settle(page, "2")
        show(page, "matrix")
        box = page.locator("#matrix-plot .nsewdrag").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.6 * box["height"])
        page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.65 * box["height"])
        take(page, options.out / "report_matrix_dark.png")
        browser.close()


def settle(page: Page, drawn: str) -> None:
    """Wait until everything has been drawn for the first, or the second, time."""
    page.wait_for_selector(f"html[data-ready='{drawn}'] #details h3", state="attached", timeout=300_000)
    page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")


def show(page: Page, part: str) -> None:
    """Bring a part of the page to the top of the window."""
    page.evaluate(f"document.getElementById('{part}').scrollIntoView()")


def take(page: Page, path: Path) -> None:
    """Write what the window shows."""
    page.wait_for_timeout(1500)  # images are decoded when first needed
    shown = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    shown.save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        shown.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
