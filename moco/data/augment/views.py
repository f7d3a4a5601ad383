"""Images to tensors: the two augmented views to train on, and the plain view to evaluate.

A view to train on is an ordered list of operations, or a whole pipeline of the user's. Its random
numbers are a pure function of (seed, epoch, index, view). Two engines do the work with the same
numbers: loader processes, one image at a time, or the device, one batch at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from moco.data.augment.draws import uniforms
from moco.data.augment.image_kernels import split_bands
from moco.data.augment.local_crops import (
    FIRST_LOCAL_VIEW,
    LocalCrop,
    LocalCrops,
    check_crop_comes_first,
    constrained,
)
from moco.data.augment.operation import Drawn, ImageKind, Numbers, defines, kind_of_images
from moco.data.augment.operations import Step, build_operation, known_operations
from moco.data.augment.pipeline import Pipeline, pipeline_step, planes_of
from moco.data.augment.placements import composed, identity_maps
from moco.data.augment.presets import read_preset
from moco.data.augment.resolution_ramp import ResolutionRamp
from moco.data.files.images import to_rgb
from moco.errors import InputError

Transform = Callable[[Any], Any]
AnyImage = Image.Image | np.ndarray
"""A Pillow image; or an array (height, width, bands), uint8 RGB or float32 in 0..1."""
Operations = Mapping[str, Any] | Callable[[Any], Any]
"""A view: the settings of its operations by name, in order; or ``{transforms: target, options:
{...}}``; or a callable, see `moco.data.augment.pipeline.Pipeline`."""
EXPECTED = "operations, {name: settings, ...}, or {transforms: package.module:function}"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Values that one thread augments at once. They fit into a processor's cache, and the colour
# operations read them many times.
VALUES_AT_ONCE = 2**18
LONGEST_STRIPE = 32  # times the shorter side


class View:
    """The operations of one view, in order.

    Args:
        operations: settings by name, one of them `random_resized_crop`; or a whole pipeline, which
            is a view of one step.
        image_size: side of the result, px.
        where: key of the view in the config, for error messages.
        bands, is_float: the kind of the images, see `ViewPair`.

    Raises:
        InputError: an operation, a setting or a value is unknown, an operation is not for these
            images, or the user's own code cannot be used; the message names the key.
    """

    def __init__(
        self,
        operations: Operations | None,
        image_size: int,
        where: str,
        bands: int = 3,
        is_float: bool = False,
    ) -> None:
        kind = kind_of_images(bands, is_float)
        self.image_size = image_size
        self.where = where
        self.steps: list[Step] = []
        self.crop = 0
        """The number of the step that gives the view its size."""
        if operations is None:
            raise InputError(f"{where}: missing; expected {EXPECTED}")
        if not callable(operations) and not isinstance(operations, Mapping):
            raise InputError(f"{where}={operations}: expected {EXPECTED}")
        if callable(operations) or "transforms" in operations:
            self.steps.append(pipeline_step(operations, image_size, where, kind))
            return
        if "random_resized_crop" not in operations:
            raise InputError(f"{where}: random_resized_crop is missing; it makes views of one size")
        for name, settings in operations.items():
            self.steps.append(build_operation(name, settings, image_size, where, kind))
        self.crop = list(operations).index("random_resized_crop")
        for step in self.steps[: self.crop]:
            if step.operation.needs_square:
                raise InputError(
                    f"{step.where}: expected after random_resized_crop, which makes images square"
                )

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline that makes the whole view, or None."""
        operation = self.steps[0].operation
        if isinstance(operation, Pipeline):
            return operation
        return None

    @property
    def own_steps(self) -> list[Step]:
        """The steps that are code of the user's."""
        return [step for step in self.steps if step.is_own]

    @property
    def single_image_step(self) -> Step | None:
        """The first step that works on one image at a time, and would do so on a device, too."""
        for step in self.steps:
            if not defines(type(step.operation), "on_batch"):
                return step
        return None

    def draw(self, seed: int, epoch: int, indices: Tensor, view: int, sizes: Tensor) -> list[Drawn]:
        """Return the numbers of each step for a batch of images.

        Args:
            indices: (batch,) int64, number of each image in the dataset.
            view: 0 for the query's view, 1 for the key's, from `FIRST_LOCAL_VIEW` on for local
                crops.
            sizes: (batch, 2) int64, height and width of each image, on the same device.
        """
        # Each step has its own draws, whether it is applied or not. So changing one step leaves
        # the draws of the steps before it as they are.
        counts = [1 + step.operation.num_draws for step in self.steps]
        draws = uniforms(seed, epoch, indices, view, sum(counts)).split(counts, 1)
        numbers = []
        for place, step in enumerate(self.steps):
            drawn = step.operation.draw(draws[place][:, 1:], self.sizes_at(place, sizes))
            drawn["applied"] = draws[place][:, 0] < step.probability
            numbers.append(drawn)
        return numbers

    def sizes_at(self, place: int, sizes: Tensor) -> Tensor:
        """Return height and width of the images that the step number `place` gets, (batch, 2).

        Args:
            sizes: (batch, 2), those of the whole images.
        """
        if place > self.crop:
            return torch.full_like(sizes, self.image_size)
        return sizes

    def placement(self, numbers: Sequence[Drawn], sizes: Tensor) -> Tensor:
        """Return where the view is in each image, see `moco.data.augment.placements`.

        Args:
            numbers: of each step, from `draw`.
            sizes: (batch, 2), height and width of each image, px.

        Returns:
            (batch, 2, 3) float64.

        Raises:
            InputError: the view is a pipeline, or an operation of the user's does not say where it
                moves pixels.
        """
        key = "method.dense_match=location"
        if self.pipeline is not None:
            raise InputError(
                f"{key}: {self.pipeline.where} does not say which part of the image a view shows; "
                "expected operations, such as augmentation=moco_v2"
            )
        unmoved = identity_maps(sizes[:, 0].double())
        total = unmoved
        for place, (step, drawn) in enumerate(zip(self.steps, numbers, strict=True)):
            if step.is_own and not defines(type(step.operation), "source_map"):
                raise InputError(
                    f"{key}: {step.where} does not say whether it moves pixels; define "
                    "source_map, which returns None if all stay in place"
                )
            moved = step.operation.source_map(drawn, self.sizes_at(place, sizes))
            if moved is None:
                continue
            if getattr(moved, "shape", None) != unmoved.shape:
                shape = tuple(getattr(moved, "shape", ()))
                raise InputError(
                    f"{step.where}: source_map returned {type(moved).__name__} of shape {shape}; "
                    "expected None, or a tensor (batch, 2, 3)"
                )
            is_applied = drawn["applied"][:, None, None]
            total = composed(total, torch.where(is_applied, moved.double(), unmoved))
        return total

    def describe(self, numbers: Sequence[Numbers]) -> list[str]:
        """Return a line of text for each step that is applied to one image."""
        lines = []
        for step, drawn in zip(self.steps, numbers, strict=True):
            if drawn["applied"]:
                lines.append(f"{step.name} {step.operation.describe(drawn)}".strip())
        return lines

    def on_image(
        self, image: np.ndarray, numbers: Sequence[Numbers], end: int | None = None
    ) -> np.ndarray:
        """Apply the steps before `end` to one image (height, width, bands) of the run's kind."""
        # There are numbers for the steps after `end` too.
        for step, drawn in zip(self.steps[:end], numbers, strict=False):
            if drawn["applied"]:
                image = step.on_image(image, drawn)
        return image

    def on_batch(self, images: Tensor, numbers: Sequence[Drawn], start: int = 0) -> Tensor:
        """Apply the steps from `start` on to a batch (batch, bands, height, width) in 0..1."""
        if images.device.type == "cpu":
            return apply_on_cpu(self.steps[start:], numbers[start:], images)
        return apply_on_gpu(self.steps[start:], numbers[start:], images)


