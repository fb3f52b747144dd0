"""Makes the pictures of the README and of the site's first page, from the report of a run on rendered people.

    python docs/make_pictures.py runs/tutorial/report.html

It needs the system's Chromium and the extra `test` (Playwright). The people are rendered: no photo of anybody is shown.
"""

import io
import pathlib
import shutil
import sys

from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright

FOLDER = pathlib.Path(__file__).resolve().parent / "pictures"
# Rank lists of typical queries follow those of as many worst ones; one of these is shown, and the first charts.
_LIST, _CHARTS = 3, 4
_EDGE = 16


def make(report: pathlib.Path, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes `rank_list.webp` and `report.webp`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 900}, device_scale_factor=1.5)
        page.goto(report.resolve().as_uri())
        lists = page.locator(".ranks")
        # First the one that is at the top: the other scrolls.
        pictures = {
            "report": _between(page, page.locator("h1"), page.locator(".chart").nth(_CHARTS - 1)),
            "rank_list": lists.nth(min(lists.count() // 2 + _LIST, lists.count() - 1)).screenshot(),
        }
        browser.close()
    paths = []
    for name, data in pictures.items():
        paths.append(folder / f"{name}.webp")
        Image.open(io.BytesIO(data)).convert("RGB").save(paths[-1], quality=82, method=6)
    return paths


def _between(page: Page, first: Locator, last: Locator) -> bytes:
    """A PNG of the page from the top of one element to the bottom of another."""
    top, bottom = first.bounding_box(), last.bounding_box()
    assert top is not None
    assert bottom is not None
    y = max(top["y"] - _EDGE, 0)
    clip = {"x": 0, "y": y, "width": 1180, "height": bottom["y"] + bottom["height"] + _EDGE - y}
    return page.screenshot(full_page=True, clip=clip)


if __name__ == "__main__":
    for made in make(pathlib.Path(sys.argv[1]), FOLDER):
        print(f"written: {made}")
