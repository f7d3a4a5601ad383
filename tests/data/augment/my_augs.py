"""Augmentations as a user writes them, for the tests: operations and pipelines."""

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torchvision.transforms import v2

import moco


@dataclass
class Fade(moco.Operation):
    """Only on_image: multiply by a factor."""

    lowest: float = 0.5
    num_draws: ClassVar[int] = 1
    limits: ClassVar = {"lowest": (0, 1)}

    def draw(self, draws, sizes):
        return {"factor": self.lowest + (1 - self.lowest) * draws[:, 0]}

    def on_image(self, image, drawn):
        return (image * drawn["factor"] + 0.5).astype(np.uint8)

    def describe(self, drawn):
        return f"by {drawn['factor']:.2f}"


@dataclass
class FadeBatch(Fade):
    """Only on_batch: the same."""

    on_image = moco.Operation.on_image

    def on_batch(self, images, drawn):
        return images * drawn["factor"].to(images.dtype)[:, None, None, None]


class Halve(moco.Operation):
    """Only on_image, for both kinds of image."""

    def on_image(self, image, drawn):
        return (image / 2).astype(image.dtype)


class HalveBatch(moco.Operation):
    def on_batch(self, images, drawn):
        return images / 2


class Nothing(moco.Operation):
    """Defines neither."""


class Annotated(moco.Operation):
    """Should have been a dataclass."""

    lowest: float = 0.5
    on_image = Fade.on_image


class Floats(moco.Operation):
    def on_image(self, image, drawn):
        return image / 255


class InPlace(moco.Operation):
    def on_image(self, image, drawn):
        image[:] = 0
        return image


class TooBright(moco.Operation):
    def on_batch(self, images, drawn):
        return images + 1


class OneNumber(Fade):
    def draw(self, draws, sizes):
        return {"factor": 0.5}


class Fails(moco.Operation):
    def on_image(self, image, drawn):
        raise KeyError("sigma")


class Irreproducible(moco.Operation):
    def on_image(self, image, drawn):
        return np.random.default_rng().integers(0, 256, image.shape, dtype=np.uint8)


def crop(image_size, smallest=0.2):
    return v2.RandomResizedCrop(image_size, (smallest, 1))


def build(image_size, smallest=0.2):
    """A pipeline with draws of all three generators, which cannot be pickled."""

    def augment(image):
        image = crop(image_size, smallest)(image)
        if random.random() < 0.5:
            image = v2.functional.horizontal_flip(image)
        tensor = v2.functional.to_dtype(v2.functional.to_image(image), torch.float32, scale=True)
        return tensor * np.random.uniform(0.5, 1)

    return augment


def build_8px():
    return v2.Compose([v2.RandomResizedCrop(8), v2.ToImage()])


def normalized(image_size):
    return v2.Compose(
        [crop(image_size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
         v2.Normalize([0.5] * 3, [0.5] * 3)]
    )  # fmt: skip


def unresized():
    return v2.RandomHorizontalFlip()


def grey(image_size):
    return v2.Compose([crop(image_size), v2.Grayscale()])


def as_array(image_size):
    return v2.Compose([crop(image_size), np.asarray])


def half(image_size):
    return v2.Compose([crop(image_size), v2.ToImage(), lambda image: image.to(torch.int16)])


def float_crop(image_size):
    return v2.Compose([crop(image_size), v2.RandomVerticalFlip()])


def three_bands(image_size):
    return v2.Compose([crop(image_size), lambda image: image[:3]])


def bytes_of(image_size):
    return v2.Compose([crop(image_size), v2.ToDtype(torch.uint8, scale=True)])


def no_callable():
    return "augment"


def broken():
    raise ZeroDivisionError("division by zero")
