"""Compare both augmentation engines with the official operations, step by step.

    python scripts/compare_augmentations.py [--pair moco_v2] [--image-size 224] [--images 64]

All get the same random numbers. The official operations are torchvision's functional operations and
Pillow's blur on Pillow images. Each step gets the official result of the step before. The last row
is the whole chain. The figures are differences in grey levels of 256: the mean, the 99th percentile
and the largest over all pixels and channels.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageFilter
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as official

from moco.config.parsing import CONFIG_DIR
from moco.data.augment.operations import ColorJitter, RandomResizedCrop, Solarize, Step
from moco.data.augment.views import View, row_of

COLOR_STEPS = (
    official.adjust_brightness,
    official.adjust_contrast,
    official.adjust_saturation,
    official.adjust_hue,
)


def official_step(step: Step, image: Image.Image, drawn: Mapping[str, Any]) -> Image.Image:
    """Apply a step of a view to an image by torchvision and Pillow.

    Args:
        drawn: the random numbers of the image.
    """
    operation = step.operation
    if isinstance(operation, RandomResizedCrop):
        top, left, height, width = (int(side) for side in drawn["box"])
        size = [operation.image_size, operation.image_size]
        return official.resized_crop(image, top, left, height, width, size)
    if isinstance(operation, ColorJitter):
        for number in drawn["order"].tolist():
            if getattr(operation, operation.STEPS[number]):
                image = COLOR_STEPS[number](image, float(drawn["factors"][number]))
        return image
    if isinstance(operation, Solarize):
        return official.solarize(image, operation.threshold)
    if step.name == "gaussian_blur":
        return image.filter(ImageFilter.GaussianBlur(float(drawn["sigma"])))
    if step.name == "random_affine":
        shift, shear = drawn["shift"].tolist(), [float(drawn["shear"]), 0.0]
        bilinear = v2.InterpolationMode.BILINEAR
        return official.affine(
            image, float(drawn["angle"]), shift, 1.0, shear, interpolation=bilinear
        )
    if step.name == "grayscale":
        return official.rgb_to_grayscale(image, num_output_channels=3)
    assert step.name == "horizontal_flip"
    return official.horizontal_flip(image)


def official_view(
    view: View, image: Image.Image, numbers: list[dict[str, torch.Tensor]]
) -> Image.Image:
    """Apply all steps of a view to an image with its random numbers."""
    for step, drawn in zip(view.steps, numbers, strict=True):
        if drawn["applied"]:
            image = official_step(step, image, drawn)
    return image


def photograph(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a random image (height, width, 3) uint8 that resembles a photograph.

    It has structure of every size, strong colours and a little noise.
    """
    image = np.zeros((height, width, 3))
    for cells in (3, 6, 12, 24, 48, 96):
        grid = random.normal(size=(cells, cells, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(grid[..., channel])
            layer = layer.resize((width, height), Image.Resampling.BICUBIC)
            image[..., channel] += np.asarray(layer) * 90 / np.sqrt(cells)
    return np.clip(128 + image + random.normal(size=image.shape) * 3, 0, 255).astype(np.uint8)


def on_batch(
    view: View, step: int, image: np.ndarray, numbers: list[dict[str, torch.Tensor]]
) -> np.ndarray:
    """Return the result of one step of the batch engine on one image, in grey levels."""
    images = torch.from_numpy(image.transpose(2, 0, 1).copy())[None] / 255
    drawn = {name: values[None] for name, values in numbers[step].items()}
    result = view.steps[step].operation.on_batch(images, drawn)[0]
    return (result * 255).permute(1, 2, 0).numpy()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", default="moco_v2")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=64)
    arguments = parser.parse_args()
    pair = yaml.safe_load((CONFIG_DIR / "augmentation" / f"{arguments.pair}.yaml").read_text())
    # The key's view has every operation of an unequal pair.
    side = "query" if pair["key"] == "${.query}" else "key"
    view = View(pair[side], arguments.image_size, side)
    random = np.random.default_rng(0)
    differences: dict[tuple[str, str], list[np.ndarray]] = {}

    def note(step: str, engine: str, theirs: np.ndarray, ours: np.ndarray) -> None:
        difference = np.abs(theirs - ours.astype(np.float64)).ravel()
        differences.setdefault((step, engine), []).append(difference)

    for index in range(arguments.images):
        whole = photograph(random, 375, 500)
        batch = view.draw(0, 0, torch.tensor([index]), 0, torch.tensor([whole.shape[:2]]))
        numbers = row_of(batch, 0)
        image = Image.fromarray(whole)
        worker, tensor = whole, whole.astype(np.float32)
        for place, (step, drawn) in enumerate(zip(view.steps, numbers, strict=True)):
            if not drawn["applied"]:
                continue
            before = np.asarray(image)
            image = official_step(step, image, drawn)
            plain = {name: values.numpy() for name, values in drawn.items()}
            note(step.name, "worker", np.asarray(image), step.operation.on_image(before, plain))
            note(step.name, "batch", np.asarray(image), on_batch(view, place, before, numbers))
            worker = step.operation.on_image(worker, plain)
            tensor = on_batch(view, place, tensor, numbers)
        note("whole chain", "worker", np.asarray(image), worker)
        note("whole chain", "batch", np.asarray(image), tensor)

    print("| step | worker: mean | 99 % | largest | batch: mean | 99 % | largest |")
    print("|---|---|---|---|---|---|---|")
    for name in [*(step.name for step in view.steps), "whole chain"]:
        if (name, "worker") not in differences:
            continue  # no image has drawn this step
        cells = []
        for engine in ("worker", "batch"):
            values = np.concatenate(differences[name, engine])
            cells += [
                f"{values.mean():.2f}",
                f"{np.percentile(values, 99):.1f}",
                f"{values.max():.0f}",
            ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
