"""The report is complete, self-contained, escaped, and never half-written."""

import base64
import dataclasses
import html.parser
import io
import itertools
import pathlib
import re
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.evaluation import report, thresholds
from dmosnet_jax.evaluation.ranking import CameraPairs
from dmosnet_jax.evaluation.report_charts import describe, draw_svg

RESULTS = {
    "mAP": 0.82764,
    "rank1": 0.9185,
    "rank5": 0.9805,
    "rank10": 0.9895,
    "mINP": float("nan"),
    "num_query": 2467,
    "num_valid_query": 2465,
    "num_gallery": 15913,
    "reranked_mAP": 0.9,
}
VOID = {"meta", "img", "br", "input"}


class _Page(html.parser.HTMLParser):
    """Collects tags and visible text, and checks that tags nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _encoded(rng: np.random.Generator, kind: str, size=(128, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def _rank_lists(rng: np.random.Generator, lists: int = 10) -> list[report.RankList]:
    """The first two have activation maps."""
    images = [_encoded(rng, "JPEG"), _encoded(rng, "PNG", (900, 400)), rng.integers(0, 255, (128, 64, 3), np.uint8)]
    items = [report.RankItem(images[rank % 3], f"id {rank} & camera <{rank}>", rank % 4 == 0) for rank in range(10)]
    mapped = [dataclasses.replace(item, activation=rng.random((16, 8), np.float32)) for item in items]
    own = rng.random((16, 8), np.float32)
    return [
        report.RankList(images[0], f"id {number}", *((mapped, "", own) if number < 2 else (items,)))
        for number in range(lists)
    ]


PAIRS = CameraPairs(
    np.array([1, 2]),
    np.array([1, 2, 7]),
    np.array([[np.nan, 0.75, 1.0], [0.5, np.nan, np.nan]]),
    np.array([[0, 12, 3456], [8, 0, 0]]),
)


def _embedding(rng: np.random.Generator, points: int = 12) -> report.EmbeddingMap:
    images = [_encoded(rng, "JPEG") for _ in range(points)]
    places = rng.normal(size=(points, 2))
    shown = [
        report.MapPoint(image, f"id {row // 3}, camera {row % 4}, <{row}>", tuple(place), row % 4, row // 3)
        for row, (image, place) in enumerate(zip(images, places.tolist(), strict=True))
    ]
    return report.EmbeddingMap(shown, (0.25, 0.125), f"{points} of 99 images.")


def _clusters(rng: np.random.Generator) -> report.Clusters:
    def sheet(*matches: bool | None) -> report.ClusterSheet:
        items = [report.RankItem(_encoded(rng, "JPEG"), f"image <{n}>", match) for n, match in enumerate(matches)]
        return report.ClusterSheet(f"{len(items)} images, mean cosine 0.812", items)

    sheets = {"Largest clusters": [sheet(True, True, False), sheet(None, None)], "Mixed": [sheet(*[False] * 8)]}
    return report.Clusters("Epoch 7 & last.", [("2 to 3", 1200), ("4 to 7", 300)], sheets | {"None": []})


def _write(folder: pathlib.Path, rng: np.random.Generator) -> str:
    rows = [{"step": step, "train/loss": 5.0 / (step + 1), "lr": 3.5e-4, "seconds": 1.0} for step in range(40)]
    rows += [{"step": 10 * epoch, "mAP": 0.3 + 0.01 * epoch} for epoch in range(4)]
    rows += [{"step": epoch, "epoch": epoch, "clusters": 528 - epoch, "pseudo_nmi": 0.5} for epoch in range(4)]
    path = report.write_report(
        folder / "new" / "report.html",
        title='<script>alert("x")</script> & co',
        subtitle="market1501 'qq'",
        results=RESULTS,
        cmc=np.linspace(0.9, 1.0, 50),
        curves=[*report.charts_from_metrics(rows), *report.cluster_charts(rows)],
        rank_lists={"Rank lists": _rank_lists(rng)},
        clusters=_clusters(rng),
        pairs=PAIRS,
        embedding=_embedding(rng),
        network={"parameters": "201,864"},
        command="python -m dmosnet_jax.main --config.checkpoint='a <b>'",
        config={"dataset": "<b>", "model": {"name": "osnet_x0_25", "attention": (1, 0, 0)}, "empty": {}},
    )
    return path.read_text(encoding="utf-8")


def test_page_holds_every_part(tmp_path, rng):
    page = _Page(_write(tmp_path, rng))
    text = re.sub(r"\s+", " ", " ".join(page.text))
    for part in ("82.76", "91.85", "98.05", "98.95", "n/a", "2,467 queries", "2,465 with a match", "15,913 gallery"):
        assert part in text
    for part in ("Cumulative matching characteristic", "Loss", "Accuracy", "Clusters", "Learning rate", "Rank lists"):
        assert part in text
    for part in ("model.name osnet_x0_25", "model.attention (1, 0, 0)", "reranked_mAP 0.9", "empty {}", "numpy 2."):
        assert part in text
    for part in ("Pairs of cameras", "75.0 12 100.0 3,456", "across, 25.0 % of their variance; up, 12.5 %", "201,864"):
        assert part in text
    assert "python -m dmosnet_jax.main --config.checkpoint='a <b>'" in text
    for part in ("Epoch 7 & last.", "2 to 3 1,200 4 to 7 300", "Largest clusters 3 images, mean cosine 0.812"):
        assert part in text
    assert len(page.all("img")) == (10 + 2) * 11 + 13 + 12
    frames = [attributes.get("class") for attributes in page.all("figure")]
    assert (frames.count("query"), frames.count("match"), frames.count("miss"), frames.count("chart")) == (
        10,
        30 + 2,
        70 + 1 + 8,
        6,
    )


def test_page_is_self_contained_and_escaped(tmp_path, rng):
    text = _write(tmp_path, rng)
    page = _Page(text)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"} == set()
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for attributes in page.all("img"))
    references = [value for _, attributes in page.tags for name, value in attributes.items() if name.endswith("href")]
    assert all(value.startswith("#") for value in references)
    assert not re.search(r"url\((?!#|\"#|'#)", text)
    assert "@import" not in text
    assert '&lt;script&gt;alert("x")' in re.sub("&#34;", '"', text)
    assert [attributes for attributes in page.all("meta") if attributes.get("http-equiv") == "Content-Security-Policy"]


def test_every_image_and_chart_has_a_description(tmp_path, rng):
    page = _Page(_write(tmp_path, rng))
    # What an activation map shows beyond its picture has no words: readers who cannot see it are spared its name.
    maps = [attributes for attributes in page.all("img") if attributes.get("class") == "heat"]
    assert {attributes["alt"] for attributes in maps} == {""}
    alternatives = [attributes["alt"] for attributes in page.all("img") if attributes not in maps]
    assert all(alternatives)
    assert alternatives[:3] == [
        "Query: id 0",
        "Rank 1, same person: id 0 & camera <0>",
        "Rank 2, another person: id 1 & camera <1>",
    ]
    labels = [attributes["aria-label"] for attributes in page.all("svg")]
    assert labels[0].startswith(
        "Cumulative matching characteristic, queries matched (%) over rank: matching rate goes from 90 at 1"
    )
    assert len(labels) == 6
    clusters = [text for text in alternatives if "image <" in text]
    assert clusters[:4] == [
        "The person of most images: image <0>",
        "The person of most images: image <1>",
        "Another person: image <2>",
        "image <0>",
    ]


def test_maps_lie_over_their_pictures(tmp_path, rng):
    text = _write(tmp_path, rng)
    page = _Page(text)
    boxes = [given["id"] for given in page.all("input") if given.get("class") == "look"]
    assert boxes == [given["for"] for given in page.all("label") if given["for"].startswith("look")]
    assert len(set(boxes)) == 2
    images = page.all("img")
    sizes = []
    for picture, heat in itertools.pairwise(images):
        if heat.get("class") == "heat":
            sizes += [
                [Image.open(io.BytesIO(base64.b64decode(one["src"].partition(",")[2]))).size for one in (picture, heat)]
            ]
            assert len(heat["src"]) < 1300
    assert len(sizes) == 22
    # Of the same proportions, so that the browser fits both into the same place.
    assert {(width / height, wide / high) for (width, height), (wide, high) in sizes if width == 64} == {(0.5, 0.5)}
    for (width, height), (wide, high) in sizes:
        assert width / height == pytest.approx(wide / high, abs=0.02)
    assert "show where the network looks" in text
    plain = report.write_report(tmp_path / "p.html", title="t", results={}, rank_lists={"A": _rank_lists(rng)[2:]})
    assert "where the network looks" not in plain.read_text()


def test_points_of_the_map_lie_in_order_and_in_place(tmp_path, rng):
    embedding = _embedding(rng)
    path = report.write_report(tmp_path / "r.html", title="t", results={}, embedding=embedding)
    points = [given for given in _Page(path.read_text()).all("input") if given["name"] == "point"]
    places = np.array([point.place for point in embedding.points])
    order = np.argsort(places[:, 0])
    assert [given["aria-label"] for given in points] == [embedding.points[row].caption for row in order]
    shown = [[float(value) for value in re.findall(r"(?:left|bottom):([\d.]+)%", given["style"])] for given in points]
    spread = (places - places.min(axis=0)) / np.ptp(places, axis=0)
    np.testing.assert_allclose(shown, 2 + 96 * spread[order], atol=0.051)


def test_pictures_have_a_bound_of_bytes(rng):
    noise = rng.integers(0, 255, (800, 400, 3), np.uint8)
    assert len(base64.b64decode(report.thumbnail(noise, "n"))) <= 6000
    assert len(base64.b64decode(report.thumbnail(noise, "n", (64, 96), 1600))) <= 1600


def test_the_characteristic_is_drawn_from_nothing_to_all():
    labels = [np.array(part) for part in ([1], [1, 1, 2, 2], [1], [2, 2, 1, 2])]
    found = thresholds.evaluate(None, None, *labels, distance=np.array([[0.1, 0.3, 0.7, 0.8]], np.float32))
    chart = report.roc_chart(found)
    assert chart.y_range[0] == 0
    (line,) = chart.lines
    assert (line.x[0], line.y[0], line.x[-1], line.y[-1]) == (0, 0, 100, 100)
    # What no axis of powers can show is left out, and said of neither picture nor words.
    assert "from 100 at 50" in describe(chart)
    assert draw_svg(chart, "a").startswith("<svg")


def test_identifiers_of_charts_do_not_clash(tmp_path, rng):
    text = _write(tmp_path, rng)
    # Groups are named by what they hold; only definitions are referred to.
    defined = re.findall(r'<(?:clipPath|path|use) id="([^"]+)"', text)
    assert len(defined) == len(set(defined)) > 10
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(defined)


def test_the_similarities_of_pairs_are_drawn():
    labels = [np.array(part) for part in ([1], [1, 1, 2, 2], [1], [2, 2, 1, 2])]
    found = thresholds.evaluate(None, None, *labels, distance=np.array([[0.1, 0.3, 0.7, 0.8]], np.float32))
    chart = report.similarity_chart(found)
    assert [line.label for line in chart.lines] == ["same person", "different people"]
    assert [sum(line.y) for line in chart.lines] == [100, 100]
    # Two bins with one pair each, the others empty.
    assert [sorted(line.y)[-3:] for line in chart.lines] == [[0, 50, 50], [0, 50, 50]]
    assert chart.lines[0].x[int(np.argmax(chart.lines[0].y))] == pytest.approx(0.7, abs=1 / 64)
    svg = draw_svg(chart, "a")
    # Similarities are no whole numbers.
    assert ">0.45<" in svg


def test_charts_take_the_colour_of_the_page():
    svg = draw_svg(report.Chart("T", "step", "a $x$ <b>", [report.Line("_l", [0, 1, 2], [1, np.nan, 3])]), "s")
    root = ET.fromstring(svg)
    assert "height" not in root.attrib
    assert "viewBox" in root.attrib
    assert "currentColor" in svg
    assert "#000000" not in svg
    assert "a $x$ <b>" in "".join(root.itertext())


def test_long_and_broken_lines_are_thinned():
    chart = report.Chart("T", "step", "y", [report.Line("l", range(100_000), [*[1.0] * 99_998, float("inf"), 7.0])])
    assert len(draw_svg(chart, "s")) < 60_000
    assert "to 7 at 99999" in describe(chart)
    assert "no points" in describe(report.Chart("T", "x", "y", [report.Line("l", [1], [float("nan")])]))


def test_charts_from_metrics_groups_and_ignores():
    rows = [
        {"step": 1, "loss": 2.0, "note": "text", "mAP": 0.1, "flag": True},
        {"step": 2, "loss": float("nan"), "mAP": 0.2, "rank1": 0.3},
        {"loss": 9.0},
        {"step": 3, "loss": 1.0, "seconds": 4.0},
    ]
    charts = report.charts_from_metrics(rows)
    assert [(chart.title, [line.label for line in chart.lines]) for chart in charts] == [
        ("Loss", ["loss"]),
        ("Accuracy", ["mAP"]),
    ]
    assert list(charts[0].lines[0].x) == [1, 3]
    assert list(charts[0].lines[0].y) == [2, 1]


def test_charts_of_clusters_are_by_epoch_from_1():
    rows = [{"step": 9 * n + 1, "epoch": n, "clusters": 5 + n, "unclustered": 7, "pseudo_nmi": 0.5} for n in range(3)]
    rows.insert(1, {"step": 4, "epoch": 0, "loss": 1.0})
    charts = report.cluster_charts(rows)
    found = [(chart.title, chart.x_label, [line.label for line in chart.lines]) for chart in charts]
    assert found == [
        ("Clusters", "epoch", ["clusters", "unclustered"]),
        ("Pseudo-labels against identities", "epoch", ["nmi"]),
    ]
    assert list(charts[0].lines[0].x) == [1, 2, 3]
    assert list(charts[0].lines[0].y) == [5, 6, 7]
    assert report.cluster_charts(rows[:1]) == []


def test_same_input_gives_the_same_page(tmp_path):
    pages = [_write(tmp_path / name, np.random.default_rng(3)) for name in "ab"]
    assert pages[0] == pages[1]


def test_bad_image_is_named_and_leaves_nothing(tmp_path, rng):
    lists = [report.RankList(_encoded(rng, "JPEG"), "q", [report.RankItem(b"not an image", "id 7", match=True)])]
    with pytest.raises(DataError, match="Rank 1, same person: id 7"):
        report.write_report(tmp_path / "report.html", title="t", results=RESULTS, rank_lists={"Rank lists": lists})
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_old_page(tmp_path):
    folder = tmp_path / "report.html"
    folder.mkdir()
    (folder / "kept").touch()
    with pytest.raises(DataError, match="can't be written"):
        report.write_report(folder, title="t", results=RESULTS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert (folder / "kept").exists()


def test_results_alone_make_a_page(tmp_path):
    page = _Page(report.write_report(tmp_path / "r.html", title="t", results={"mAP": None}, versions={}).read_text())
    assert page.all("svg") == page.all("img") == page.all("table") == []


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_in_a_browser(tmp_path, rng, width, scheme):
    browsers = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this system (Debian's package is chromium)")
    _write(tmp_path, rng)
    complaints = []
    with browsers.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if "data:" not in request.url else None)
        page.goto((tmp_path / "new" / "report.html").as_uri())
        widths = page.evaluate("[...document.images].map(one => one.naturalWidth)")
        assert min(widths) > 0
        # Wide parts scroll by themselves.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = "[...document.querySelectorAll('.plot img')].filter(one => one.offsetParent).map(one => one.alt)"
        captions = page.eval_on_selector_all(".plot input", "all => all.map(one => one.ariaLabel)")
        assert page.evaluate(shown) == []
        # Without a mouse: the group is one stop, in which the arrows go from image to image.
        page.focus("#by-camera")
        page.keyboard.press("Tab")
        assert page.evaluate(shown) == captions[:1]
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert page.evaluate(shown) == captions[2:3]
        colour = "getComputedStyle(document.querySelector('.plot input')).backgroundColor"
        by_camera = page.evaluate(colour)
        page.check("#by-identity")
        assert page.evaluate(colour) != by_camera
        # The box of a list, found by Tab and ticked by Space, shows the maps of that list alone, each where its picture
        # is.
        places = """[...document.querySelectorAll('.heat')].filter(one => one.offsetParent).map(one =>
            [one, one.previousElementSibling].map(each => Object.values(each.getBoundingClientRect().toJSON())))"""
        assert page.evaluate(places) == []
        page.click("text=Best gallery images")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "look"
        page.keyboard.press("Space")
        assert len(page.evaluate(places)) == 11
        assert all(heat == picture for heat, picture in page.evaluate(places))
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "scroll"
        # The longest bar fills its cell, and no row has two lines.
        bars = page.evaluate(
            """[...document.querySelectorAll('.sizes i')].map(one => [one, one.parentElement].map(each => {
            const {left, right, height} = each.getBoundingClientRect(); return [left, right, height]}))"""
        )
        (longest, cell), (other, _) = bars
        assert longest[1] - longest[0] == pytest.approx(cell[1] - cell[0], abs=20)
        assert longest[1] - longest[0] == pytest.approx(4 * (other[1] - other[0]), abs=3)
        assert all(bar[1] <= cell[1] and cell[2] < 40 for bar, cell in bars)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.width == width
        assert len(shot.convert("RGB").getcolors(2**24)) > 100
    # The page itself is all that was asked for.
    assert len(complaints) == 1, complaints
    assert complaints[0].endswith("report.html")
