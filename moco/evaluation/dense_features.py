"""A set of images with masks as dense evaluation looks at it: from a frozen backbone to a bank, and to confusions.

Letters: N batch, M patches of the bank, P patches of an image, D feature width, C classes.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moco.data.augment.views import Normalized
from moco.data.loading.datamodule import check_unreadable
from moco.errors import InputError, printable
from moco.evaluation.dense_bank import (
    Bank,
    class_shares,
    drawn,
    joined_maps,
    patches_stood_for,
    pixel_classes,
)
from moco.evaluation.features import EmbeddingStopped
from moco.segmentation.mask_sources import MaskedImages, SegmentationSource
from moco.segmentation.metrics import confusion_matrix, segmentation_figures
from moco.segmentation.scaled_images import scaled_loader

log = logging.getLogger(__name__)

BLOCK_BYTES = 2**27  # of features and masks that are classified at once
NUM_MAPS = 4  # of every backbone

Scorer = Callable[[np.ndarray], np.ndarray]
"""Features (Q, D) to scores (Q, C)."""


class NotFinite(Exception):
    """A feature is NaN or infinite; the message names the image."""


class PatchGrid(NamedTuple):
    """The patches of an image."""

    image: int
    features: np.ndarray
    """(P, D) float32, row by row of the grid."""
    grid: tuple[int, int]
    classes: np.ndarray
    """Of the mask's pixels, (H, W) int64."""


