"""The patch features of images with masks, as a frozen backbone gives them, and what follows.

From features to a bank of labelled patches, and from scores of patches to a confusion matrix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.data.augment.views import Normalized
from moco.data.sources.source import PIXEL_SETTINGS
from moco.errors import InputError, printable
from moco.evaluation.dense_bank import Bank, class_shares, draw_patches, patches_represented
from moco.evaluation.features import EmbeddingStopped
from moco.evaluation.image_names import skip_unreadable
from moco.phases import counted
from moco.segmentation.mask_batches import num_read, whole_image_loader
from moco.segmentation.mask_sources import SegmentationSource, build_segmentation_source
from moco.segmentation.masked_images import MaskedImages
from moco.segmentation.metrics import confusion_matrix, segmentation_figures

BLOCK_BYTES = 2**27  # features and masks that are classified at once
NUM_MAPS = 4  # feature maps of every backbone

Scorer = Callable[[np.ndarray], np.ndarray]
"""Features (queries, feature width) to scores (queries, classes)."""


class NotFinite(Exception):
    """A feature is NaN or infinite; the message names the image."""


class ImagePatches(NamedTuple):
    """The patches of one image."""

    image: int
    """The number of the image."""
    features: np.ndarray
    """(patches, feature width) float32, row by row of the grid."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    classes: np.ndarray
    """(height, width) int64, the class of each pixel of the mask."""


