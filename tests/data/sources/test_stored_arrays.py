"""Images in HDF5, zarr and NumPy files against the arrays that were written."""

import pickle
import re

import numpy as np
import pytest

from moco.data.files.images import UnreadableImage
from moco.data.sources import stored_arrays
from moco.data.sources.folders import is_held_out
from moco.data.sources.registry import build_source
from moco.data.sources.source import ArrayImages
from moco.errors import InputError
from moco.extras import install_command

h5py = pytest.importorskip("h5py")
zarr = pytest.importorskip("zarr")

TYPES = ["uint8", "uint16", "int16", "int32", "uint32", "float16", "float32", "float64", ">u2"]


def write(kind, path, **arrays):
    """Write arrays by name into a file of this kind."""
    if kind == "npz":
        (array,) = arrays.values()
        np.save(path, array)
        return
    if kind == "hdf5":
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array, chunks=(1, *array.shape[1:]), compression=1)
        return
    group = zarr.open_group(path, mode="w")
    for name, array in arrays.items():
        native = array.astype(array.dtype.newbyteorder("="))
        group.create_array(name, data=native, chunks=(1, *array.shape[1:]))


def values(dtype, *shape):
    """Whole numbers, with negative ones for signed types."""
    array = np.random.default_rng(0).integers(0, 250, shape).astype(dtype)
    return array - 100 if np.issubdtype(array.dtype, np.signedinteger) else array


@pytest.fixture(params=["npz", "hdf5", "zarr"])
def kind(request):
    return request.param


def path_for(kind, folder):
    return str(folder / {"npz": "a.npy", "hdf5": "a.h5", "zarr": "a.zarr"}[kind])


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_comes_as_it_was_written(dtype, kind, tmp_path):
    array = values(dtype, 5, 7, 9, 6)
    path = path_for(kind, tmp_path)
    write(kind, path, images=array)
    images = build_source(kind, path).train
    assert len(images) == 5
    for index in (3, 0):
        image = images.opened(index)
        assert image.pixels().dtype == np.dtype(dtype).newbyteorder("=")
        assert image.pixels().flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(image.pixels(), array[index])
        assert image.size == (7, 9)
        assert images.name(index) == f"{path}[{index}]"


LAYOUTS = [
    ((3, 8, 9), (8, 9, 1)),
    ((3, 16, 9, 13), (16, 9, 13)),
    ((3, 8, 8, 13), (8, 8, 13)),  # two equal neighbours are the sides of squares
    ((3, 13, 8, 8), (8, 8, 13)),
    ((3, 13, 30, 13), (13, 30, 13)),  # equal: the last
    ((3, 2, 2, 3), (2, 2, 3)),  # 3 on the last axis are channels
    ((3, 2, 8, 9), (8, 9, 2)),
]


@pytest.mark.parametrize(("shape", "expected"), LAYOUTS)
def test_the_shape_tells_the_band_axis(shape, expected, kind, tmp_path):
    array = values("uint16", *shape)
    path = path_for(kind, tmp_path)
    write(kind, path, images=array)
    pixels = build_source(kind, path).train.opened(2).pixels()
    assert pixels.shape == expected
    in_memory = ArrayImages(array, "array")
    np.testing.assert_array_equal(pixels, in_memory.opened(2).pixels())
    np.testing.assert_array_equal(pixels, in_memory.tensor[2].numpy())
    if expected[2] != shape[-1] and len(shape) == 4:
        array = array.transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(pixels, array[2].reshape(expected))


def test_grey_images_of_8_bits_become_rgb(kind, tmp_path):
    array = values("uint8", 4, 5, 6)
    path = path_for(kind, tmp_path)
    write(kind, path, images=array)
    pixels = build_source(kind, path).train.opened(1).pixels()
    np.testing.assert_array_equal(pixels, np.stack([array[1]] * 3, axis=2))


@pytest.mark.parametrize("kind", ["hdf5", "zarr"])
def test_labels_divide_the_images_into_bank_and_queries(kind, tmp_path):
    array, labels = values("uint16", 40, 4, 4, 5), np.arange(40)[:, None] % 7
    path = path_for(kind, tmp_path)
    write(kind, path, **{"deep/images": array, "deep/labels": labels, "ids": np.arange(40)})
    source = build_source(kind, path, label_key="deep/labels", held_out=0.3)
    is_query = is_held_out([str(row).encode() for row in range(40)], 0.3)
    assert 0 < is_query.sum() < 40
    for side, chosen in ((source.bank, ~is_query), (source.queries, is_query)):
        assert side.labels.tolist() == labels[chosen, 0].tolist()
        pixels = [side.images.opened(index).pixels() for index in range(len(side.images))]
        np.testing.assert_array_equal(pixels, array[chosen])
    assert source.image_size == 4
    alone = build_source(kind, path)
    assert (alone.bank, alone.queries) == (None, None)


