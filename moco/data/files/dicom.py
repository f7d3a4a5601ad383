"""Reading DICOM files by pydicom, and compressed pixels in them by imagecodecs.

Stored values become those that the file means: slope and intercept are applied, MONOCHROME1 (low is
white) is inverted, palettes and YBR become RGB.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moco.data.files.deep_images import jpeg2000_header
from moco.data.files.encoded_image import (
    ImageHeader,
    Request,
    image_type,
    joined_header,
    path_or_file,
)
from moco.data.files.jpeg_images import frame_size
from moco.extras import install_command

if TYPE_CHECKING:
    from pydicom import Dataset

# imagecodecs' decoders, by the names of the transfer syntaxes in the standard (PS3.5, A.4).
DECODERS = {
    "1.2.840.10008.1.2.4.50": "jpeg_decode",  # baseline, 8 bits
    "1.2.840.10008.1.2.4.51": "jpeg_decode",  # extended, 12 bits
    "1.2.840.10008.1.2.4.57": "ljpeg_decode",  # lossless
    "1.2.840.10008.1.2.4.70": "ljpeg_decode",
    "1.2.840.10008.1.2.4.80": "jpegls_decode",
    "1.2.840.10008.1.2.4.81": "jpegls_decode",
    "1.2.840.10008.1.2.4.90": "jpeg2k_decode",
    "1.2.840.10008.1.2.4.91": "jpeg2k_decode",
    "1.2.840.10008.1.2.4.201": "jpeg2k_decode",  # high-throughput JPEG 2000
    "1.2.840.10008.1.2.4.202": "jpeg2k_decode",
    "1.2.840.10008.1.2.4.203": "jpeg2k_decode",
}
INVERTED = "MONOCHROME1"
PALETTE = "PALETTE COLOR"
LARGEST_INT32 = 2**31 - 1


class Rescale(NamedTuple):
    """How stored values become those that were measured."""

    slope: float
    intercept: float


def num_pages(request: Request) -> int:
    """Return the number of frames."""
    return num_frames(read_dataset(request, with_pixels=False))


def read_header(request: Request) -> ImageHeader:
    """Return what is known of an image before it is decoded."""
    dataset = read_dataset(request, with_pixels=False)
    headers = []
    for page in chosen_pages(dataset, request.page):
        headers.append(frame_header(dataset, page, request))
    return joined_header(headers)


def read_pixels(request: Request, header: ImageHeader) -> np.ndarray:
    """Return the pixels of an image, (height, width, bands)."""
    dataset = read_dataset(request, with_pixels=True)
    arrays = []
    for page in chosen_pages(dataset, request.page):
        array = frame_values(dataset, page, request)
        arrays.append(array.reshape(*array.shape[:2], -1))
    return np.concatenate(arrays, axis=2)


def read_dataset(request: Request, with_pixels: bool) -> "Dataset":
    """Return the elements of a DICOM file.

    Raises:
        ValueError: pydicom is missing, or there is no image.
    """
    try:
        import pydicom
    except ImportError as error:
        raise ValueError(f"DICOM needs pydicom: {install_command('dicom')}") from error
    file = path_or_file(request.source)
    dataset = pydicom.dcmread(file, stop_before_pixels=not with_pixels)
    if "Rows" not in dataset or "Columns" not in dataset:
        raise ValueError("a DICOM file without an image")
    return dataset


def num_frames(dataset: "Dataset") -> int:
    """Return the number of frames."""
    return max(int(dataset.get("NumberOfFrames") or 1), 1)


def chosen_pages(dataset: "Dataset", page: int | None) -> list[int]:
    """Return the frame that is asked for, or all.

    Raises:
        EOFError: there is no such frame.
    """
    count = num_frames(dataset)
    if page is None:
        return list(range(count))
    if page >= count:
        raise EOFError(f"there is no image {page + 1} among {count}")
    return [page]


def frame_header(dataset: "Dataset", page: int, request: Request) -> ImageHeader:
    """Return the header of one frame."""
    dtype = stored_type(dataset)
    bands = int(dataset.get("SamplesPerPixel", 1))
    if not request.numbers:
        if dataset.PhotometricInterpretation == PALETTE:
            bands = 3
            dtype = np.dtype(f"uint{dataset.RedPaletteColorLookupTableDescriptor[2]}")
        elif bands == 1 and request.window:
            dtype = np.dtype(np.float32)
        elif bands == 1:
            dtype = measured_type(dataset, page)
        dtype = image_type(dtype)
    return ImageHeader((int(dataset.Rows), int(dataset.Columns)), bands, dtype)


def stored_type(dataset: "Dataset") -> np.dtype:
    """Return the type of the stored values."""
    bits = max(int(dataset.BitsAllocated), 8)  # single bits are read as bytes
    if "PixelRepresentation" not in dataset and bits >= 32:
        return np.dtype(f"float{bits}")
    if dataset.get("PixelRepresentation"):
        return np.dtype(f"int{bits}")
    return np.dtype(f"uint{bits}")


def measured_type(dataset: "Dataset", page: int) -> np.dtype:
    """Return the type of a grey image after slope and intercept.

    It is int32 if both are whole numbers, so that all files of a study have one type. Otherwise it
    is float32, or float64 for stored values of more than 16 bits. Without them, and for 8 bits with
    a slope of 1 and an intercept of 0, the stored type stays.
    """
    stored = stored_type(dataset)
    if dataset.get("ModalityLUTSequence"):
        return np.dtype(np.int32)
    rescale = rescale_of(dataset, page)
    if rescale is None or (rescale == (1, 0) and stored.itemsize == 1):
        return stored
    slope, intercept = rescale
    largest = 2.0 ** (8 * stored.itemsize) * abs(slope) + abs(intercept)
    if stored.kind != "f" and slope % 1 == 0 and intercept % 1 == 0 and largest <= LARGEST_INT32:
        return np.dtype(np.int32)
    # Float32 holds all values of 16 bits exactly, but not those of 32.
    if stored.itemsize <= 2:
        return np.dtype(np.float32)
    return np.dtype(np.float64)


def rescale_of(dataset: "Dataset", page: int) -> Rescale | None:
    """Return slope and intercept of a frame; None if the file has none."""
    for place in functional_groups(dataset, page, "PixelValueTransformationSequence"):
        if "RescaleSlope" in place:
            return Rescale(float(place.RescaleSlope), float(place.get("RescaleIntercept", 0)))
    return None


def functional_groups(dataset: "Dataset", page: int, name: str) -> Iterator["Dataset"]:
    """Yield the places where a setting of a frame may be: the frame's own, the shared, the file."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for groups in (per_frame[page : page + 1], shared[:1]):
        for group in groups:
            yield from (group.get(name) or [])[:1]
    yield dataset


