"""What ``moco.predict`` is given: the images, the folder for their masks, and the devices."""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig

from moco.cli.closing_tables import rows_of_segmentation
from moco.cli.default_outputs import predictions_folder
from moco.cli.measured_segmenter import build_measured_source, pixel_settings_of
from moco.cli.start_panel import measured_sizes
from moco.config.predict import PredictConfig
from moco.config.pretrained import is_given
from moco.data.loading.every_image import ImageSet, image_set
from moco.data.loading.workers import cores_of
from moco.data.sources.pixel_values import PixelValues
from moco.data.sources.registry import MASKED
from moco.data.sources.source import ArrayImages, FileImages, Images
from moco.data.sources.tiles import TileImages
from moco.errors import InputError, printable
from moco.evaluation.embedding import FREE_SETTINGS, USUAL_WORKERS, weights_digest
from moco.evaluation.mask_figures import confusion_of_files
from moco.evaluation.subject import build_source_of
from moco.models.swin.window_change import clipped_in_words
from moco.runs.run_folder import as_override
from moco.runs.shell_quotes import shell_quoted
from moco.segmentation.image_parts import RasterImages
from moco.segmentation.mask_files import LEGEND, TIFF_SCALE, MaskFolder, check_is_ours
from moco.segmentation.mask_names import mask_name
from moco.segmentation.mask_prediction import Outcome
from moco.segmentation.masked_images import MaskedImages
from moco.segmentation.metrics import segmentation_figures
from moco.segmentation.pixel_classifier import Inference
from moco.training.hardware import choose_device
from moco.weights.inflation import check_bands
from moco.weights.load_segmenter import FineTuned, best_beside

log = logging.getLogger(__name__)

OF_IMAGES_ALONE = (
    "target",
    "options",
    "labels",
    "pages",
    "band_files",
    "tile",
    "num_images",
    "image_column",
    "label_column",
    "image_key",
    "label_key",
)
"""Settings that data with masks does not have."""
NOT_COMPARED = (*FREE_SETTINGS, "max_image_pixels")
"""Settings of the data that may differ when the same masks are continued."""


class PredictedImages(NamedTuple):
    """The images that get masks."""

    images: ImageSet
    values: PixelValues
    """How their pixels are made."""
    roots: list[str]
    """Their folders."""
    masked: MaskedImages | None
    """The images with their true masks, if the dataset has masks."""
    ignore_index: int
    """The number of pixels of the true masks without a class."""
    data: dict[str, Any]
    """The settings of the data, as plain data."""

    def num_workers(self) -> int:
        """Return how many loader processes are used."""
        given = self.data["num_workers"]
        if given is not None:
            return int(given)
        return 0 if self.images.is_in_memory else min(USUAL_WORKERS, cores_of(1))


def build_images(config: PredictConfig, tuned: FineTuned) -> PredictedImages:
    """Return the images, with pixels as in the run that made the model.

    Raises:
        InputError: the dataset cannot be used, or its images or classes are not those of the model.
    """
    data = dataclasses.asdict(config.data)
    data |= pixel_settings_of(config.data, tuned.config["data"])
    name, root, mean = data["name"], data["root"], tuned.learned["mean"]
    masked: MaskedImages | None = None
    images: Images
    roots: list[Any] = root if isinstance(root, list) else [root]
    ignore_index = tuned.learned["ignore_index"]
    if name in MASKED:
        for key in OF_IMAGES_ALONE:
            if is_given(config.data, key):
                raise InputError(f"data.{key}: data={name} has no such setting")
        wants_train = config.split == "train"
        with_masks = build_measured_source(tuned, config.data, name, root, wants_train=wants_train)
        with_masks.prepare(data, mean, config.preview.bands)
        masked = with_masks.train if wants_train else with_masks.validation
        images = masked.images
        ignore_index = with_masks.ignore_index
        if name == "segmentation_folder":
            roots = [str(Path(root, "images"))]
    else:
        # Masks have the size of their images, so no image is resized.
        source = build_source_of(data | {"image_size": 0}, mean, config.preview.bands)
        images = source.train
        if config.split == "test":
            if source.queries is None:
                raise InputError(f"split=test: data={name} has no images that are held out")
            images = source.queries.images
        if isinstance(images, TileImages):
            images = RasterImages(images)
    values = images.values
    assert values is not None  # both kinds of sources are prepared
    check_bands(tuned.segmenter.model.backbone, values.bands, f"checkpoint={config.checkpoint}")
    folders = [path for path in roots if isinstance(path, str)]
    return PredictedImages(image_set(images), values, folders, masked, ignore_index, data)


def say_clipped_windows(backbone: Any, how: Inference, found: PredictedImages) -> None:
    """Log that attention windows are larger than the maps of some images, if they are.

    Of images that are predicted whole, the headers of some tell the sizes. Of a stream nothing is
    known before it is read.

    Args:
        backbone: of the model.
        how: how the images are predicted.
        found: the images.
    """
    images = found.images.images
    smallest = None
    if isinstance(images, (FileImages, ArrayImages, RasterImages)):
        smallest = min(map(min, measured_sizes(images)), default=None)
    side = how.window
    what = f"windows of {side} px"
    if smallest is not None and (how.mode == "whole" or smallest < side):
        side = smallest
        what = f"images of {side} px"
    elif how.mode == "whole":
        return
    text = clipped_in_words(backbone, side, what)
    if text:
        log.info("attention window: %s", text)


