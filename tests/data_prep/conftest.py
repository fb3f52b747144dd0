"""Sources of LUPerson in any form."""

import io
import itertools

import pytest
from PIL import Image

from tests.data_prep import raw_copies
from tests.data_prep.luperson_case import SCENE


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """The function `raw(form, **options)`: a source in that form, and its labels."""
    folder = tmp_path_factory.mktemp("raw")
    made = {}

    def give(form="folder", **options):
        key = "-".join(map(str, [form, *itertools.chain(*sorted(options.items()))]))
        if key not in made:
            made[key] = folder / key, raw_copies.write("luperson", folder / key, SCENE, form=form, **options)["train"]
        return made[key]

    return give


@pytest.fixture
def pictures():
    """The function `pictures(folder, count, bad=())`: a tree of tiny images of which those in `bad` are cut short."""

    def write(folder, count, bad=()):
        for number in range(count):
            place = folder / f"c{number % 2}" / "city" / f"v{number % 6}"
            place.mkdir(parents=True, exist_ok=True)
            out = io.BytesIO()
            Image.new("RGB", (4, 8), (number % 256, number // 256, 0)).save(out, "jpeg")
            data = out.getvalue()
            (place / f"{number:06d}.jpg").write_bytes(data[: len(data) // 2] if number in bad else data)
        return folder

    return write
