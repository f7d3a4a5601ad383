"""A fine-tuned model as a function from one image to the classes of its pixels, for Python."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from moco.data.files.encoded_image import DecodedImage, image_type
from moco.data.files.images import to_rgb
from moco.data.sources.pixel_values import RGB_BANDS, PixelValues, PreparedImage, settle_values
from moco.errors import InputError
from moco.segmentation.image_parts import ImageParts
from moco.segmentation.pixel_classifier import Inference, PixelClassifier
from moco.segmentation.segmenter import Segmenter

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
        selection = self.data.get("bands")
        wants_rgb = selection is None and self.bands == RGB_BANDS
        decoded = decoded_image(image, wants_rgb=wants_rgb)
        kind = (decoded.dtype.name, decoded.bands)
        if kind not in self._classifiers:
            values = settle_values(
                [("the image", decoded)],
                bands=selection,
                value_range=self.data.get("value_range"),
                nodata=self.data.get("nodata"),
                mean=self.segmenter.hparams["mean"],
            )
            if values.bands != self.bands:
                raise InputError(
                    f"the image has {values.bands} bands; the model reads {self.bands}"
                )
            classifier = PixelClassifier(self.segmenter, values, self.how, self.device)
            self._classifiers[kind] = classifier, values
        classifier, values = self._classifiers[kind]
        return classifier, ImageParts(PreparedImage(decoded, "the image", values))


def decoded_image(image: Image.Image | np.ndarray, *, wants_rgb: bool) -> DecodedImage:
    """Return an image as (height, width, bands) of a type of images.

    Args:
        image: see `ImageSegmenter`.
        wants_rgb: make RGB of 8-bit images of one, three or four bands.

    Raises:
        InputError: it is no such image.
    """
    if isinstance(image, Image.Image):
        keeps_bands = not wants_rgb and image.mode in ("L", "RGB", "RGBA")
        if image.mode not in DEEP_MODES and not keeps_bands:
            image = to_rgb(image)
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(
            f"expected an image (height, width) or (height, width, bands), got {array.shape}"
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
