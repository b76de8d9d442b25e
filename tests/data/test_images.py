"""Images of every source, and what is rejected."""

import csv
import io
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from fedlora.config.sections import Data
from fedlora.data import sources
from fedlora.data.fingerprint import fingerprint
from fedlora.data.images import decoded, image_reader
from fedlora.errors import UserError
from fedlora.tasks.image_classification import ImageClassification
from tiny_images import tiny_pictures

PIXELS, LABELS = tiny_pictures(9, (12, 10))
COLUMNS = ImageClassification().columns(())


def encoded(pixels, form="PNG", **more):
    image, file = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels), io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


def as_paths(folder):
    (folder / "img").mkdir()
    for i, one in enumerate(PIXELS):
        (folder / f"img/{i}.png").write_bytes(encoded(one))
    with (folder / "rows.csv").open("w") as file:
        csv.writer(file).writerows([("image", "label"), *((f"img/{i}.png", label) for i, label in enumerate(LABELS))])
    return str(folder / "rows.csv"), None


def as_npz(folder):
    np.savez(folder / "rows.npz", image=PIXELS, label=LABELS)
    return str(folder / "rows.npz"), None


def as_parquet(folder):
    rows = [{"image": {"bytes": encoded(x), "path": None}, "label": int(y)} for x, y in zip(PIXELS, LABELS, strict=True)]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return str(folder / "rows.parquet"), None


def as_data_set(folder):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": encoded(one), "path": None} for one in PIXELS], "label": LABELS.tolist()}
    return "memory", datasets.Dataset.from_dict(rows, features)


def as_rows(make):
    return lambda folder: ("memory", [{"image": make(x), "label": y} for x, y in zip(PIXELS, LABELS, strict=True)])


SOURCES = {
    "paths": as_paths,
    "npz": as_npz,
    "parquet": as_parquet,
    "data set": as_data_set,
    "arrays": as_rows(lambda x: x),
    "pillow": as_rows(Image.fromarray),
    "bytes": as_rows(encoded),
}


def load(source, rows=None):
    return sources.load(Data(source=source, test_fraction=0.2), 0, COLUMNS, rows)


def rejection(source, rows=None):
    with pytest.raises(UserError) as error:
        load(source, rows)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_images(source, tmp_path):
    data = load(*SOURCES[source](tmp_path))
    found = [*data.train.to_list(), *data.test.to_list()]
    pixels = {np.asarray(decoded(row["image"])).tobytes(): row["label"] for row in found}
    assert pixels == {one.tobytes(): label for one, label in zip(PIXELS, LABELS, strict=True)}
    assert data.labels == ("0", "1", "2")


def test_a_client_s_own_file_is_read_with_the_run_s_labels(tmp_path):
    found = sources.load_own(Data(), as_paths(tmp_path)[0], ["0", "1", "2"], 0, COLUMNS)
    assert found["label"][:] == LABELS.tolist()
    assert all(np.array_equal(np.asarray(decoded(x)), y) for x, y in zip(found["image"][:], PIXELS, strict=True))


def test_another_pixel_is_another_fingerprint():
    rows = as_rows(lambda x: x)(None)[1]
    before = fingerprint(load("memory", rows).train)
    assert fingerprint(load("memory", rows).train) == before
    changed = [{**row, "image": row["image"] ^ 1} for row in rows]
    assert fingerprint(load("memory", changed).train) != before


@pytest.mark.parametrize(
    ("mode", "form", "wanted"),
    [
        ("1", "PNG", "L"),
        ("L", "JPEG", "L"),
        ("LA", "PNG", "L"),
        ("P", "GIF", "RGB"),
        ("RGB", "BMP", "RGB"),
        ("RGBA", "PNG", "RGB"),
        ("CMYK", "JPEG", "RGB"),
    ],
)
def test_images_become_grey_or_rgb(mode, form, wanted):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8))
    found = decoded(image_reader(None)(encoded(image.convert(mode), form)))
    assert (found.mode, found.size) == (wanted, (6, 8))


