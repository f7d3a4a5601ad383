"""Windows of rasters against the arrays that were written."""

import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from moco.data.files.images import UnreadableImage
from moco.data.files.listing import PathList
from moco.data.sources import source as sources
from moco.data.sources import tiles
from moco.data.sources.registry import build_source
from moco.errors import InputError

tifffile = pytest.importorskip("tifffile")

OPTIONS = {"photometric": "minisblack", "planarconfig": "contig"}
SIZES = {"a.tif": (50, 70), "b.tif": (16, 16), "c.tif": (10, 40), "d.tif": (32, 48)}


@pytest.fixture
def rasters(tmp_path, generator):
    """Rasters of five bands by name; a third of them in tiles on disk."""
    arrays = {}
    for number, (name, size) in enumerate(SIZES.items()):
        arrays[name] = generator.integers(-500, 10_000, (*size, 5), dtype=np.int16)
        options = {"tile": (16, 16), "compression": "zlib"} if number % 3 == 0 else {}
        tifffile.imwrite(tmp_path / name, arrays[name], **OPTIONS, **options)
    return arrays


def test_the_windows_cover_every_pixel_and_are_equal_to_the_raster(rasters, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="moco")
    images = build_source("images", str(tmp_path), tile=16).train
    images = pickle.loads(pickle.dumps(images))
    assert len(images) == 4 * 5 + 1 + 3 + 2 * 3
    assert "data.tile=16: 30 windows of 4 files" in caplog.text
    covered = {name: np.zeros(size, bool) for name, size in SIZES.items()}
    names = [images.name(index) for index in range(len(images))]
    assert len(set(names)) == len(names)
    for index, name in enumerate(names):
        path, _, corner = name.removeprefix(f"{tmp_path}/").partition("#")
        top, left = map(int, (corner or "0,0").split(","))
        image = images.opened(index)
        assert image.size == (10 if path == "c.tif" else 16, 16)
        assert (image.bands, image.dtype) == (5, np.int16)
        window = slice(top, top + image.size[0]), slice(left, left + 16)
        np.testing.assert_array_equal(image.pixels(), rasters[path][window])
        covered[path][window] = True
    assert all(pixels.all() for pixels in covered.values())
    assert names[4] == f"{tmp_path}/a.tif#0,54"
    assert names[20] == f"{tmp_path}/b.tif"


def test_8_bit_images_are_cut_as_rgb_or_as_they_are(tmp_path, generator):
    grey = generator.integers(0, 256, (20, 30), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    images = build_source("images", str(tmp_path), tile=16).train
    expected = grey[4:20, 14:30]
    assert images.name(3).endswith("grey.png#4,14")
    np.testing.assert_array_equal(images.opened(3).pixels(), np.stack([expected] * 3, axis=2))
    images.reading = sources.Reading(raw=True)
    assert images.opened(3).bands == 1
    np.testing.assert_array_equal(images.opened(3).pixels()[..., 0], expected)


def test_a_file_that_cannot_be_read_is_one_unreadable_image(rasters, tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(b"II*\0damaged")
    images = build_source("images", str(tmp_path), tile=16).train
    assert len(images) == 1 + 1 + 3 + 2 * 3
    assert images.name(0) == str(path)
    with pytest.raises(UnreadableImage, match=r"a\.tif: "):
        images.opened(0)


def test_the_limit_is_for_a_window_and_not_for_the_raster(tmp_path):
    # 20,000 x 20,000 x 4 uint16: 3.2 GB that are not there; each row of tiles is a hole.
    raster = tifffile.memmap(
        tmp_path / "big.tif", shape=(20_000, 20_000, 4), dtype=np.uint16, **OPTIONS
    )
    raster[19_990, 19_995] = [1, 2, 3, 4]
    raster.flush()
    images = build_source("images", str(tmp_path), tile=512).train
    assert len(images) == 40 * 40
    pixels = images.opened(len(images) - 1).pixels()
    assert pixels.shape == (512, 512, 4)
    assert pixels[19_990 - 19_488, 19_995 - 19_488].tolist() == [1, 2, 3, 4]
    whole = build_source("images", str(tmp_path)).train
    with pytest.raises(UnreadableImage, match=r"data\.tile=512 reads windows"):
        whole.opened(0)


def test_the_windows_of_a_file_have_its_class_and_its_side(tmp_path, generator):
    for number in range(12):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        image = generator.integers(0, 256, (16, 8 + 8 * (number % 3), 3), dtype=np.uint8)
        Image.fromarray(image).save(path)
    source = build_source("image_folder", str(tmp_path), tile=8, held_out=0.5)
    assert len(source.train) == len(source.bank.labels) + len(source.queries.labels) == 48
    files_of_sides = []
    for side in (source.bank, source.queries):
        names = [side.images.name(index) for index in range(len(side.images))]
        expected = ["ab".index(name.split("/")[-2]) for name in names]
        assert side.labels.tolist() == expected
        files_of_sides.append({name.partition("#")[0] for name in names})
        assert side.images.opened(0).pixels().shape == (8, 8, 3)
    bank, queries = files_of_sides
    assert bank
    assert queries
    assert not bank & queries


def test_a_header_that_claims_any_size_is_named(tmp_path, monkeypatch):
    paths = PathList.of(["small.tif", "huge.tif"])
    monkeypatch.setattr(tiles, "sizes_of_files", lambda paths: [(8, 8), (2**32, 2**32)])
    with pytest.raises(InputError, match=r"7\.04e\+13 windows, more than .* file is huge\.tif"):
        tiles.tile_images(paths, 512, 10**6)
