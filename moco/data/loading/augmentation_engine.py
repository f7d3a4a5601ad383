"""The choice of the engine that augments the images of a run."""

from typing import NamedTuple

from moco.data.sources.source import ArrayImages, Images

LARGEST_ON_GPU = 4 * 2**30  # bytes; a larger dataset is not moved to the GPU
LARGEST_ON_CPU = 96  # px; larger images are augmented faster one by one, in several processes


class Engine(NamedTuple):
    """What augments the images."""

    name: str
    """worker: loader processes, image by image; batch: the device, batch by batch."""
    in_memory: bool
    """The images are on the device, and there are no loader processes."""
    reason: str
    """For the log."""


def choose_engine(engine: str, images: Images, image_size: int, device_type: str) -> Engine:
    """Choose by rule and never by timing, so that a resumed run chooses the same.

    Args:
        engine: worker, batch, or auto.
        image_size: side of the views, px.
        device_type: cpu, cuda, ...
    """
    is_cpu = device_type == "cpu"
    fits_on_device = False
    largest_side = image_size
    if isinstance(images, ArrayImages):
        fits_on_device = is_cpu or images.tensor.numel() <= LARGEST_ON_GPU
        largest_side = max(image_size, *images.tensor.shape[1:3])
    if engine != "auto":
        in_memory = engine == "batch" and fits_on_device
        return Engine(engine, in_memory, f"as data.engine={engine} says")
    if not is_cpu and fits_on_device:
        return Engine("batch", True, "the images are in memory and fit on the device")
    if not is_cpu:
        reason = "there is a GPU; loader processes decode and crop, it does the rest"
        return Engine("batch", False, reason)
    if not isinstance(images, ArrayImages):
        return Engine("worker", False, "the images are files, and there is no GPU")
    if largest_side <= LARGEST_ON_CPU:
        reason = f"the images are in memory and at most {LARGEST_ON_CPU} px"
        return Engine("batch", True, reason)
    reason = f"on a CPU images above {LARGEST_ON_CPU} px are augmented faster one by one"
    return Engine("worker", False, reason)
