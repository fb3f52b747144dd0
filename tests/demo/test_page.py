"""The page: what it answers to forms and to abuse, and a browser that uploads, clicks and looks."""

import io
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import dmosnet_jax
from dmosnet_jax import models
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.data import augment
from dmosnet_jax.demo import __main__ as command
from dmosnet_jax.export import folder
from tests.models.drawn import draw_tree

testclient = pytest.importorskip("starlette.testclient")
app = pytest.importorskip("dmosnet_jax.demo.app")

SIZE = (64, 32)
HOME = "http://127.0.0.1"


def jpeg(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "jpeg", quality=95)
    return out.getvalue()


@pytest.fixture(scope="module")
def folder_of_weights(tmp_path_factory):
    model = models.build("osnet_x0_25", neck="fc", image_size=SIZE)
    params, stats = (draw_tree(tree, np.random.default_rng(0)) for tree in model.shapes())
    path = tmp_path_factory.mktemp("demo") / "network"
    card = folder.Card(model, mean=augment.IMAGENET_MEAN, std=augment.IMAGENET_STD, threshold=0.9999)
    folder.save(path, params, stats, card)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Files of eight photos of plain colours under noise."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("photos")
    for number in range(8):
        noisy = rng.integers(0, 256, 3) + rng.normal(0, 20, (120, 60, 3))
        (path / f"photo {number} <b>.jpg").write_bytes(jpeg(noisy.clip(0, 255).astype(np.uint8)))
    return sorted(path.iterdir())


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, folder_of_weights, photos):
    extractor = dmosnet_jax.load(folder_of_weights)
    path = tmp_path_factory.mktemp("gallery") / "gallery"
    made = dmosnet_jax.Gallery.create(
        path, fingerprint=extractor.fingerprint, feature_dim=512, checkpoint=str(folder_of_weights)
    )
    made.append(extractor(photos), [photo.name for photo in photos], root=str(photos[0].parent))
    return made


@pytest.fixture(scope="module")
def extractor(folder_of_weights):
    return dmosnet_jax.load(folder_of_weights)


@pytest.fixture
def client(extractor, gallery):
    with testclient.TestClient(app.create(extractor, gallery, top_k=3), base_url=HOME) as opened:
        yield opened


def files(**uploads):
    return {field: (name, data, "image/jpeg") for field, (name, data) in uploads.items()}


def similarity(page):
    return float(re.search(r'id="similarity">(-?\d\.\d{3})<', page).group(1))


def test_two_photos(client, extractor, photos):
    first, second = (photo.read_bytes() for photo in photos[:2])
    answer = client.post("/compare", files=files(first=("a.jpg", first), second=("b.jpg", second)))
    assert answer.status_code == 200
    features = unit_rows_np(extractor(photos[:2]))
    assert similarity(answer.text) == pytest.approx(features[0] @ features[1], abs=6e-4)
    assert "✗ taken for different people" in answer.text
    itself = client.post("/compare", files=files(first=("a.jpg", first), second=("b.jpg", first)))
    assert similarity(itself.text) == 1
    assert "✓ taken for the same person" in itself.text


def test_without_a_threshold_there_is_no_verdict(extractor, gallery, photos, monkeypatch):
    monkeypatch.setattr(extractor, "threshold", None)
    data = photos[0].read_bytes()
    with testclient.TestClient(app.create(extractor, gallery), base_url=HOME) as client:
        page = client.post("/compare", files=files(first=("a.jpg", data), second=("b.jpg", data))).text
    assert similarity(page) == 1
    assert "verdict" not in page.partition("<body>")[2].replace('class="verdict "', "")
    assert "no threshold known" in page


