"""A fine-tuned model as a function from one image to the classes of its pixels, for Python."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from moco.data.files.encoded_image import DecodedImage, image_type
from moco.data.files.images import to_rgb
from moco.data.sources.pixel_values import (
    RGB_BANDS,
    PixelValues,
    PreparedImage,
    as_list,
    settle_values,
)
from moco.errors import InputError
from moco.segmentation.image_parts import ImageParts
from moco.segmentation.pixel_classifier import Inference, PixelClassifier
from moco.segmentation.segmenter import Segmenter

ARGUMENTS = (
    (r"backbone\.target=([^\s,]+)", r"target='\1'"),
    (r"backbone\.window_size", "window_size"),
    (r"data\.(bands|value_range)", r"\1"),
    ("trust_targets=true", "trust_targets=True"),
)
"""What settings of the command line are called in Python."""
DEEP_MODES = ("I;16", "I;16B", "I", "F")
"""The modes of Pillow images of more than 8 bits."""


class ImageSegmenter:
    """Return the class of every pixel of an image. `moco.load_segmenter` makes one.

    Args:
        segmenter: the model.
        data: how its run made pixels: the settings ``bands``, ``value_range`` and ``nodata``.
        how: whole or by windows, see `Inference`.

    Example:
        >>> segment = moco.load_segmenter("runs/segment/TIME")
        >>> classes = segment(Image.open("photo.jpg"))  # (H, W)
        >>> names = [segment.class_names[number] for number in np.unique(classes)]
    """

    def __init__(self, segmenter: Segmenter, data: Mapping[str, Any], how: Inference) -> None:
        self.segmenter = segmenter
        self.data = data
        self.how = how
        self.class_names: list[str] = list(segmenter.hparams["class_names"])
        """The name of each class, by its number."""
        self.bands: int = segmenter.hparams["backbone"].get("in_channels", RGB_BANDS)
        """Of the images that the model reads."""
        self.device = torch.device("cpu")
        self._classifiers: dict[tuple[str, int], tuple[PixelClassifier, PixelValues]] = {}

    def to(self, device: str | torch.device) -> "ImageSegmenter":
        """Compute on a device such as ``cuda``; return the same object."""
        self.device = torch.device(device)
        self._classifiers.clear()
        return self

    def __call__(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Return the class number of each pixel, (height, width) int64.

        Args:
            image: (height, width) or (height, width, bands) of any type of images, or a Pillow
                image. 8-bit images become RGB where the model reads RGB: grey is repeated, and
                what is transparent is laid over white.

        Raises:
            InputError: it is no such image, or has other bands or another type than the model's.
        """
        classifier, parts = self._prepared(image)
        classes = np.empty(parts.size, np.int64)
        for top, left, scores in classifier.parts(parts.read, parts.size):
            height, width = scores.shape[1:]
            numbers = scores.argmax(dim=0).cpu().numpy()
            classes[top : top + height, left : left + width] = numbers
        return classes

    def probabilities(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Return the probability of each class at each pixel, (classes, height, width) float32.

        Args:
            image: as in a call.

        Raises:
            InputError: as in a call.
        """
        classifier, parts = self._prepared(image)
        result = np.empty((classifier.num_classes, *parts.size), np.float32)
        for top, left, scores in classifier.parts(parts.read, parts.size):
            height, width = scores.shape[1:]
            of_part = classifier.probabilities(scores).cpu().numpy()
            result[:, top : top + height, left : left + width] = of_part
        return result

    def _prepared(self, image: Image.Image | np.ndarray) -> tuple[PixelClassifier, ImageParts]:
        """Return what predicts an image, and its pixels as the model gets them."""
        selection, value_range = self.data.get("bands"), self.data.get("value_range")
        wants_rgb = selection is None and self.bands == RGB_BANDS
        decoded = decoded_image(image, wants_rgb=wants_rgb)
        kind = (decoded.dtype.name, decoded.bands)
        if kind not in self._classifiers:
            self._check_bands(decoded.array.shape)
            if value_range is None:
                check_8_bit(decoded.array)
            with said_in_python():
                values = settle_values(
                    [("the image", decoded)],
                    bands=selection,
                    value_range=value_range,
                    nodata=self.data.get("nodata"),
                    mean=self.segmenter.hparams["mean"],
                )
            classifier = PixelClassifier(self.segmenter, values, self.how, self.device)
            self._classifiers[kind] = classifier, values
        classifier, values = self._classifiers[kind]
        return classifier, ImageParts(PreparedImage(decoded, "the image", values))

    def _check_bands(self, shape: tuple[int, ...]) -> None:
        """Raise InputError if an array (height, width, bands) lacks the bands of the model."""
        first, _, last = shape
        selection = self.data.get("bands")
        if selection is None:
            needed = str(self.bands)
            is_right = last == self.bands
            # Where the model reads RGB, grey and RGBA images become RGB.
            is_rgb = self.bands == RGB_BANDS
            is_right_before = first == self.bands or (is_rgb and first in (1, RGB_BANDS + 1))
        else:
            chosen = as_list(selection)
            needed = f"band {', '.join(map(str, chosen))} of an image"
            if any(isinstance(band, str) for band in chosen):
                raise InputError(
                    f"the model reads {needed}, and an array has no names of bands; "
                    "python -m moco.predict reads them from files"
                )
            is_right = last >= max(chosen)
            is_right_before = first >= max(chosen)
        if is_right:
            return
        if is_right_before and first < last:
            raise InputError(
                f"{shape} looks like channels first; load_segmenter takes (H, W, bands), such as "
                "image.transpose(1, 2, 0)"
            )
        number = "1 band" if last == 1 else f"{last} bands"
        raise InputError(f"the image has {number}; the model reads {needed}")


def check_8_bit(array: np.ndarray) -> None:
    """Raise InputError if the pixels (height, width, bands) are not 8-bit.

    To be called if the run does not say which values become 0 and 1, because its images were 8-bit.
    """
    if array.dtype == np.uint8:
        return
    raise InputError(
        f"the image is {array.dtype}, with values from {array.min():g} to {array.max():g}, and the "
        "model was trained on 8-bit images; give uint8 from 0 to 255, or "
        "load_segmenter(path, value_range=(low, high)) with the values that become 0 and 1"
    )


@contextmanager
def said_in_python() -> Iterator[None]:
    """Let the errors of the block name arguments of `moco.load_segmenter` in place of settings."""
    try:
        yield
    except InputError as error:
        text = str(error).removeprefix("checkpoint=")
        for setting, argument in ARGUMENTS:
            text = re.sub(setting, argument, text)
        # One traceback is enough: the message says everything.
        raise InputError(text) from None


def decoded_image(image: Image.Image | np.ndarray, *, wants_rgb: bool) -> DecodedImage:
    """Return an image as (height, width, bands) of a type of images.

    Args:
        image: see `ImageSegmenter`.
        wants_rgb: make RGB of 8-bit images of one, three or four bands.

    Raises:
        InputError: it is no such image.
    """
    if isinstance(image, (str, os.PathLike)):
        raise InputError(f"{image}: a path; expected an image, such as PIL.Image.open(path)")
    if isinstance(image, Image.Image):
        keeps_bands = not wants_rgb and image.mode in ("L", "RGB", "RGBA")
        if image.mode not in DEEP_MODES and not keeps_bands:
            image = to_rgb(image)
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(
            f"expected one image (height, width) or (height, width, bands), got {array.shape}"
        )
    try:
        array = np.ascontiguousarray(array, image_type(array.dtype, "pixels"))
    except ValueError as error:
        raise InputError(str(error)) from error
    if wants_rgb and array.dtype == np.uint8:
        if array.shape[2] == 1:
            array = np.repeat(array, RGB_BANDS, axis=2)
        elif array.shape[2] == RGB_BANDS + 1:
            array = np.asarray(to_rgb(Image.fromarray(array)))
    return DecodedImage(array)
