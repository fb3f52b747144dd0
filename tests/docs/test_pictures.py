"""The pictures of the README and of the site: small, described, and made by the script beside them."""

import importlib.util
import re
import shutil

import pytest
from PIL import Image

from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "pictures"


@pytest.mark.parametrize(("page", "folder"), [("README.md", "docs/pictures"), ("docs/index.md", "pictures")])
def test_every_picture_is_shown_and_described(page, folder):
    shown = dict(re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", (ROOT / page).read_text(encoding="utf-8")))
    assert sorted(shown.values()) == sorted(f"{folder}/{path.name}" for path in FOLDER.iterdir())
    assert min(map(len, shown)) > 40


def test_they_are_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000


def test_the_script_makes_them(tmp_path):
    pytest.importorskip("playwright.sync_api")
    if not shutil.which("chromium"):
        pytest.skip("no Chromium on this system (Debian's package is chromium)")
    found = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs" / "make_pictures.py")
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    report = tmp_path / "report.html"
    charts = "".join(f'<p class="chart">{number}</p>' for number in range(6))
    lists = "".join(f'<div class="ranks">{number}</div>' for number in range(20))
    report.write_text(f"<h1>A report</h1>{charts}{lists}")
    made = script.make(report, tmp_path / "pictures")
    assert sorted(path.name for path in made) == sorted(path.name for path in FOLDER.iterdir())
    for path in made:
        with Image.open(path) as picture:
            assert picture.width > 1000
            assert picture.height > 20
