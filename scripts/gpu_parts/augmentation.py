"""Measure how many images per second become two views on the device, as `bench_data.py` does."""

from functools import partial

import bench_data
import torch
from benchmarks.turns import Turn, timed
from PIL import Image

from gpu_parts.measuring import Context, in_turns, rows_of_case
from gpu_parts.results import Result
from gpu_parts.rows import BATCH_ENGINE, PILLOW, Batches

PILLOW_IMAGES = 32
"""The official pipeline takes milliseconds for each."""


def measure(case: str, context: Context) -> list[Result]:
    """Measure with images in the device's memory; for Pillow, in the host's memory."""
    batches = context.sizes.batches[case]
    contenders = {
        BATCH_ENGINE: partial(batch_engine, batches, context),
        PILLOW: partial(pillow, batches),
    }
    return in_turns(context, rows_of_case("data", case, context), contenders, (PILLOW,))


def noise(batches: Batches, num_images: int) -> torch.Tensor:
    """Return random images (images, size, size, 3) uint8."""
    size = batches.stored_size
    generator = torch.Generator().manual_seed(0)
    shape = (num_images, size, size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def batch_engine(batches: Batches, context: Context) -> Turn:
    """Return a turn that augments all images once, batch after batch."""
    pair = bench_data.settings(batches.augmentation)
    augment = bench_data.view_pair(pair, batches.view_size, "batch")
    pixels = noise(batches, batches.num_images).to(context.device)  # (M, H, W, 3)
    parts = torch.arange(len(pixels), device=context.device).split(batches.batch_size)

    def all_batches() -> int:
        for indices in parts:
            chosen = pixels.index_select(0, indices).permute(0, 3, 1, 2).contiguous()
            augment.on_batch(chosen, 0, indices)
        return len(pixels)

    return timed(all_batches, context.device)


def pillow(batches: Batches) -> Turn:
    """Return a turn of torchvision's operations on Pillow images, one by one, on one core."""
    pair = bench_data.settings(batches.augmentation)
    view = bench_data.official(pair, batches.view_size, blur=batches.augmentation == "moco_v2")
    arrays = noise(batches, min(PILLOW_IMAGES, batches.num_images)).numpy()
    images = [Image.fromarray(array) for array in arrays]

    def all_images() -> int:
        for image in images:
            view(image), view(image)
        return len(images)

    return timed(all_images)
