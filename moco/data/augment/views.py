"""Images to tensors: the pair of augmented views to train on, the plain view to evaluate.

Letters: N batch, H W pixels of the source, S side of a view.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from moco.data.augment.image_kernels import write_planes
from moco.data.augment.operations import Drawn
from moco.data.augment.resolution_ramp import ResolutionRamp
from moco.data.augment.view_steps import View
from moco.data.files.decoding import EncodedImage
from moco.data.files.images import UnreadableImage
from moco.errors import InputError

Transform = Callable[[Any], Any]
REDUCTIONS = (8, 4, 2)
PIECE = (
    2**18
)  # pixels of all channels: what a processor's cache holds; the colour operations go over them many times


class ViewPair:
    """The query view and the key view of each image, each with its own draws.

    A draw depends on (seed, epoch, index, view) alone: not on the engine, the worker, nor on what was drawn before.

    Args:
        query, key: operations of the two views.
        image_size: S, side of both views, px; where there is a `ramp`, the full one.
        engine: worker: a loader's worker takes all steps; batch: those up to the crop, and the device the others.
        ramp: S as a function of the epoch, if it is not the same in all.
    """

    def __init__(
        self,
        query: Mapping[str, Any],
        key: Mapping[str, Any],
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        seed: int,
        engine: str = "worker",
        ramp: ResolutionRamp | None = None,
    ) -> None:
        self.views = [
            View(query, image_size, "augmentation.query"),
            View(key, image_size, "augmentation.key"),
        ]
        self.ramp = ramp or ResolutionRamp(image_size)
        self.smaller_views = {
            size: [View(query, size, "augmentation.query"), View(key, size, "augmentation.key")]
            for size in self.ramp.sizes[:-1]
        }
        self.mean, self.std = mean, std
        self.scale, self.shift = normalisation(mean, std)
        self.image_size = image_size
        self.seed = seed
        self.engine = engine

    def views_at(self, epoch: int) -> list[View]:
        """The views of the epoch's size."""
        return self.smaller_views.get(self.ramp.size_at(epoch), self.views)

    def drawn(self, epoch: int, indices: Tensor, sizes: Tensor) -> list[list[Drawn]]:
        """What is drawn for the images `indices` (N,) of so many rows and columns (N, 2): for each view, for each step."""
        return [
            view.drawn(self.seed, epoch, indices, side, sizes)
            for side, view in enumerate(self.views_at(epoch))
        ]

    def described(self, epoch: int, index: int, size: Sequence[int]) -> list[list[str]]:
        """What is drawn for one image of so many rows and columns, in words: for each view, a line for each step."""
        drawn = self.drawn(epoch, torch.tensor([index]), torch.tensor([list(size)]))
        own = [
            [{name: values[0] for name, values in step.items()} for step in view] for view in drawn
        ]
        return [
            view.described(numbers) for view, numbers in zip(self.views_at(epoch), own, strict=True)
        ]

    def ends_in_worker(self) -> list[int]:
        """How many steps of each view a worker takes."""
        return [
            len(view.steps) if self.engine == "worker" else view.crop + 1 for view in self.views
        ]

    def on_images(
        self, images: Sequence[EncodedImage], epoch: int, indices: Tensor, views: Tensor
    ) -> list[int]:
        """The worker's part, on images of any size.

        Args:
            views: gets two views of each, (2, N, 3, S, S) uint8.

        Returns:
            The rows of those that cannot be decoded.
        """
        drawn = self.drawn(epoch, indices, torch.tensor([image.size for image in images]))
        numbers = [
            [{name: values.numpy() for name, values in step.items()} for step in view]
            for view in drawn
        ]
        planes = views.numpy()
        failed = []
        for row, image in enumerate(images):
            own = [
                [{name: values[row] for name, values in step.items()} for step in view]
                for view in numbers
            ]
            try:
                reduction = self._reduction(own, self.ramp.size_at(epoch))
                pixels = image.pixels(reduction)
            except UnreadableImage:
                failed.append(row)
                continue
            for side, (view, end) in enumerate(
                zip(self.views_at(epoch), self.ends_in_worker(), strict=True)
            ):
                if pixels.shape[:2] != tuple(image.size):
                    own[side][view.crop]["reduction"] = reduction
                write_planes(view.on_image(pixels, own[side], end), planes[side, row])
        return failed

    def empty_views(self, num: int, epoch: int = 0) -> Tensor:
        """Room for the views of so many images in that epoch."""
        side = self.ramp.size_at(epoch)
        return torch.empty(len(self.views), num, 3, side, side, dtype=torch.uint8)

    def _reduction(self, numbers: Sequence[Sequence[Mapping[str, Any]]], side: int) -> int:
        """How many times smaller an image may be decoded so that both its crops are still as large as views of `side`."""
        if any(
            view.crop > 0 for view in self.views
        ):  # what comes before the crop is meant for the whole image
            return 1
        shortest = min(int(drawn[0]["box"][2:].min()) for drawn in numbers)
        return next((reduction for reduction in REDUCTIONS if shortest >= reduction * side), 1)

    def finished(
        self, views: Sequence[Tensor], epoch: int, indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The device's part of what workers began: (N, 3, S, S) uint8 to normalised float32."""
        sizes = same_size(views[0], indices)
        pair = []
        for side, (view, images, end) in enumerate(
            zip(self.views_at(epoch), views, self.ends_in_worker(), strict=True)
        ):
            if end == len(view.steps):
                pair.append(self.normalized(images))
            else:
                drawn = view.drawn(self.seed, epoch, indices, side, sizes)
                pair.append(self._on_device(view, images, drawn, end))
        return pair[0], pair[-1]

    def on_batch(self, images: Tensor, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """All steps, on the device: images of one size, (N, 3, H, W) uint8, to two normalised views (N, 3, S, S)."""
        sizes = same_size(images, indices)
        drawn = self.drawn(epoch, indices, sizes)
        views = self.views_at(epoch)
        pair = [
            self._on_device(view, images, numbers, 0)
            for view, numbers in zip(views, drawn, strict=True)
        ]
        return pair[0], pair[-1]

    def _on_device(self, view: View, images: Tensor, drawn: list[Drawn], start: int) -> Tensor:
        largest = max(images[0].numel(), 3 * view.image_size**2)
        at_once = PIECE * torch.get_num_threads()
        piece = max(1, at_once // largest) if images.device.type == "cpu" else len(images)
        self._normalise_on(images.device)
        results = torch.empty(
            len(images), 3, view.image_size, view.image_size, device=images.device
        )
        for first in range(0, len(images), piece):
            rows = slice(first, first + piece)
            numbers = [{name: values[rows] for name, values in step.items()} for step in drawn]
            pixels = (
                images[rows].to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
            )
            torch.mul(
                view.on_batch(pixels, numbers, start), 255 * self.scale, out=results[rows]
            ).sub_(self.shift)
        return results

    def normalized(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 as the encoders want them: float32, minus mean, over std, per channel."""
        self._normalise_on(images.device)
        # In place: they are large, and new memory costs a CPU as much as the arithmetic.
        pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.mul_(self.scale).sub_(self.shift)

    def _normalise_on(self, device: torch.device) -> None:
        if self.scale.device != device:
            self.scale, self.shift = self.scale.to(device), self.shift.to(device)


def same_size(images: Tensor, indices: Tensor) -> Tensor:
    """(N, 2): the height and width of the images, for each of `indices`; filled in on their device."""
    return torch.stack([torch.full_like(indices, side) for side in images.shape[2:]], 1)


def normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """By what 8-bit pixels are multiplied, and what is subtracted then, (3, 1, 1) each.

    One product and one difference: on small images ToImage, ToDtype and Normalize cost as much as the colour jitter.

    Raises:
        InputError: they are not three each, or a std is not above 0.
    """
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise InputError(
            f"augmentation.mean={mean}, augmentation.std={std}: expected three numbers each, std above 0"
        )
    scale = 1 / (255 * torch.tensor(std).view(3, 1, 1))
    return scale, torch.tensor(mean).view(3, 1, 1) / torch.tensor(std).view(3, 1, 1)


class Normalized:
    """A Pillow image as (3, H, W) float32: pixels in 0..1, minus `mean`, over `std`, per channel.

    Raises:
        InputError: as of `normalisation`.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.scale, self.shift = normalisation(mean, std)

    def __call__(self, image: Image.Image) -> Tensor:
        return v2.functional.pil_to_tensor(image) * self.scale - self.shift


class EvaluationView:
    """Pillow image to (3, H, W) without chance: resize the shorter side to image_size / crop_ratio, centre crop.

    Raises:
        InputError: as of `normalisation`.
    """

    def __init__(
        self, image_size: int, crop_ratio: float, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.crop = evaluation_crop(image_size, crop_ratio)
        self.normalized = Normalized(mean, std)
        self.unchanged_size = image_size if round(image_size / crop_ratio) == image_size else None
        """Side of the images of which it leaves every pixel as it is, px."""

    def __call__(self, image: Image.Image) -> Tensor:
        return self.normalized(self.crop(image))


def build_evaluation_view(
    image_size: int, crop_ratio: float, mean: Sequence[float], std: Sequence[float]
) -> EvaluationView:
    """See `EvaluationView`."""
    return EvaluationView(image_size, crop_ratio, mean, std)


def evaluation_crop(image_size: int, crop_ratio: float) -> Callable[[Image.Image], Image.Image]:
    """`build_evaluation_view` up to the pixels: Pillow image to Pillow image of image_size px."""
    return v2.Compose(
        [middle_of_stripe, v2.Resize(round(image_size / crop_ratio)), v2.CenterCrop(image_size)]
    )


def middle_of_stripe(image: Image.Image) -> Image.Image:
    """Of an image that is more than 32 times as long as wide the middle, 32 times as long.

    Enlarged to a shorter side of 224 px, a line of one pixel by a million would take 150 GB.
    """
    longest = 32 * min(image.size)
    if max(image.size) <= longest:
        return image
    return v2.functional.center_crop(image, [min(image.height, longest), min(image.width, longest)])


def rgb_batch(pixels: Tensor) -> Tensor:
    """Images in memory, grey (M, H, W), RGB or RGBA (M, H, W, 3 or 4), as (M, 3, H, W) uint8; transparent is white."""
    if pixels.ndim == 3:
        return pixels[:, None].expand(-1, 3, -1, -1)
    if pixels.shape[3] == 4:
        images = [Image.fromarray(image.numpy()) for image in pixels.cpu()]
        white = Image.new("RGBA", images[0].size, "white")
        flat = [np.asarray(Image.alpha_composite(white, image).convert("RGB")) for image in images]
        pixels = torch.from_numpy(np.stack(flat)).to(pixels.device)
    return pixels.permute(0, 3, 1, 2)


def picked(pixels: Tensor, indices: Tensor) -> Tensor:
    """Those of `rgb_batch`'s images, (N, 3, H, W), in new memory plane by plane.

    Whole images are copied as they lie, which a CPU does several times as fast as `pixels[indices]`.
    """
    return pixels.permute(0, 2, 3, 1).index_select(0, indices).permute(0, 3, 1, 2).contiguous()