def test_a_source_that_was_opened_goes_to_another_process(kind, tmp_path):
    array = values("int16", 3, 5, 5, 6)
    path = path_for(kind, tmp_path)
    write(kind, path, images=array)
    images = build_source(kind, path).train
    images.opened(0)
    images = pickle.loads(pickle.dumps(images))
    assert images.array is None
    np.testing.assert_array_equal(images.opened(2).pixels(), array[2])


@pytest.mark.parametrize("kind", ["hdf5", "zarr"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, r"several arrays could be the images \(a uint8 \(4, 5, 6\), b .*data\.image_key=a"),
        ({"image_key": "aa"}, r"data\.image_key: unknown array 'aa'; did you mean 'a'\?"),
        ({"image_key": "y"}, "y: expected images of shape"),
        ({"image_key": "long"}, "long: .*int64; expected one of uint8"),
        ({"image_key": "a", "label_key": "z"}, r"data\.label_key: unknown array 'z'"),
        ({"image_key": "a", "label_key": "y"}, "expected one class number .* got float32"),
        ({"image_key": "a", "label_key": "short"}, "for each of the 4 images"),
    ],
)
def test_keys_that_do_not_fit_are_named(kind, options, expected, tmp_path):
    arrays = {"a": values("uint8", 4, 5, 6), "b": values("uint16", 4, 5, 6, 2)}
    arrays |= {
        "y": np.zeros(4, np.float32),
        "short": np.arange(3),
        "long": np.zeros((4, 2, 2), int),
    }
    write(kind, path_for(kind, tmp_path), **arrays)
    with pytest.raises(InputError, match=expected):
        build_source(kind, path_for(kind, tmp_path), **options)


@pytest.mark.parametrize("kind", ["hdf5", "zarr"])
def test_a_missing_or_damaged_file_is_named(kind, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        build_source(kind, str(tmp_path / "missing"))
    path = tmp_path / "file"
    path.write_bytes(b"nothing of this kind")
    with pytest.raises(InputError, match=r"file: cannot be read \("):
        build_source(kind, str(path))
    write(kind, path_for(kind, tmp_path), label=np.arange(3))
    with pytest.raises(InputError, match=r"no array of images .*label int64 \(3,\)"):
        build_source(kind, path_for(kind, tmp_path))


def test_a_truncated_npy_file_is_named(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, values("uint16", 4, 30, 30))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"a\.npy: cannot be read \("):
        build_source("npz", str(path))
    np.save(path, np.array([[[object()]]]), allow_pickle=True)
    with pytest.raises(InputError, match="Python objects"):
        build_source("npz", str(path))


def test_a_damaged_chunk_is_one_unreadable_image(tmp_path):
    array = values("uint16", 4, 30, 30)
    path = tmp_path / "a.h5"
    write("hdf5", path, images=array)
    with h5py.File(path, "r") as file:
        chunk = file["images"].id.get_chunk_info(2)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + 20] = bytes(20)
    path.write_bytes(content)
    images = build_source("hdf5", str(path)).train
    np.testing.assert_array_equal(images.opened(1).pixels()[..., 0], array[1])
    with pytest.raises(UnreadableImage, match=re.escape("a.h5[2]: ")):
        images.opened(2)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (
            (2, 10**6, 10**6),
            r"a\.h5: images: 1000000 x 1000000 px.* exceeds data\.max_image_pixels",
        ),
        ((10**13, 4, 4), "10,000,000,000,000 images, more than 2,147,483,648"),
    ],
)
def test_a_small_file_that_claims_any_size_is_refused(shape, expected, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("images", shape, np.uint16, chunks=(1, 4, 4))
    with pytest.raises(InputError, match=expected):
        build_source("hdf5", str(tmp_path / "a.h5"))


def test_a_codec_that_runs_code_is_refused(tmp_path, monkeypatch):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    group.create_array("images", data=values("uint16", 2, 3, 3))
    monkeypatch.setattr(stored_arrays, "UNSAFE_CODEC", "blosc")  # zarr itself refuses pickles, too
    with pytest.raises(InputError, match="runs code"):
        build_source("zarr", str(tmp_path / "a.zarr"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(InputError) as error:
        build_source("hdf5", "a.h5")
    assert f"data=hdf5 needs h5py: {install_command('hdf5')}" in str(error.value)
