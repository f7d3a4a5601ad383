"""DICOM files give the values that they mean: against pydicom's own processing, and by hand."""

import io
import sys

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from moco.data.files.images import MAX_IMAGE_PIXELS, UnreadableImage, encoded, header, read_mask
from moco.extras import install_command

pydicom = pytest.importorskip("pydicom")

NATIVE = "1.2.840.10008.1.2.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def dicom(
    array, photometric="MONOCHROME2", bits_stored=None, syntax=NATIVE, frames=None, **elements
):
    """Return a file with one image, or with several if `frames` says so.

    Args:
        syntax: of the pixels; a compressed one encodes each frame.
    """
    from pydicom.encaps import encapsulate

    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = SECONDARY_CAPTURE
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = pydicom.dataset.FileDataset("x", {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID = SECONDARY_CAPTURE, "1.2.3"
    images = array if frames else [array]
    data.Rows, data.Columns = images[0].shape[:2]
    data.SamplesPerPixel = images[0].shape[2] if images[0].ndim == 3 else 1
    data.PhotometricInterpretation = photometric
    data.BitsAllocated = 8 * array.dtype.itemsize
    data.BitsStored = bits_stored or data.BitsAllocated
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(array.dtype.kind == "i")
    if data.SamplesPerPixel > 1:
        data.PlanarConfiguration = 0
    if frames:
        data.NumberOfFrames = frames
    for name, value in elements.items():
        setattr(data, name, value)
    if syntax == NATIVE:
        data.PixelData = array.tobytes()
    else:
        data.PixelData = encapsulate([ENCODERS[syntax](image) for image in images])
        data["PixelData"].VR = "OB"
    with io.BytesIO() as file:
        data.save_as(file, enforce_file_format=True)
        return file.getvalue()


ENCODERS = {
    "1.2.840.10008.1.2.4.70": lambda image: imagecodecs.ljpeg_encode(image),
    "1.2.840.10008.1.2.4.80": lambda image: imagecodecs.jpegls_encode(image),
    "1.2.840.10008.1.2.4.90": lambda image: imagecodecs.jpeg2k_encode(image, level=0),
}


def pixels(content, page=0, **options):
    """Return the pixels; check that the header said their size, bands and type."""
    image = encoded(content, "x", MAX_IMAGE_PIXELS, page, **options)
    array = image.pixels()
    assert array.shape == (*image.size, image.bands)
    assert array.dtype == image.dtype
    return array


def grey(generator, dtype, bits=None):
    bounds = np.iinfo(dtype)
    low, high = (0, 2**bits - 1) if bits else (bounds.min, bounds.max)
    return generator.integers(low, high, (9, 14), dtype, endpoint=True)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "int32"])
def test_stored_values_without_a_slope_come_as_they_are(dtype, generator):
    array = grey(generator, dtype)
    content = dicom(array)
    assert pixels(content, raw=True).dtype == dtype
    assert np.array_equal(pixels(content, raw=True)[..., 0], array)
    assert pixels(content).shape[2] == (3 if dtype == "uint8" else 1)


@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [
        (1, -1024, "int32"),
        (1, 0, "int32"),
        (2, 10, "int32"),
        (0.5, 0, "float32"),
        (1, 0.25, "float32"),
    ],
)
@pytest.mark.parametrize("dtype", ["uint16", "int16"])
def test_slope_and_intercept_are_applied(dtype, slope, intercept, expected, generator):
    array = grey(generator, dtype)
    content = dicom(array, RescaleSlope=slope, RescaleIntercept=intercept)
    measured = pixels(content)
    assert measured.dtype == expected
    reference = pydicom.pixels.apply_rescale(array, pydicom.dcmread(io.BytesIO(content)))
    assert np.array_equal(measured[..., 0], reference.astype(expected))


def test_floating_point_pixels_come_as_they_are(generator):
    for dtype, element in (("float32", "FloatPixelData"), ("float64", "DoubleFloatPixelData")):
        array = generator.normal(0, 1, (9, 14)).astype(dtype)
        data = pydicom.dcmread(io.BytesIO(dicom(np.zeros((9, 14), f"uint{8 * array.itemsize}"))))
        for name in ("PixelData", "PixelRepresentation", "BitsStored", "HighBit"):
            delattr(data, name)
        setattr(data, element, array.tobytes())
        with io.BytesIO() as file:
            data.save_as(file)
            assert np.array_equal(pixels(file.getvalue())[..., 0], array)


def test_a_slope_may_belong_to_a_frame(generator):
    from pydicom import Dataset

    stack = np.stack([grey(generator, "uint16") for _ in range(3)])
    frames = []
    for number in range(3):
        rescale = Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept = 2, number
        frame = Dataset()
        frame.PixelValueTransformationSequence = [rescale]
        frames.append(frame)
    content = dicom(stack, frames=3, PerFrameFunctionalGroupsSequence=frames)
    expected = np.stack([stack[number] * np.int32(2) + number for number in range(3)], axis=2)
    for number in range(3):
        assert np.array_equal(pixels(content, number)[..., 0], expected[..., number])
    assert np.array_equal(pixels(content, None), expected)
    with pytest.raises(UnreadableImage, match=r"^x: there is no image 4 among 3$"):
        encoded(content, "x", 10**6, 3)


