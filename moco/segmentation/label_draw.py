"""Few-label runs: which of the training images a run may use, by their names alone."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from moco.errors import InputError


@dataclass(frozen=True)
class LabelDraw:
    """How many of the training images are used, and the seed of the draw.

    Every image has a place in an order that depends on its name and the seed alone. The first
    images of that order are used. So a smaller draw lies inside a larger one, and a draw does not
    depend on the order of the files, on the folder that the dataset is in, or on its other images,
    except that a new image may push out another.
    """

    label_fraction: float | None = None
    """Fraction of the images, above 0 to 1. It is rounded to whole images, at least one."""
    num_images: int | None = None
    """Or the number of images."""
    label_seed: int = 0
    """Another seed draws other images. It changes nothing else."""

    def setting(self) -> str:
        """Return the setting that asks for the draw, as it was given."""
        if self.num_images is not None:
            return f"num_images={self.num_images}"
        return f"label_fraction={self.label_fraction:g}"

    def number_of(self, num_all: int) -> int:
        """Return how many of `num_all` images are used.

        Raises:
            InputError: there are fewer than were asked for.
        """
        if self.num_images is None:
            assert self.label_fraction is not None  # `label_draw` sees to it
            return max(1, round(self.label_fraction * num_all))
        if self.num_images > num_all:
            raise InputError(
                f"num_images={self.num_images}: there are only {num_all} images to train on"
            )
        return self.num_images

    def chosen(self, names: Sequence[str]) -> list[int]:
        """Return the numbers of the images that are used, in ascending order.

        Args:
            names: of all training images.

        Raises:
            InputError: there are fewer than were asked for.
        """
        places = []
        for number, name in enumerate(names):
            text = f"{self.label_seed}/".encode() + os.fsencode(name)
            place = hashlib.blake2b(text, digest_size=16).digest()
            places.append((place, number))
        places.sort()
        chosen = [number for _, number in places[: self.number_of(len(names))]]
        return sorted(chosen)


def label_draw(
    label_fraction: float | None, num_images: int | None, label_seed: int
) -> LabelDraw | None:
    """Return the draw that the settings ask for; None: all images are used.

    Raises:
        InputError: the settings contradict each other, or one has no effect.
    """
    if label_fraction is not None and num_images is not None:
        raise InputError(
            f"label_fraction={label_fraction:g} and num_images={num_images}: expected one of them"
        )
    if label_fraction is None and num_images is None:
        if label_seed:
            raise InputError(
                f"label_seed={label_seed}: without label_fraction or num_images it has no effect"
            )
        return None
    return LabelDraw(label_fraction, num_images, label_seed)