def settings_of(
    config: PredictConfig, tuned: FineTuned, how: Inference, found: PredictedImages
) -> dict[str, Any]:
    """Return everything that the masks depend on, as plain data."""
    data = {key: value for key, value in found.data.items() if key not in NOT_COMPARED}
    return {
        "weights": weights_digest(tuned.segmenter),
        "inference": dataclasses.asdict(how),
        "backbone.window_size": config.backbone.window_size,
        "accelerator": choose_device(config.accelerator).type,
        "split": config.split,
        "data": data,
        "values": found.values.described(),
    }


def output_of(config: PredictConfig, settings: dict[str, Any], folder: Path) -> Path:
    """Return the folder for the masks.

    Args:
        settings: from `settings_of`.
        folder: the run folder of ``moco.predict``.
    """
    if config.output is not None:
        return Path(config.output)
    return predictions_folder(config.checkpoint, settings, folder)


def chosen_devices(accelerator: str, devices: int | None) -> list[torch.device]:
    """Return the devices that share the work.

    Args:
        accelerator: the setting.
        devices: how many; None: all GPUs that can be used, or the CPU.

    Raises:
        InputError: there are fewer.
    """
    device = choose_device(accelerator)
    if device.type == "cpu":
        return [device] * (devices or 1)
    there = torch.cuda.device_count()
    if devices is not None and devices > there:
        raise InputError(f"devices={devices}: GPUs that can be used on this machine: {there}")
    return [torch.device("cuda", number) for number in range(devices or there)]


def check_masks_folder(output: Path) -> None:
    """Raise InputError if no masks can be written to `output`. Nothing is created."""
    check_is_ours(output)
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"output={printable(str(output))}: cannot write to {existing}")


def figures_of(
    found: PredictedImages, masks: MaskFolder, outcome: Outcome, how: Inference, seconds: float
) -> dict[str, Any]:
    """Return what was done under the names of ``metrics.json``, with figures if there are masks.

    Args:
        found: the images.
        masks: the folder of the predicted masks.
        outcome: what became of the images.
        how: how they were predicted.
        seconds: that the masks took which were written now.
    """
    figures: dict[str, Any] = {
        "predict/num_images": outcome.written + outcome.kept,
        "predict/num_written_now": outcome.written,
        "predict/num_unreadable": len(outcome.unreadable),
        "predict/images_per_second": outcome.written / max(seconds, 1e-9),
    }
    if found.masked is not None:
        confusion, num_measured = confusion_of_files(
            found.masked,
            lambda name: masks.mask(mask_name(name, found.roots)),
            len(masks.class_names),
            found.ignore_index,
        )
        figures |= segmentation_figures(confusion, masks.class_names)
        figures["segment/num_images"] = num_measured
    figures["segment/inference"] = how.mode
    figures["segment/image_size"] = how.window
    figures["segment/tta"] = how.is_averaged
    return figures


def prediction_rows(
    figures: Mapping[str, Any], how: Inference, class_names: Sequence[str], masks: MaskFolder
) -> list[tuple[str, str]]:
    """Return the rows of the closing table.

    Args:
        figures: from `figures_of`, with the checkpoint and its epoch.
        how: how the images were predicted.
        class_names: of the model.
        masks: the folder of the predicted masks.
    """
    num_images, num_now = figures["predict/num_images"], figures["predict/num_written_now"]
    images = f"{num_images:,}"
    if num_now < num_images:
        images += f", {num_images - num_now:,} of them were there"
    rows = [("checkpoint", f"{figures['checkpoint']}, epoch {figures['epoch']}")]
    best = best_beside(figures["checkpoint"])
    if best is not None:
        rows.append(("best checkpoint", f"not taken: {best}"))
    rows.append(("images", images))
    num_unreadable = figures["predict/num_unreadable"]
    if num_unreadable:
        rows.append(("unreadable images, left out", f"{num_unreadable:,}"))
    if num_now:
        rows.append(("images per second", f"{figures['predict/images_per_second']:.3g}"))
    windows = f"windows of {how.window} px"
    mode = f"{how.mode}, {windows}"
    if how.mode == "whole":
        mode = f"whole; by {windows} above {how.max_forward_pixels:,} px"
    if how.is_averaged:
        mode += f", scales {', '.join(f'{scale:g}' for scale in how.scales)}"
    if how.flip:
        mode += " and mirrored"
    rows.append(("inference", mode))
    rows.append(("classes", f"{len(class_names)}, numbers and colours in {LEGEND}"))
    if masks.kind == "tiff":
        rows.append(("probabilities", f"tiff: {TIFF_SCALE} is 1"))
    if "segment/miou" in figures:
        rows += rows_of_segmentation(figures, class_names)
    return rows


def next_step(config: PredictConfig, output: Path) -> list[str]:
    """Return what to type next: draw overlays, average over copies, or measure the model.

    Args:
        config: of the program.
        output: the folder of the masks.
    """
    given: list[str] = []
    if HydraConfig.initialized():
        given = list(HydraConfig.get().overrides.task)
    kept = []
    for override in given:
        if override.partition("=")[0] not in ("output", "overlays", "tta", "probabilities"):
            kept.append(shell_quoted(override))
    if not config.overlays:
        kept += [as_override("output", output), "overlays=true"]
    elif not config.tta:
        kept += [as_override("output", f"{output}_tta"), "tta=true"]
    else:
        model = as_override("checkpoint", config.checkpoint)
        return [f"python -m moco.evaluate {model} evaluation=segmentation"]
    return [" ".join(["python -m moco.predict", *kept])]