@dataclass(frozen=True)
class DenseSet:
    """Images with masks and how a backbone is measured by them.

    Args:
        image_size: of the scaled images' shorter side, about, see `moco.segmentation.scaled_images`, px.
        maps: which of the backbone's maps, 1 to 4; several are joined.
        bank_size: largest M; each image to learn from gives the same share of it.
        sampling: see `moco.evaluation.dense_bank.drawn`.
        num_images: so many images of each part, evenly spaced; None: all.
    """

    source: SegmentationSource
    normalize: Normalized
    image_size: int
    maps: Sequence[int]
    bank_size: int
    sampling: str
    seed: int
    batch_size: int
    num_workers: int = 0
    max_bad_fraction: float = 0.0
    num_images: int | None = None

    @property
    def num_classes(self) -> int:
        return len(self.source.class_names)

    def rows(self, images: MaskedImages) -> list[int]:
        """Which images of a part are looked at."""
        count = min(self.num_images or len(images), len(images))
        return [number * len(images) // count for number in range(count)]

    def patches(
        self,
        images: MaskedImages,
        backbone: Any,
        device: torch.device | str,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[PatchGrid]:
        """The patches of one image after the other; unreadable ones are left out and named.

        Raises:
            InputError: too many images cannot be read.
            NotFinite: a feature is.
            EmbeddingStopped: `should_stop`, which is asked before every batch, said so.
        """
        rows, stride = self.rows(images), backbone.feature_map_strides[-1]
        loader = scaled_loader(
            images,
            rows,
            self.image_size,
            stride,
            self.normalize,
            self.batch_size,
            self.num_workers,
            torch.device(device),
        )
        unreadable: list[int] = []
        for batch in loader:
            if should_stop():
                raise EmbeddingStopped
            maps = encoded(backbone, batch.images.to(device, non_blocking=True), self.maps)
            grid = (maps.shape[2], maps.shape[3])
            features = maps.permute(0, 2, 3, 1).flatten(1, 2).cpu().numpy()  # (N, P, D)
            for place, index in enumerate(batch.indices.tolist()):
                if batch.unreadable[place]:
                    unreadable.append(index)
                    continue
                if not np.isfinite(features[place]).all():
                    name = printable(images.images.name(index))
                    raise NotFinite(f"the features of {name} are not finite (NaN or infinity)")
                yield PatchGrid(index, features[place], grid, batch.classes[place].numpy())
        if unreadable:
            names = ", ".join(printable(images.images.name(index)) for index in unreadable[:3])
            log.warning(
                "skipped %d unreadable images: %s%s",
                len(unreadable),
                names,
                ", ..." * (len(unreadable) > 3),
            )
            check_unreadable(unreadable, images.images, self.max_bad_fraction)

    def bank(
        self,
        backbone: Any,
        device: torch.device | str,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Bank:
        """Random patches of the images to learn from; which ones depends on the seed and the image's number alone.

        Patches without a labelled pixel are left out. Errors of `patches`.

        Raises:
            InputError: no patch is left.
        """
        numbers = {row: place for place, row in enumerate(self.rows(self.source.train))}
        features: np.ndarray | None = None
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # shares, weights, images
        filled = 0
        for patches in self.patches(self.source.train, backbone, device, should_stop):
            shares = class_shares(
                patches.classes, patches.grid, self.num_classes, self.source.ignore_index
            )
            labelled = shares.any(axis=1).nonzero()[0]
            labels = shares[labelled].argmax(axis=1)
            place = numbers[patches.image]
            quota = (place + 1) * self.bank_size // len(numbers) - place * self.bank_size // len(
                numbers
            )
            generator = np.random.default_rng((self.seed, patches.image))
            chosen = drawn(labels, quota, self.sampling, generator)
            if features is None:  # made at once, since joining parts would take the memory twice
                features = np.empty((self.bank_size, patches.features.shape[1]), np.float32)
            features[filled : filled + len(chosen)] = patches.features[labelled[chosen]]
            filled += len(chosen)
            weights = patches_stood_for(labels, chosen) if len(chosen) else np.empty(0, np.float32)
            parts.append((shares[labelled[chosen]], weights, np.full(len(chosen), patches.image)))
        if features is None or filled == 0:
            raise InputError(
                "none of the patches that were drawn from the images to learn from has a labelled pixel"
            )
        return Bank(features[:filled], *map(np.concatenate, zip(*parts, strict=True)))

    def confusions(
        self,
        scorers: Mapping[str, Scorer],
        backbone: Any,
        device: torch.device | str,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, Tensor]:
        """What each scorer makes of the images held out, pixel by pixel of their masks: (C, C), see `confusion_matrix`.

        Errors of `patches`.
        """
        totals = {
            name: torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)
            for name in scorers
        }
        for block in blocks(self.patches(self.source.validation, backbone, device, should_stop)):
            features = np.concatenate([patches.features for patches in block])
            ends = np.cumsum([len(patches.features) for patches in block])[:-1]
            for name, scorer in scorers.items():
                for patches, scores in zip(block, np.split(scorer(features), ends), strict=True):
                    totals[name] += self.confusion(
                        patches, torch.from_numpy(scores).to(device)
                    ).cpu()
        return totals

    def confusion(self, patches: PatchGrid, scores: Tensor) -> Tensor:
        """Of one image, by its patches' scores (P, C)."""
        classes = torch.from_numpy(patches.classes).to(scores.device)
        predicted = pixel_classes(
            scores.T.unflatten(1, patches.grid), (classes.shape[0], classes.shape[1])
        )
        return confusion_matrix(predicted, classes, self.num_classes, self.source.ignore_index)

    def protocol(self, bank: Bank, num_neighbors: int, temperature: float) -> dict[str, Any]:
        """The conditions of the figures, under the names of ``metrics.json``."""
        return {
            "dense/num_neighbors": num_neighbors,
            "dense/temperature": temperature,
            "dense/maps": list(self.maps),
            "dense/bank_size": len(bank.features),
            "dense/sampling": self.sampling,
            "dense/seed": self.seed,
            "dense/image_size": self.image_size,
            "dense/num_images": len(self.rows(self.source.train)),
            "dense/num_queries": len(self.rows(self.source.validation)),
            "dense/num_classes": self.num_classes,
        }


@torch.no_grad()
def encoded(backbone: Any, images: Tensor, maps: Sequence[int]) -> Tensor:
    """The chosen maps of images (N, 3, h, w) as one (N, D, cells), in float32, see `joined_maps`."""
    with torch.autocast(images.device.type, enabled=False):
        every = backbone.feature_maps(images)
        return joined_maps([every[number - 1] for number in maps])


def blocks(patches: Iterator[PatchGrid]) -> Iterator[list[PatchGrid]]:
    """Images together whose features and masks have `BLOCK_BYTES`, or a little more."""
    block: list[PatchGrid] = []
    held = 0
    for image in patches:
        block.append(image)
        held += image.features.nbytes + image.classes.nbytes
        if held >= BLOCK_BYTES:
            yield block
            block, held = [], 0
    if block:
        yield block


def figures_of(confusion: Tensor, class_names: Sequence[str], kind: str) -> dict[str, float | None]:
    """`segmentation_figures` as ``dense/KIND_miou``, ``dense/KIND_pixel_accuracy`` and ``dense/KIND_iou/NAME``."""
    figures = segmentation_figures(confusion, class_names)
    return {key.replace("segment/", f"dense/{kind}_", 1): value for key, value in figures.items()}


def check_maps(maps: Sequence[int], key: str) -> None:
    """Raises InputError if a number is not that of a map, or there is none."""
    if not maps or not set(maps) <= set(range(1, NUM_MAPS + 1)) or len(set(maps)) < len(maps):
        raise InputError(
            f"{key}={list(maps)}: expected numbers from 1, the finest map, to {NUM_MAPS}, each at most once"
        )