@dataclass(frozen=True)
class DenseSet:
    """Images with masks, and how a backbone is measured on them.

    Args:
        source: the images.
        normalize: makes a normalised tensor of an image.
        image_size: the shorter side of the scaled images, about, px; see `scaled_size`.
        maps: which of the backbone's feature maps to use, 1 to 4; several are joined.
        bank_size: largest number of patches in the bank. Every image gives the same share of it.
        sampling: see `draw_patches`.
        seed: of the drawn patches.
        batch_size: images at once.
        num_workers: loader processes.
        max_bad_fraction: the share of images that may be unreadable.
        num_images: how many images of each part to use, evenly spaced; None: all.
        should_stop: asked before every batch.
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
    should_stop: Callable[[], bool] = lambda: False

    @property
    def num_classes(self) -> int:
        return len(self.source.class_names)

    def indices(self, images: MaskedImages) -> list[int]:
        """Return the numbers of the images that are used."""
        count = min(self.num_images or len(images), len(images))
        return [number * len(images) // count for number in range(count)]

    def patches(
        self, images: MaskedImages, backbone: Any, device: torch.device | str
    ) -> Iterator[ImagePatches]:
        """Yield the patches of one image after the other; unreadable images are skipped.

        Raises:
            InputError: too many images cannot be read.
            NotFinite: a feature is NaN or infinite.
            EmbeddingStopped: `should_stop` returned True.
        """
        loader = whole_image_loader(
            images,
            self.normalize,
            self.batch_size,
            self.num_workers,
            torch.device(device),
            indices=self.indices(images),
            image_size=self.image_size,
            stride=backbone.feature_map_strides[-1],
        )
        unreadable: list[int] = []
        total = len(self.indices(images))
        title = "patches of the held-out images"
        if images is self.source.train:
            title = "patches of the training images"
        for batch in counted(loader, title, total, size=num_read):
            if self.should_stop():
                raise EmbeddingStopped
            unreadable += [image.key for image in batch.unreadable]
            if len(batch.indices) == 0:
                continue
            maps = encode_patches(backbone, batch.images.to(device, non_blocking=True), self.maps)
            grid = (maps.shape[2], maps.shape[3])
            features = maps.permute(0, 2, 3, 1).flatten(1, 2).cpu().numpy()
            for row, index in enumerate(batch.indices.tolist()):
                if not np.isfinite(features[row]).all():
                    name = printable(images.name(index))
                    raise NotFinite(f"the features of {name} are not finite (NaN or infinity)")
                yield ImagePatches(index, features[row], grid, batch.classes[row].numpy())
        skip_unreadable(images.images, unreadable, self.max_bad_fraction)

    def bank(self, backbone: Any, device: torch.device | str) -> Bank:
        """Return random labelled patches of the training images.

        Which patches are drawn depends on the seed and the image's number alone.

        Raises:
            InputError: too many images cannot be read, or no patch has a labelled pixel.
            NotFinite, EmbeddingStopped: see `patches`.
        """
        images, ignore_index = self.source.train, self.source.ignore_index
        indices = self.indices(images)
        # The images' parts of the bank differ by one patch at most.
        counts = np.diff(np.arange(len(indices) + 1) * self.bank_size // len(indices))
        count_of_image = dict(zip(indices, counts, strict=True))
        parts = []
        for number, features, grid, classes in self.patches(images, backbone, device):
            shares = class_shares(classes, grid, self.num_classes, ignore_index)
            labelled = shares.any(axis=1).nonzero()[0]
            labels = shares[labelled].argmax(axis=1)
            # A generator for each image: the batch size and other images must not matter.
            generator = np.random.default_rng((self.seed, number))
            drawn = draw_patches(labels, count_of_image[number], self.sampling, generator)
            rows = labelled[drawn]
            weights = patches_represented(labels, drawn)
            parts.append((features[rows], shares[rows], weights, np.full(len(rows), number)))
        bank = Bank(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        if len(bank.features) == 0:
            raise InputError(
                "no patch of the training images has a labelled pixel; "
                "are the masks full of pixels without a class?"
            )
        return bank

    def confusions(
        self, scorers: Mapping[str, Scorer], backbone: Any, device: torch.device | str
    ) -> dict[str, Tensor]:
        """Return each scorer's confusion matrix on the held-out images, see `confusion_matrix`.

        Raises:
            InputError, NotFinite, EmbeddingStopped: see `patches`.
        """
        num_classes, ignore_index = self.num_classes, self.source.ignore_index
        nothing = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        totals = dict.fromkeys(scorers, nothing)
        for block in blocks_of_images(self.patches(self.source.validation, backbone, device)):
            # A search in the bank has a fixed cost, so the patches of many images share one.
            features = np.concatenate([patches.features for patches in block])
            sizes = [len(patches.features) for patches in block]
            for name, scorer in scorers.items():
                scores = torch.from_numpy(scorer(features)).to(device)
                for patches, rows in zip(block, scores.split(sizes), strict=True):
                    classes = torch.from_numpy(patches.classes).to(device)
                    cells = rows.T.unflatten(1, patches.grid)  # (classes, rows, columns)
                    predicted = pixel_classes(cells, *classes.shape)
                    counts = confusion_matrix(predicted, classes, num_classes, ignore_index)
                    totals[name] = totals[name] + counts.cpu()
        return totals

    def protocol(self, bank: Bank, num_neighbors: int, temperature: float) -> dict[str, Any]:
        """Return the conditions of the figures under their names in ``metrics.json``."""
        protocol = {
            "num_neighbors": num_neighbors,
            "temperature": temperature,
            "maps": list(self.maps),
            "bank_size": len(bank.features),
            "sampling": self.sampling,
            "seed": self.seed,
            "image_size": self.image_size,
            "num_images": len(self.indices(self.source.train)),
            "num_queries": len(self.indices(self.source.validation)),
            "num_classes": self.num_classes,
        }
        return {f"dense/{name}": value for name, value in protocol.items()}


@torch.no_grad()
def encode_patches(backbone: Any, images: Tensor, maps: Sequence[int]) -> Tensor:
    """Return the features of patches (N, feature width, rows, columns).

    Args:
        images: (N, bands, height, width).
        maps: see `DenseSet`.
    """
    all_maps = backbone.feature_maps(images)
    return join_maps([all_maps[number - 1] for number in maps])


def join_maps(maps: Sequence[Tensor]) -> Tensor:
    """Join feature maps (N, width, rows, columns) to one with as many cells as the finest.

    In every map each cell has unit norm before the map is enlarged. So all maps count the same.
    """
    num_rows = max(x.shape[2] for x in maps)
    num_columns = max(x.shape[3] for x in maps)
    parts = []
    for x in maps:
        unit = F.normalize(x.float(), dim=1)
        parts.append(F.interpolate(unit, (num_rows, num_columns), mode="bilinear"))
    return torch.cat(parts, dim=1)


def pixel_classes(scores: Tensor, height: int, width: int) -> Tensor:
    """Return the class of every pixel, (height, width) int64, by bilinearly enlarged scores.

    Of equal scores the smaller class wins.

    Args:
        scores: (classes, rows, columns).
    """
    return F.interpolate(scores[None], (height, width), mode="bilinear")[0].argmax(dim=0)


def blocks_of_images(images: Iterator[ImagePatches]) -> Iterator[list[ImagePatches]]:
    """Yield images together whose features and masks have `BLOCK_BYTES`, or a little more."""
    block: list[ImagePatches] = []
    num_bytes = 0
    for patches in images:
        block.append(patches)
        num_bytes += patches.features.nbytes + patches.classes.nbytes
        if num_bytes >= BLOCK_BYTES:
            yield block
            block = []
            num_bytes = 0
    if block:
        yield block


def dense_figures(
    confusion: Tensor, class_names: Sequence[str], kind: str
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Return the IoUs and the pixel accuracy under the names of ``metrics.json``.

    Returns:
        The figures of all classes together, ``dense/KIND_miou`` and ``dense/KIND_pixel_accuracy``;
        and ``dense/KIND_iou/NAME`` of each class. A figure is None if no pixel tells it.
    """
    scores: dict[str, float | None] = {}
    class_ious: dict[str, float | None] = {}
    for key, value in segmentation_figures(confusion, class_names).items():
        name = key.replace("segment/", f"dense/{kind}_", 1)
        if key.startswith("segment/iou/"):
            class_ious[name] = value
        elif key in ("segment/miou", "segment/pixel_accuracy"):
            scores[name] = value
    return scores, class_ious