def test_a_transparent_palette_gives_the_colors_of_the_palette():
    image = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    found = decoded(encoded(image, transparency=bytes([0, 255, 128, 255])))
    assert np.asarray(found).reshape(-1, 3).tolist() == [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_a_photo_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decoded(encoded(PIXELS[0], exif=exif)).size == (12, 10) == PIXELS[0].shape


def test_a_photo_in_memory_is_turned_upright_as_its_file_is():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    file = encoded(PIXELS[0], exif=exif)
    in_memory = decoded(image_reader(None)(Image.open(io.BytesIO(file))))
    assert np.array_equal(np.asarray(in_memory), np.asarray(decoded(file)))


BROKEN = {
    "cut.png": (encoded(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8))[:900], "is not readable"),
    "cut.jpg": (encoded(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8), "JPEG")[:900], "is not readable"),
    "text.png": (b"hello", "its format is unknown"),
    "deep.png": (encoded(PIXELS[0].astype(np.uint16) << 8), "8 bits per channel"),
    "deep.tiff": (encoded(PIXELS[0].astype(np.float32), "TIFF"), "8 bits per channel"),
    "none.png": (None, "cannot be read: No such file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_unreadable_image_is_rejected_with_its_row_and_its_file(name, tmp_path):
    source, _ = as_paths(tmp_path)
    content, reason = BROKEN[name]
    Path(source).write_text(Path(source).read_text().replace("img/3.png", f"img/{name}"))
    if content is not None:
        (tmp_path / "img" / name).write_bytes(content)
    found = rejection(source)
    assert f"row 4 names the image 'img/{name}', which " in found and reason in found


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (None, "has no image"),
        (" ", "has no image"),
        (float("nan"), "has no image"),
        ({"bytes": None, "path": None}, "has no image"),
        (7, "of type int, not an image"),
        ("img/1.png", "has a relative path"),
        (b"hello", "has an image that is not readable"),
        (Image.new("F", (4, 4)), "8 bits per channel"),
        (PIXELS[0].astype(np.float32), "pixels of type float32"),
        (PIXELS[0].astype(np.uint16), "pixels of type uint16"),
        (PIXELS[:1], r"shape [1, 12, 10]"),
        (PIXELS[0][:0], r"shape [0, 10]"),
    ],
)
def test_a_cell_without_an_image_is_rejected_with_its_row(cell, reason):
    rows = as_rows(lambda x: x)(None)[1]
    rows[1] = {"image": cell, "label": 1}
    found = rejection("memory", rows)
    assert "row 2 " in found and reason in found


def test_an_image_that_would_fill_the_memory_is_rejected(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="more than 100 pixels"):
        image_reader(None)(encoded(PIXELS[0]))


def test_reading_holds_images_once_as_files_and_once_as_a_data_set():
    pixels = np.random.default_rng(0).integers(0, 256, (600, 40, 40, 3), np.uint8)
    rows = [{"image": one, "label": i % 3} for i, one in enumerate(pixels)]
    load("memory", rows[:9])  # what is made once
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        data = load("memory", rows)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(data.train) + len(data.test) == 600
    assert most < 1.5 * pixels.size and pa.total_allocated_bytes() - before < 1.5 * pixels.size


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"image": PIXELS, "label": LABELS[:5]}, "different lengths"),
        ({"image": PIXELS, "label": np.array(3)}, "no axis"),
        ({"image": PIXELS, "label": np.array([{}] * 9)}, "not readable"),
    ],
)
def test_arrays_that_are_no_table_are_rejected(arrays, reason, tmp_path):
    np.savez(tmp_path / "rows.npz", **arrays)
    assert reason in rejection(str(tmp_path / "rows.npz"))


def test_a_file_that_is_no_npz_is_rejected(tmp_path):
    (tmp_path / "rows.npz").write_bytes(b"PK\3\4 and nothing")
    assert "not readable" in rejection(str(tmp_path / "rows.npz"))
