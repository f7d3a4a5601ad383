"""Augmentation pairs from numbers: each view is an ordered mapping from operation to its settings.

One definition, two engines. What is drawn for an image is a pure function of (seed, epoch, index, view); the operations
(`moco.data.augment.operations`) turn it into their numbers and do the work, image by image or on a whole batch.

Letters: N batch, H W pixels of the source, S side of a view. Sizes in px.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moco.data.augment.draws import uniforms
from moco.data.augment.operations import OPERATIONS, Drawn, Operation, expect, is_number
from moco.errors import InputError, unknown_name


class Step(NamedTuple):
    """An operation and how often it is applied."""

    name: str
    operation: Operation
    probability: float


class View:
    """The operations of one view, in order.

    Args:
        operations: by name, their settings; one of them is `random_resized_crop`.
        image_size: side of the result, px.
        where: the mapping's key in the config, for error messages.

    Raises:
        InputError: unknown operation, setting or value; it names the key.
    """

    def __init__(
        self, operations: Mapping[str, Mapping[str, Any] | None], image_size: int, where: str
    ) -> None:
        if "random_resized_crop" not in operations:
            raise InputError(
                f"{where}: random_resized_crop is missing; without it views have no common size"
            )
        self.steps = [
            build_operation(name, settings, image_size, where)
            for name, settings in operations.items()
        ]
        self.crop = list(operations).index("random_resized_crop")
        """Which step gives the view its size."""
        self.image_size = image_size

    def drawn(
        self, seed: int, epoch: int, indices: Tensor, view: int, sizes: Tensor
    ) -> list[Drawn]:
        """The numbers of each step, for a batch of images.

        Args:
            indices: (N,) int64, which images they are.
            view: 0 for the query's, 1 for the key's.
            sizes: (N, 2) int64, height and width of each image, on the same device.
        """
        # Each step has its own draws, whether or not it is applied: changing one leaves the others as they are.
        counts = [1 + step.operation.num_draws for step in self.steps]
        draws = uniforms(seed, epoch, indices, view, sum(counts)).split(counts, 1)
        numbers = []
        for place, (step, own) in enumerate(zip(self.steps, draws, strict=True)):
            known = sizes if place <= self.crop else torch.full_like(sizes, self.image_size)
            numbers.append(
                step.operation.drawn(own[:, 1:], known) | {"applied": own[:, 0] < step.probability}
            )
        return numbers

    def described(self, numbers: Sequence[Mapping[str, Any]]) -> list[str]:
        """What is done to one image, a line for each step that is."""
        pairs = zip(self.steps, numbers, strict=True)
        return [
            f"{step.name} {step.operation.described(drawn)}".strip()
            for step, drawn in pairs
            if drawn["applied"]
        ]

    def on_image(
        self, image: np.ndarray, numbers: Sequence[Mapping[str, Any]], end: int | None = None
    ) -> np.ndarray:
        """The steps up to `end` on (H, W, 3) uint8, with one image's numbers."""
        for step, drawn in zip(self.steps[:end], numbers, strict=False):
            if drawn["applied"]:
                image = step.operation.on_image(image, drawn)
        return image

    def on_batch(self, images: Tensor, numbers: Sequence[Drawn], start: int = 0) -> Tensor:
        """The steps from `start` on (N, 3, H, W) float32 in 0..1; their result, of that kind."""
        steps = list(zip(self.steps[start:], numbers[start:], strict=True))
        return (on_cpu if images.device.type == "cpu" else on_device)(steps, images)


def on_cpu(steps: Sequence[tuple[Step, Drawn]], images: Tensor) -> Tensor:
    """Each step on those images alone that it was drawn for."""
    order = torch.arange(len(images))
    for step, drawn in steps:
        num = len(images)
        if step.probability < 1:
            # They come first: a stretch of a batch is read and written several times as fast as rows here and there.
            applied = drawn["applied"].index_select(0, order)
            num, first = int(applied.sum()), applied.argsort(descending=True)
            order, images = order.index_select(0, first), images.index_select(0, first)
        some = {name: values.index_select(0, order[:num]) for name, values in drawn.items()}
        done = step.operation.on_batch(images[:num], some) if num else images[:0]
        if num == len(images):
            images = done
        else:
            images[:num] = done
    return images.index_select(0, order.argsort())


def on_device(steps: Sequence[tuple[Step, Drawn]], images: Tensor) -> Tensor:
    """Each step on all images, and then a choice: on a GPU, asking how many it was drawn for would wait for it."""
    for step, drawn in steps:
        done = step.operation.on_batch(images, drawn)
        images = (
            done
            if step.probability == 1
            else torch.where(drawn["applied"][:, None, None, None], done, images)
        )
    return images


def build_operation(
    name: str, settings: Mapping[str, Any] | None, image_size: int, where: str
) -> Step:
    """One step of a view; arguments and errors as of `View`."""
    if name not in OPERATIONS:
        raise InputError(f"{where}: {unknown_name('operation', name, OPERATIONS)}")
    if settings is not None and not isinstance(settings, Mapping):
        raise InputError(
            f"{where}.{name}: expected settings, {{name: number, ...}}, got {settings}"
        )
    arguments = dict(settings or {})
    probability = arguments.pop("probability", 1.0)
    if name == "random_resized_crop" and probability != 1:
        raise InputError(
            f"{where}.{name}: probability={probability}: it gives the views their common size, so always"
        )
    allowed = [*inspect.signature(OPERATIONS[name]).parameters, "probability"]
    for argument in arguments:
        if argument not in allowed or argument == "image_size":
            names = [other for other in allowed if other != "image_size"]
            raise InputError(f"{where}.{name}: {unknown_name('setting', argument, names)}")
    if "image_size" in allowed:
        arguments["image_size"] = image_size
    try:
        expect(is_number(probability, 0, 1), "probability", probability, "a number from 0 to 1")
        return Step(name, OPERATIONS[name](**arguments), probability)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}.{name}: {error}") from error