def build_dense_set(
    section: str,
    name: str,
    root: str | None,
    *,
    maps: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    ignore_index: int,
    max_image_pixels: int,
    pixel_settings: Mapping[str, Any] | None = None,
    download: bool = False,
    **settings: Any,
) -> DenseSet:
    """Return the images of a dataset, with every file checked.

    Args:
        section: of the config that holds `maps`, for the message.
        name, root, ignore_index, max_image_pixels, download: see `build_segmentation_source`.
        maps: see `DenseSet`.
        mean, std: per band, of pixels in 0..1.
        pixel_settings: ``bands``, ``value_range``, ``nodata`` and ``dicom_window`` of the data;
            None: their defaults.
        settings: the other arguments of `DenseSet`.

    Raises:
        InputError: the images cannot be used, or a map is none of a backbone's or there twice.
    """
    if not maps or set(maps) - set(range(1, NUM_MAPS + 1)) or len(set(maps)) < len(maps):
        raise InputError(
            f"{section}.maps={list(maps)}: expected numbers from 1, the finest map, to {NUM_MAPS}, "
            "each at most once"
        )
    source = build_segmentation_source(
        name,
        root,
        download=download,
        ignore_index=ignore_index,
        max_image_pixels=max_image_pixels,
    )
    settings_of_pixels = dict.fromkeys(PIXEL_SETTINGS) | dict(pixel_settings or {})
    values = source.prepare({"name": name, "root": root, **settings_of_pixels}, mean)
    normalize = Normalized(mean, std, bands=values.bands, is_float=values.is_float)
    return DenseSet(source, normalize, maps=maps, **settings)