@pytest.mark.parametrize(("dtype", "bits"), [("uint8", 8), ("uint16", 12), ("int16", 16)])
def test_where_low_is_white_values_are_inverted(dtype, bits, generator):
    array = grey(generator, dtype, bits if dtype != "int16" else None)
    content = dicom(array, "MONOCHROME1", bits)
    largest = -1 if dtype == "int16" else 2**bits - 1
    assert np.array_equal(pixels(content, raw=True)[..., 0], largest - array)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_the_window_of_the_file_gives_zero_to_one(function, photometric, generator):
    array = grey(generator, "uint16", 12)
    window = {"WindowCenter": [40, 300], "WindowWidth": [400, 1500], "VOILUTFunction": function}
    content = dicom(array, photometric, 12, RescaleSlope=1, RescaleIntercept=-1024, **window)
    data = pydicom.dcmread(io.BytesIO(content))
    values = pydicom.pixels.apply_windowing(pydicom.pixels.apply_rescale(array, data), data)
    reference = (values + 1024) / 4095  # pydicom's range is that of the stored values
    if photometric == "MONOCHROME1":
        reference = 1 - reference
    shown = pixels(content, window=True)
    assert shown.dtype == np.float32
    assert np.allclose(shown[..., 0], reference, atol=2e-7)
    with pytest.raises(UnreadableImage, match=r"^x: a DICOM file without a window"):
        pixels(dicom(array), window=True)


def test_colours_become_rgb(generator):
    array = generator.integers(0, 256, (9, 14, 3), np.uint8)
    assert np.array_equal(pixels(dicom(array, "RGB")), array)
    content = dicom(array, "YBR_FULL")
    expected = pydicom.pixels.convert_color_space(array, "YBR_FULL", "RGB")
    assert np.array_equal(pixels(content), expected)
    tables = generator.integers(0, 256, (3, 256), np.uint8)
    palette = {}
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        palette[f"{name}PaletteColorLookupTableData"] = table.tobytes()
    index = array[..., 0]
    assert np.array_equal(pixels(dicom(index, "PALETTE COLOR", **palette)), tables.T[index])


@pytest.mark.parametrize("syntax", sorted(ENCODERS))
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_compressed_frames_are_decoded(syntax, dtype, generator):
    stack = np.stack([grey(generator, dtype) for _ in range(2)])
    content = dicom(stack, syntax=syntax, frames=2)
    for number in range(2):
        assert np.array_equal(pixels(content, number, raw=True)[..., 0], stack[number])


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL_422"])
def test_jpeg_in_dicom_has_the_colours_that_pillow_decodes(photometric, generator, monkeypatch):
    small = Image.fromarray(generator.integers(0, 256, (3, 4, 3), np.uint8))
    array = np.asarray(small.resize((14, 9)))
    with io.BytesIO() as file:
        Image.fromarray(array).save(file, "JPEG", keep_rgb=photometric == "RGB")
        jpeg = file.getvalue()
    syntax = "1.2.840.10008.1.2.4.50"
    monkeypatch.setitem(ENCODERS, syntax, lambda image: jpeg)
    with Image.open(io.BytesIO(jpeg)) as image:
        assert np.array_equal(pixels(dicom(array, photometric, syntax=syntax)), np.asarray(image))


def test_a_sign_that_a_decoder_does_not_know_is_put_back(generator):
    array = generator.integers(-2048, 2048, (9, 14), np.int16)
    stored = (array & 0xFFF).astype(np.uint16)
    content = dicom(stored, syntax="1.2.840.10008.1.2.4.80", bits_stored=12, PixelRepresentation=1)
    assert np.array_equal(pixels(content)[..., 0], array)


def test_dicom_files_on_disk_are_listed_and_masks(generator, tmp_path):
    stack = np.stack([grey(generator, "uint16") for _ in range(2)])
    (tmp_path / "x.dcm").write_bytes(dicom(stack, frames=2))
    path = str(tmp_path / "x.dcm")
    assert header(path) == ((9, 14), 1, np.dtype(np.uint16), 2)
    assert np.array_equal(read_mask(path), stack[0])


def test_damaged_and_hostile_files_are_one_line(generator):
    array = grey(generator, "uint16")
    content = dicom(array)
    with pytest.raises(UnreadableImage, match=r"^x: "):
        pixels(content[:-100])
    with pytest.raises(UnreadableImage, match=r"^x: a DICOM file without an image$"):
        encoded(content[: content.index(b"\x28\x00")], "x", 10**6)
    bomb = dicom(array, Rows=60000, Columns=60000)
    with pytest.raises(
        UnreadableImage, match=r"^x: 60000 x 60000 px x 1 uint16 \(7.2 GB\) exceeds"
    ):
        encoded(bomb, "x", MAX_IMAGE_PIXELS)
    with pytest.raises(UnreadableImage, match=r"^x: "):
        pixels(dicom(array, syntax="1.2.840.10008.1.2.4.90", Rows=100))


def test_a_missing_package_is_one_line_that_says_what_to_install(generator, monkeypatch):
    content = dicom(grey(generator, "uint8"))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UnreadableImage) as error:
        encoded(content, "x", 10**6)
    assert str(error.value) == f"x: DICOM needs pydicom: {install_command('dicom')}"