def frame_values(dataset: "Dataset", page: int, request: Request) -> np.ndarray:
    """Return the values of one frame, (height, width) or (height, width, bands)."""
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut

    array = stored_values(dataset, page)
    if request.numbers:
        return array
    if dataset.PhotometricInterpretation == PALETTE:
        return apply_color_lut(array, dataset)[..., :3]
    if array.ndim == 3:
        return array
    is_inverted = dataset.PhotometricInterpretation == INVERTED
    if is_inverted and not request.window:
        array = inverted(array, dataset)
    if int(dataset.BitsAllocated) == 1 and not request.window:
        return array * np.uint8(255)  # black and white
    dtype = measured_type(dataset, page)
    rescale = rescale_of(dataset, page)
    if dataset.get("ModalityLUTSequence"):
        array = apply_modality_lut(array, dataset).astype(dtype)
    elif rescale is not None:
        array = (array * rescale.slope + rescale.intercept).astype(dtype)
    if not request.window:
        return array
    shown = through_window(array, dataset, page)
    if is_inverted:
        return 1 - shown
    return shown


def inverted(array: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """Return stored values with dark and light exchanged."""
    if array.dtype.kind != "u":
        return -1 - array
    largest = array.dtype.type(2 ** int(dataset.BitsStored) - 1)
    return largest - np.minimum(array, largest)


def stored_values(dataset: "Dataset", page: int) -> np.ndarray:
    """Return the decoded values of one frame as they are stored, but colours as RGB.

    Raises:
        ValueError: no decoder is known.
    """
    from pydicom.encaps import get_frame
    from pydicom.pixels.processing import convert_color_space
    from pydicom.pixels.utils import pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax not in DECODERS:
        return pixel_array(dataset, index=page)
    import imagecodecs

    data = get_frame(dataset.PixelData, page, number_of_frames=num_frames(dataset))
    photometric = dataset.PhotometricInterpretation
    options = {}
    if DECODERS[syntax] == "jpeg_decode" and photometric == "RGB":
        options = {"colorspace": "RGB", "outcolorspace": "RGB"}
    if DECODERS[syntax] == "jpeg2k_decode":
        size, _, _ = jpeg2000_header(data)
    else:
        size = frame_size(data)
    if size != (dataset.Rows, dataset.Columns):
        raise ValueError(f"a frame of {size[1]} x {size[0]} px; the file says another size")
    array = getattr(imagecodecs, DECODERS[syntax])(data, **options)
    if DECODERS[syntax] != "jpeg_decode" and photometric.startswith("YBR_FULL"):
        array = convert_color_space(array, photometric, "RGB")
    if dataset.get("PixelRepresentation") and array.dtype.kind == "u":
        # Some decoders know no sign: the highest stored bit is one.
        unused_bits = 8 * array.dtype.itemsize - int(dataset.BitsStored)
        signed = np.dtype(f"int{8 * array.dtype.itemsize}")
        array = (array << unused_bits).view(signed) >> unused_bits
    return array.astype(stored_type(dataset), copy=False)


def through_window(values: np.ndarray, dataset: "Dataset", page: int) -> np.ndarray:
    """Return grey values through the file's window, from 0 to 1, float32.

    The formulas are those of the standard, PS3.3, C.11.2.1. Of several windows, it is the first.

    Raises:
        ValueError: the file has no window.
    """
    from pydicom.pixels.processing import apply_voi

    if dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return (apply_voi(values, dataset) / (2**bits - 1)).astype(np.float32)
    for place in functional_groups(dataset, page, "FrameVOILUTSequence"):
        if "WindowCenter" not in place or "WindowWidth" not in place:
            continue
        center, width = first_number(place.WindowCenter), first_number(place.WindowWidth)
        function = place.get("VOILUTFunction", "LINEAR")
        if function == "SIGMOID":
            shown = 1 / (1 + np.exp(-4 * (values - center) / width))
        elif function == "LINEAR_EXACT":
            shown = (values - center) / width + 0.5
        else:
            # A width of 1 is a threshold.
            shown = (values - (center - 0.5)) / max(width - 1, 1e-6) + 0.5
        return shown.clip(0, 1).astype(np.float32)
    raise ValueError("a DICOM file without a window (WindowCenter and WindowWidth)")


def first_number(value: Any) -> float:
    """Return a number, or the first of several."""
    if isinstance(value, (str, int, float)):
        return float(value)
    return float(value[0])