def foreign_code(operations: Any) -> list[str]:
    """Return what a view in a checkpoint would need of the user's own code.

    Nothing is imported. The view can be built only if the list is empty.

    Returns:
        The targets of the view, and the names of operations that are not registered.
    """
    if not isinstance(operations, Mapping):
        return []
    if "transforms" in operations:
        return [str(operations["transforms"])]
    found = []
    for name, settings in operations.items():
        target = None
        if isinstance(settings, Mapping):
            target = settings.get("target")
        if target is not None:
            found.append(str(target))
        elif name not in known_operations():
            found.append(name)
    return found


def apply_on_cpu(steps: Sequence[Step], numbers: Sequence[Drawn], images: Tensor) -> Tensor:
    """Apply each step only to the images that it was drawn for."""
    order = torch.arange(len(images))
    for step, drawn in zip(steps, numbers, strict=True):
        num_applied = len(images)
        if step.probability < 1:
            # The images that the step changes move to the front: one piece of a batch is read
            # and written several times as fast as single rows.
            applied = drawn["applied"].index_select(0, order)
            num_applied = int(applied.sum())
            sorting = applied.argsort(descending=True)
            order = order.index_select(0, sorting)
            images = images.index_select(0, sorting)
        if num_applied == 0:
            continue
        rows = order[:num_applied]
        own = {name: values.index_select(0, rows) for name, values in drawn.items()}
        changed = step.on_batch(images[:num_applied], own)
        if num_applied == len(images):
            images = changed
        else:
            images[:num_applied] = changed
    return images.index_select(0, order.argsort())