def test_a_photo_and_its_ranking(client, photos):
    answer = client.post("/search", files=files(photo=("me & you.jpg", photos[5].read_bytes())))
    assert answer.status_code == 200
    ranks = re.findall(r'alt="Rank (\d): ([^"]*)"', answer.text)
    assert [rank for rank, _ in ranks] == ["1", "2", "3"]
    # Names are text.
    assert ranks[0][1] == "photo 5 &lt;b&gt;.jpg"
    assert "me &amp; you.jpg" in answer.text
    scores = [float(score) for score in re.findall(r'class="score">(-?\d\.\d{3})<', answer.text)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(1, abs=2e-3)


def test_photos_that_are_gone_are_told(extractor, gallery, photos, tmp_path):
    moved = shutil.copytree(gallery.path, tmp_path / "gallery")
    manifest = moved / "gallery.json"
    manifest.write_text(manifest.read_text().replace(str(photos[0].parent), "/nowhere"))
    page = app.create(extractor, dmosnet_jax.Gallery.open(moved), top_k=2)
    with testclient.TestClient(page, base_url=HOME) as client:
        answer = client.post("/search", files=files(photo=("a.jpg", photos[0].read_bytes())))
    assert answer.text.count("not here any more") == 2


def test_without_a_gallery(extractor, photos):
    with testclient.TestClient(app.create(extractor), base_url=HOME) as client:
        assert 'action="/search"' not in client.get("/").text
        answer = client.post("/search", files=files(photo=("a.jpg", photos[0].read_bytes())))
    assert answer.status_code == 404
    assert "start the page with --index=GALLERY" in answer.text


@pytest.mark.parametrize(
    ("uploads", "status", "part"),
    [
        ({"first": ("a.jpg", b"\xff\xd8\xff\xe0 no photo")}, 400, "no photo chosen (second)"),
        ({"first": ("a.jpg", b"\xff\xd8\xff"), "second": ("b<i>.jpg", b"x")}, 400, "a.jpg: "),
        ({"first": ("", b""), "second": ("b.jpg", b"x")}, 400, "no photo chosen (first)"),
        ({"first": ("a.jpg", b"x" * 2**20), "second": ("b.jpg", b"x" * (app.MAX_BYTES))}, 413, "more than 32 MiB"),
        ({"first": ("a.svg", b"<svg/>"), "second": ("b.jpg", b"x")}, 400, "not an image in one of the formats"),
    ],
)
def test_uploads_that_are_no_photos(client, uploads, status, part):
    answer = client.post("/compare", files=files(**uploads))
    assert answer.status_code == status
    assert part in answer.text
    assert 'role="alert"' in answer.text
    assert "<i>" not in answer.text


def test_too_many_pixels_are_not_decoded(client, photos):
    huge = b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    huge += (2**15).to_bytes(4, "little") * 2 + b"\x01\x00\x18\x00" + bytes(24)
    answer = client.post("/search", files=files(photo=("a.bmp", huge)))
    assert answer.status_code == 400
    assert re.search(r"pixels (are more than|.*exceeds limit)|exceeds limit", answer.text)


def test_more_files_than_the_form_has(client, photos):
    data = photos[0].read_bytes()
    many = [("photo", (f"{number}.jpg", data, "image/jpeg")) for number in range(3)]
    assert client.post("/search", files=many).status_code == 400


def test_the_page_lets_nothing_in(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "<script" not in answer.text
    assert not re.search(r'(?:src|href)="(?!data:)', answer.text)
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"host": "localhost:7860"}).status_code == 200
    assert client.get("/nowhere").status_code == 404


def test_refusals_of_the_command(folder_of_weights, gallery, tmp_path, capsys):
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    other = dmosnet_jax.Gallery.create(tmp_path / "other", fingerprint="x", feature_dim=512)
    cases = [
        ([], 2, "--checkpoint is not set"),
        (["--index=nowhere"], 1, "nowhere: is no gallery"),
        (["--checkpoint=nowhere.pth"], 1, "nowhere.pth"),
        ([f"--checkpoint={folder_of_weights}", f"--port={port}"], 2, f"--port={port}: can't be served on"),
        ([f"--checkpoint={folder_of_weights}", "--port=99999"], 2, "--port=99999: can't be served on"),
        ([f"--index={other.path}", f"--checkpoint={folder_of_weights}"], 1, "was made by other weights"),
    ]
    for arguments, status, part in cases:
        assert command.main(arguments) == status
        error = capsys.readouterr().err
        assert part in error
        assert error.count("\n") == 1
    taken.close()


@pytest.fixture(scope="module")
def served(gallery):
    """The command, serving; yields its address."""
    arguments = ["-m", "dmosnet_jax.demo", f"--index={gallery.path}", "--port=0"]
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().split()[0]
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.slow
def test_in_a_browser(served, photos, tmp_path):
    browsers = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this system (Debian's package is chromium)")
    with browsers.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        complaints = []
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(served)
        page.set_input_files("#compare input[name=first]", photos[0])
        page.set_input_files("#compare input[name=second]", photos[0])
        page.click("#compare button")
        page.wait_for_selector("#pair")
        assert page.inner_text("#similarity") == "1.000"
        assert "same person" in page.inner_text("#verdict")
        page.set_input_files("#search input", photos[3])
        page.click("#search button")
        page.wait_for_selector("#ranking")
        names = page.eval_on_selector_all("#ranking figure small", "all => all.map(one => one.innerText)")
        assert names[:2] == [photos[3].name] * 2
        assert len(names) == 1 + len(photos)
        widths = page.eval_on_selector_all("#ranking img", "all => all.map(one => one.naturalWidth)")
        assert min(widths) > 0
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    with Image.open(tmp_path / "page.png") as shot:
        assert min(shot.size) > 300
        assert len(shot.convert("RGB").getcolors(2**24)) > 100
    # The favicon that browsers ask for on their own is not there.
    assert [text for text in complaints if "404" not in text] == []
