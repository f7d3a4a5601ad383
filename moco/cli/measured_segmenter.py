"""``moco.evaluate evaluation=segmentation``: a fine-tuned segmenter, measured without training."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moco.config.pretrained import EvaluateConfig
from moco.data.sources.source import PIXEL_SETTINGS
from moco.errors import InputError
from moco.evaluation.segmenter_measurement import check_same_classes, measure_segmenter
from moco.evaluation.subject import Findings
from moco.segmentation.mask_sources import (
    SegmentationSource,
    build_segmentation_source,
    read_class_names,
)
from moco.training.hardware import choose_device
from moco.weights.load_segmenter import FineTuned, load_fine_tuned


def measure(config: EvaluateConfig) -> tuple[Findings, dict[str, Any]]:
    """Return the findings, and what was measured under the names of ``metrics.json``.

    What the config leaves open is as in the run: the dataset, the inference and the image size.

    Raises:
        InputError: the checkpoint is none of moco.segment, or the dataset cannot be used.
    """
    path = config.checkpoint
    if path is None:
        raise InputError(
            "checkpoint=null: evaluation=segmentation measures a model of moco.segment"
        )
    device = choose_device(config.accelerator)
    tuned = load_fine_tuned(
        path,
        window_size=config.backbone.window_size,
        target=config.backbone.target,
        trust_targets=config.trust_targets,
        purpose="evaluation=segmentation measures",
        advice="evaluation=dense segments by its features",
    )
    data, run_data = config.data, tuned.config["data"]
    name = data.name or run_data["name"]
    root = run_data["root"] if data.root is None else data.root
    part = config.evaluation.part
    source = build_measured_source(tuned, data, name, root, part=part)
    pixel_settings = {"name": name, "root": root, **pixel_settings_of(data, run_data)}
    source.prepare(pixel_settings, tuned.learned["mean"], config.preview.bands)
    image_size = data.image_size or tuned.learned["image_size"]
    findings = measure_segmenter(
        tuned.segmenter,
        source,
        device,
        inference=config.evaluation.inference or tuned.config["inference"],
        image_size=image_size,
        batch_size=config.evaluation.batch_size,
        num_workers=data.num_workers,
        root=root,
        plots=config.evaluation.plots,
    )
    origin = {
        "data": name,
        "root": str(root),
        "checkpoint": str(path),
        "epoch": tuned.epoch,
        "step": tuned.step,
    }
    if part is not None:
        origin["part"] = part
    return findings, origin


def build_measured_source(
    tuned: FineTuned,
    data: Any,
    name: str,
    root: Any,
    *,
    wants_train: bool = False,
    part: str | None = None,
) -> SegmentationSource:
    """Return a dataset with masks of the classes that a model has learned.

    Of the run's own dataset the held-out images are measured. Of another one these are all images,
    if it has no folder of held-out ones.

    Args:
        tuned: the model.
        data: the settings ``download``, ``ignore_index`` and ``max_image_pixels``. Of the run's own
            dataset the number of pixels without a class is as in the run.
        name: of the dataset.
        root: its folder.
        wants_train: the training images are wanted, too.
        part: the folder below ``images`` that is held out; None: the usual one.

    Raises:
        InputError: the dataset cannot be used, or it names other classes.
    """
    learned, run_data = tuned.learned, tuned.config["data"]
    is_own = name == run_data["name"] and real_path(root) == real_path(run_data["root"])
    ignore_index = learned["ignore_index"] if is_own else data.ignore_index
    class_names = learned["class_names"]
    if not is_own and isinstance(root, str) and name == "segmentation_folder":
        names_file = Path(root, "classes.txt")
        own_names = read_class_names(names_file)
        is_named = class_names != [str(number) for number in range(len(class_names))]
        if is_named:
            check_same_classes(class_names, own_names, str(names_file))
    return build_segmentation_source(
        name,
        root,
        download=data.download,
        class_names=class_names,
        ignore_index=ignore_index,
        max_image_pixels=data.max_image_pixels,
        # Of a dataset that the model has not seen, all images can be measured.
        is_trained_on=is_own or wants_train,
        part=part,
    )


def pixel_settings_of(data: Any, run_data: Mapping[str, Any]) -> dict[str, Any]:
    """Return how files become pixels, with what is not given as in the run.

    Args:
        data: a config of the data.
        run_data: the settings of the run's data.
    """
    settings = {}
    for key in PIXEL_SETTINGS:
        given = getattr(data, key)
        settings[key] = run_data.get(key) if given is None else given
    return settings


def real_path(root: Any) -> str:
    """Return the path that stands for a dataset's folder, however it is written."""
    return os.path.realpath(str(root))