def apply_on_gpu(steps: Sequence[Step], numbers: Sequence[Drawn], images: Tensor) -> Tensor:
    """Apply each step to all images, then choose; counting images would wait for the device."""
    for step, drawn in zip(steps, numbers, strict=True):
        changed = step.on_batch(images, drawn)
        if step.probability == 1:
            images = changed
        else:
            is_applied = drawn["applied"][:, None, None, None]
            images = torch.where(is_applied, changed, images)
    return images


class ViewPair:
    """The query view and the key view of each image, with independent draws.

    Called with one image, it returns the two views of it. Batches of a run go through its other
    methods.

    Args:
        query, key: the two views, see `Operations`. Without `key` both are made in the same way.
        mean, std: of each band, or one number for all bands, for the normalisation; the default
            is ImageNet's.
        image_size: side of both views, px; with a `ramp`, the full side.
        seed: other seeds give other views.
        engine: ``worker``: a loader process applies all steps; ``batch``: a loader process applies
            the steps up to the crop, and the device applies the others.
        ramp: the side as a function of the epoch; None: it is always the same.
        bands: of the images; 8-bit images have 3 (RGB).
        is_float: the images are float32 in 0..1, with any number of bands. Otherwise they are
            uint8.
        with_placements: batches also say where the views are in the images, see `placements`.
        local: small crops beside the two views, with the operations of the query view; None: there
            are none.

    Raises:
        InputError: a setting is wrong, or does not suit the bands; the message names its key.

    Example:
        >>> views = moco.ViewPair.named("moco_v2", image_size=224)
        >>> query, key = views(Image.open("a.jpg"), epoch=0, index=17)
        >>> query.shape
        torch.Size([3, 224, 224])
    """

    def __init__(
        self,
        query: Operations,
        key: Operations | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        image_size: int = 224,
        seed: int = 0,
        engine: str = "worker",
        ramp: ResolutionRamp | None = None,
        bands: int = 3,
        is_float: bool = False,
        with_placements: bool = False,
        local: LocalCrops | None = None,
    ) -> None:
        if key is None:
            key = query
        self.kind = kind_of_images(bands, is_float)
        self.ramp = ramp or ResolutionRamp(image_size)
        self.views_of_size: dict[int, list[View]] = {}
        for size in self.ramp.sizes:
            query_view = View(query, size, "augmentation.query", bands, is_float)
            key_view = View(key, size, "augmentation.key", bands, is_float)
            self.views_of_size[size] = [query_view, key_view]
        if self.ramp.start_image_size is not None:
            for view in self.views_at(0):
                check_any_size(view, self.ramp)
        self.scale, self.shift = normalisation(mean, std, bands, is_float)
        self.mean = for_each_band(mean, bands)
        self.std = for_each_band(std, bands)
        self.image_size = image_size
        self.seed = seed
        self.engine = engine
        self.with_placements = with_placements
        if with_placements:
            # What cannot be followed, and what the user's code returns, shows here.
            self.placements(0, torch.arange(2), torch.full((2, 2), image_size))
        self.local = local
        self.local_view_of_size: dict[int, View] = {}
        if local is not None:
            for size, views in self.views_of_size.items():
                self.local_view_of_size[size] = local_view(query, views, size, local, self.kind)

    @classmethod
    def named(cls, name: str, image_size: int = 224, **settings: Any) -> "ViewPair":
        """Return a pair that is published, or that a preset of this project uses.

        Args:
            name: of a file in ``conf/augmentation``, such as ``moco_v2`` or ``byol``.
            image_size: side of both views, px.
            settings: other arguments of `ViewPair`; they replace those of the file.

        Raises:
            InputError: there is no such pair.
        """
        settings = read_preset(name) | {"image_size": image_size} | settings
        return cls(**settings)

    def __call__(
        self, image: Image.Image | np.ndarray, epoch: int = 0, index: int = 0
    ) -> tuple[Tensor, ...]:
        """Return the query view and the key view of one image, then its local crops.

        They are those of a run with this seed, in this epoch, of image number `index`: the same
        bits as from loader processes, and equal within rounding to those from a device. The same
        epoch and index give the same views, so count both.

        Args:
            image: a Pillow image, or uint8 (height, width, 3); with `is_float`, float32 (height,
                width, bands) in 0..1.
            epoch: counted from 0.
            index: number of the image in its dataset.

        Returns:
            Two views, and the local crops if there are any, (bands, side, side) float32 each,
            normalised.

        Raises:
            InputError: it is no such image, or the user's own code returns something else.
        """
        views = self.empty_views(1, epoch)
        indices = torch.tensor([index])
        images = [checked_image(image, self.kind)]
        self.on_images(images, epoch, indices, views)
        made: tuple[Tensor, ...] = self.finished((views[0], views[1]), epoch, indices)
        if self.local is not None:
            crops = self.empty_local_crops(1, epoch)
            self.local_crops_on_images(images, epoch, indices, crops)
            made += self.finished_local_crops(tuple(crops), epoch, indices)
        return tuple(view[0] for view in made)

    def views_at(self, epoch: int) -> list[View]:
        """Return the views with the size of an epoch."""
        return self.views_of_size[self.ramp.size_at(epoch)]

    def draw(self, epoch: int, indices: Tensor, sizes: Tensor) -> list[list[Drawn]]:
        """Return the numbers for each view and each of its steps.

        Args:
            indices: (batch,) int64, number of each image in the dataset.
            sizes: (batch, 2) int64, height and width of each image, px.
        """
        drawn = []
        for number, view in enumerate(self.views_at(epoch)):
            drawn.append(view.draw(self.seed, epoch, indices, number, sizes))
        return drawn

    def describe(self, epoch: int, index: int, size: Sequence[int]) -> list[list[str]]:
        """Return, for each view of one image, a line of text for each step that is applied.

        Args:
            size: height and width of the image, px.
        """
        indices = torch.tensor([index])  # a batch of one
        sizes = torch.tensor([list(size)])
        drawn = self.draw(epoch, indices, sizes)
        lines = []
        for view, numbers in zip(self.views_at(epoch), drawn, strict=True):
            lines.append(view.describe(row_of(numbers, 0)))
        return lines

    def num_worker_steps(self, view: View) -> int:
        """Return how many steps of a view a loader process applies."""
        if self.engine == "worker":
            return len(view.steps)
        return view.crop + 1

    def on_images(
        self,
        images: Sequence[np.ndarray],
        epoch: int,
        indices: Tensor,
        views: Tensor,
        key_images: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Apply the steps of a loader process.

        Args:
            images: (height, width, bands) each, of the pair's kind and of any size.
            indices: (batch,) int64, number of each image in the dataset.
            views: the result is written here, (2, batch, bands, side, side) of that kind.
            key_images: what the key views are made of; None: also of `images`. The draws of row i
                are those of ``indices[i]`` in both views.
        """
        if key_images is None:
            key_images = images
        of_views = [images, key_images]
        planes = views.numpy()
        for place, view in enumerate(self.views_at(epoch)):
            of_view = of_views[place]
            sizes = torch.tensor([image.shape[:2] for image in of_view])
            numbers = view.draw(self.seed, epoch, indices, place, sizes)
            self._write(view, of_view, numbers, planes[place])

    def _write(
        self,
        view: View,
        images: Sequence[np.ndarray],
        numbers: Sequence[Drawn],
        planes: np.ndarray,
    ) -> None:
        """Apply a loader process's steps of a view, and write the results to the planes."""
        end = self.num_worker_steps(view)
        arrays = list(map(as_arrays, numbers))
        for row, image in enumerate(images):
            result = view.on_image(image, row_of(arrays, row), end)
            split_bands(result, planes[row])

    def placements(self, epoch: int, indices: Tensor, sizes: Tensor) -> Tensor:
        """Return where the views are in their images, see `moco.data.augment.placements`.

        Args:
            indices: (batch,) int64, number of each image in the dataset.
            sizes: (batch, 2) int64, height and width of each image, px, on the same device.

        Returns:
            (2, batch, 2, 3) float32: of the query views and of the key views.

        Raises:
            InputError: a view cannot be followed, see `View.placement`.
        """
        placements = []
        for place, view in enumerate(self.views_at(epoch)):
            numbers = view.draw(self.seed, epoch, indices, place, sizes)
            placements.append(view.placement(numbers, sizes))
        return torch.stack(placements).float()

    def draw_local_crops(self, epoch: int, indices: Tensor, sizes: Tensor) -> list[list[Drawn]]:
        """Return the numbers for each local crop and each of its steps.

        The arguments are those of `placements`.
        """
        assert self.local is not None
        views = list(enumerate(self.views_at(epoch)))
        if not self.local.in_both:
            views = views[-1:]
        anchors = []
        for place, view in views:
            numbers = view.draw(self.seed, epoch, indices, place, sizes)
            anchors.append(numbers[view.crop]["box"])
        view = self.local_view_of_size[self.ramp.size_at(epoch)]
        drawn = []
        for number in range(self.local.count):
            numbers = view.draw(self.seed, epoch, indices, FIRST_LOCAL_VIEW + number, sizes)
            numbers[view.crop] = constrained(numbers[view.crop], anchors, self.local.overlap)
            drawn.append(numbers)
        return drawn

    def local_crops_on_images(
        self, images: Sequence[np.ndarray], epoch: int, indices: Tensor, crops: Tensor
    ) -> None:
        """Apply the steps of a loader process for the local crops.

        Args:
            images, epoch, indices: see `on_images`.
            crops: the result is written here, from `empty_local_crops`.
        """
        sizes = torch.tensor([image.shape[:2] for image in images])
        view = self.local_view_of_size[self.ramp.size_at(epoch)]
        planes = crops.numpy()
        for number, numbers in enumerate(self.draw_local_crops(epoch, indices, sizes)):
            self._write(view, images, numbers, planes[number])

    def empty_local_crops(self, num: int, epoch: int = 0) -> Tensor:
        """Return memory for the local crops of `num` images, (count, num, bands, side, side)."""
        assert self.local is not None
        side = self.local.side(self.ramp.size_at(epoch))
        shape = (self.local.count, num, self.kind.bands, side, side)
        return torch.empty(shape, dtype=self.kind.dtype)

    def finished_local_crops(
        self, crops: Sequence[Tensor], epoch: int, indices: Tensor
    ) -> tuple[Tensor, ...]:
        """Apply the steps of the device to the local crops that loader processes made.

        Args:
            crops: (batch, bands, side, side) each.

        Returns:
            The same, float32, normalised.
        """
        view = self.local_view_of_size[self.ramp.size_at(epoch)]
        results = []
        for number, images in enumerate(crops, start=FIRST_LOCAL_VIEW):
            results.append(self._finished(images, epoch, indices, view, number))
        return tuple(results)

    def local_crops_on_batch(
        self, images: Tensor, epoch: int, indices: Tensor
    ) -> tuple[Tensor, ...]:
        """Apply all steps of the local crops on the device; the arguments are `on_batch`'s."""
        view = self.local_view_of_size[self.ramp.size_at(epoch)]
        results = []
        for numbers in self.draw_local_crops(epoch, indices, sizes_of(images, indices)):
            results.append(self._on_device(images, view, numbers, start=0))
        return tuple(results)

    def empty_views(self, num: int, epoch: int = 0) -> Tensor:
        """Return memory for the views of `num` images, (2, num, bands, side, side).

        It is uint8, or float32 with `is_float`.
        """
        side = self.ramp.size_at(epoch)
        shape = (len(self.views_at(epoch)), num, self.kind.bands, side, side)
        return torch.empty(shape, dtype=self.kind.dtype)

    def black_image(self) -> np.ndarray:
        """Return the smallest image of the pair's kind, which stands in for an unreadable one."""
        return np.zeros((1, 1, self.kind.bands), self.kind.array_dtype)

    def finished(
        self, views: Sequence[Tensor], epoch: int, indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply the steps of the device to the views that loader processes made.

        Args:
            views: (batch, bands, side, side) each, as `on_images` writes them.

        Returns:
            The two views, (batch, bands, side, side) float32 each, normalised.
        """
        results = []
        for place, view in enumerate(self.views_at(epoch)):
            results.append(self._finished(views[place], epoch, indices, view, place))
        return results[0], results[-1]

    def _finished(
        self, images: Tensor, epoch: int, indices: Tensor, view: View, place: int
    ) -> Tensor:
        """Apply the steps of the device to images of one view, see `finished`."""
        start = self.num_worker_steps(view)
        if start == len(view.steps):
            return self.normalized(images)
        numbers = view.draw(self.seed, epoch, indices, place, sizes_of(images, indices))
        return self._on_device(images, view, numbers, start)

    def on_batch(
        self, images: Tensor, epoch: int, indices: Tensor, key_images: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Apply all steps on the device.

        Args:
            images: (batch, bands, height, width), uint8 or float32 in 0..1 as the pair's kind.
            key_images: see `on_images`.

        Returns:
            The two views, (batch, bands, side, side) float32 each, normalised.
        """
        if key_images is None:
            key_images = images
        of_views = [images, key_images]
        results = []
        # A pair of one view, as an evaluation has, gives that view twice.
        for place, view in enumerate(self.views_at(epoch)):
            of_view = of_views[place]
            numbers = view.draw(self.seed, epoch, indices, place, sizes_of(of_view, indices))
            results.append(self._on_device(of_view, view, numbers, start=0))
        return results[0], results[-1]

    def _on_device(
        self, images: Tensor, view: View, numbers: Sequence[Drawn], start: int
    ) -> Tensor:
        """Apply the steps of one view from `start` on, and normalise."""
        self._move_normalisation(images.device)
        side = view.image_size
        num_at_once = len(images)
        if images.device.type == "cpu":
            values_of_image = max(images[0].numel(), self.kind.bands * side**2)
            values_at_once = VALUES_AT_ONCE * torch.get_num_threads()
            num_at_once = max(1, values_at_once // values_of_image)
        results = torch.empty(len(images), self.kind.bands, side, side, device=images.device)
        largest = self.kind.largest
        for first in range(0, len(images), num_at_once):
            rows = slice(first, first + num_at_once)
            pixels = to_float(images[rows])
            if largest != 1:
                pixels.mul_(1 / largest)
            pixels = view.on_batch(pixels, row_of(numbers, rows), start)
            torch.mul(pixels, largest * self.scale, out=results[rows]).sub_(self.shift)
        return results

    def normalized(self, images: Tensor) -> Tensor:
        """Return images of the pair's kind, (batch, bands, side, side), as normalised float32."""
        self._move_normalisation(images.device)
        if self.kind.is_float:
            return (images * self.scale).sub_(self.shift)
        # In place: new memory would cost a CPU as much as the arithmetic.
        return to_float(images).mul_(self.scale).sub_(self.shift)

    def _move_normalisation(self, device: torch.device) -> None:
        if self.scale.device != device:
            self.scale = self.scale.to(device)
            self.shift = self.shift.to(device)


def local_view(
    operations: Operations,
    views: Sequence[View],
    image_size: int,
    local: LocalCrops,
    kind: ImageKind,
) -> View:
    """Return the view of the local crops: that of the query with another crop.

    Args:
        operations: of the query view.
        views: the query view and the key view of the same size.
        image_size: their side, px.
        local: which crops.
        kind: the images of the run.

    Raises:
        InputError: a view is a pipeline, or a step before the crop may move pixels.
    """
    for view in views:
        if view.pipeline is not None:
            raise InputError(
                f"method.local_crops={local.count}: {view.pipeline.where} makes one view of one "
                "size; expected operations, such as augmentation=moco_v2"
            )
        check_crop_comes_first(view.steps, view.crop)
    side = local.side(image_size)
    view = View(operations, side, "augmentation.query", *kind)
    try:
        crop = LocalCrop(side, local.scale)
    except ValueError as error:
        raise InputError(f"augmentation.local.{error}") from error
    view.steps[view.crop] = Step("random_resized_crop", crop, 1.0, "augmentation.local")
    return view


def check_any_size(view: View, ramp: ResolutionRamp) -> None:
    """Raise InputError if a view is a pipeline of one size only, and the views grow."""
    pipeline = view.pipeline
    if pipeline is not None and not pipeline.any_size:
        raise InputError(
            f"augmentation.start_image_size={ramp.start_image_size}: the views grow, and the "
            f"function of {pipeline.where} has no argument image_size"
        )


def checked_image(image: Any, kind: ImageKind) -> np.ndarray:
    """Return an image as (height, width, bands) of a kind.

    Raises:
        InputError: it is no such image: neither a Pillow image nor uint8 (height, width, 3), or
            not float32 (height, width, bands) in 0..1.
    """
    if isinstance(image, Image.Image) and not kind.is_float:
        return np.asarray(to_rgb(image))
    pixels = np.asarray(image)
    is_expected = pixels.dtype == kind.array_dtype and pixels.ndim == 3
    if not is_expected or pixels.shape[2] != kind.bands:
        expected = "a PIL image or a uint8 array (height, width, 3)"
        if kind.is_float:
            expected = f"a float32 array (height, width, {kind.bands}) in 0..1"
        got = f"{type(image).__name__} of {pixels.dtype} {pixels.shape}"
        raise InputError(f"expected {expected}, got {got}")
    if kind.is_float:
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # NaN is outside, too
            raise InputError(f"expected values in 0..1, got {low:.4g} to {high:.4g}")
    return np.ascontiguousarray(pixels)


def row_of(numbers: Sequence[Numbers], row: int | slice) -> list[dict[str, Any]]:
    """Return the numbers of one image, or of some, for each step."""
    own = []
    for drawn in numbers:
        own.append({name: values[row] for name, values in drawn.items()})
    return own


def as_arrays(drawn: Drawn) -> dict[str, np.ndarray]:
    """Return drawn numbers as numpy arrays, whose single elements are much faster to read."""
    return {name: values.numpy() for name, values in drawn.items()}


def to_float(images: Tensor) -> Tensor:
    """Return a float32 copy, contiguous plane by plane."""
    return images.to(torch.float32, memory_format=torch.contiguous_format)


def sizes_of(images: Tensor, indices: Tensor) -> Tensor:
    """Return height and width for each of `indices`, (batch, 2), filled in on their device."""
    height, width = images.shape[2:]
    heights = torch.full_like(indices, height)
    widths = torch.full_like(indices, width)
    return torch.stack([heights, widths], 1)


def normalisation(
    mean: Sequence[float], std: Sequence[float], bands: int = 3, is_float: bool = False
) -> tuple[Tensor, Tensor]:
    """Return scale and shift, (bands, 1, 1) each; a pixel becomes pixel * scale - shift.

    Args:
        mean, std: of pixels in 0..1; one number for all bands, or one for each.
        bands: of the images.
        is_float: pixels are in 0..1; otherwise they are in 0..255.

    Raises:
        InputError: there are other than one or `bands` numbers, or a std is not above 0.
    """
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, bands):
            raise InputError(
                f"augmentation.{name} has {len(values)} numbers, the images have {bands} "
                f"band{'s'[: bands > 1]}; python -m moco.stats data=... prints them"
            )
    if min(std) <= 0:
        raise InputError(f"augmentation.std={[*std]}: expected numbers above 0")
    std_tensor = torch.tensor(for_each_band(std, bands)).view(bands, 1, 1)
    mean_tensor = torch.tensor(for_each_band(mean, bands)).view(bands, 1, 1)
    scale = 1 / (kind_of_images(bands, is_float).largest * std_tensor)
    return scale, mean_tensor / std_tensor


def for_each_band(numbers: Sequence[float], bands: int) -> list[float]:
    """Return a number for each band, of one for all bands or of one for each."""
    return [*numbers] * (bands // len(numbers))


class Normalized:
    """From an image to (bands, height, width) float32: (pixels in 0..1 - mean) / std.

    The image is a Pillow image (RGB) or uint8 (height, width, 3); with `is_float`, float32
    (height, width, bands) in 0..1.

    Args:
        mean, std, bands, is_float: see `normalisation`.

    Raises:
        InputError: as in `normalisation`.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], bands: int = 3, is_float: bool = False
    ) -> None:
        self.scale, self.shift = normalisation(mean, std, bands, is_float)

    def __call__(self, image: AnyImage) -> Tensor:
        return as_planes(image) * self.scale - self.shift


class EvaluationView:
    """From an image to (bands, image_size, image_size) float32, without randomness.

    The shorter side is resized to image_size / crop_ratio, and the middle is cut out.

    Args:
        image_size: side of the result, px.
        crop_ratio: the part of the shorter side that stays.
        mean, std, bands, is_float: see `normalisation`. The images are those of `Normalized`.

    Raises:
        InputError: as in `normalisation`.
    """

    def __init__(
        self,
        image_size: int,
        crop_ratio: float,
        mean: Sequence[float],
        std: Sequence[float],
        bands: int = 3,
        is_float: bool = False,
    ) -> None:
        self.crop = evaluation_crop(image_size, crop_ratio)
        self.normalized = Normalized(mean, std, bands, is_float)
        self.unchanged_size: int | None = None
        if round(image_size / crop_ratio) == image_size:
            self.unchanged_size = image_size
        """Side of the square images whose pixels the view only normalises, px."""

    def __call__(self, image: AnyImage) -> Tensor:
        return self.normalized(self.crop(image))


def as_planes(image: AnyImage) -> Tensor:
    """Return an image as (bands, height, width): uint8 of a Pillow image, or as the array is."""
    if isinstance(image, Image.Image):
        return v2.functional.pil_to_tensor(image)
    return planes_of(image)


def evaluation_crop(image_size: int, crop_ratio: float) -> Callable[[AnyImage], Any]:
    """Return the evaluation view without its normalisation.

    It takes a Pillow image or an array (height, width, bands). From 8-bit RGB it makes a Pillow
    image, by Pillow. From float32 it makes an array, by torch: bilinear, antialiased.
    """
    resize = v2.Resize(round(image_size / crop_ratio))
    cut = v2.Compose([middle_of_stripe, resize, v2.CenterCrop(image_size)])
    return partial(cut_out, cut)  # loader processes get a copy, and a local function has none


def cut_out(cut: Callable[[Any], Any], image: AnyImage) -> Any:
    """Apply an operation of torchvision, see `evaluation_crop`."""
    if isinstance(image, Image.Image):
        return cut(image)
    if image.dtype == np.uint8:
        return cut(Image.fromarray(image))
    return cut(planes_of(image)).permute(1, 2, 0).contiguous().numpy()


def middle_of_stripe(image: Any) -> Any:
    """Cut the middle out of an image whose sides differ by more than a factor of 32.

    Resizing the shorter side of a line of 1 x 1,000,000 px to 224 px would take 150 GB.

    Args:
        image: a Pillow image, or a tensor (bands, height, width).
    """
    height, width = v2.functional.get_size(image)
    longest = LONGEST_STRIPE * min(height, width)
    if max(height, width) <= longest:
        return image
    return v2.functional.center_crop(image, [min(height, longest), min(width, longest)])
