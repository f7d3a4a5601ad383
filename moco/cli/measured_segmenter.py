"""``moco.evaluate evaluation=segmentation``: a fine-tuned segmenter, measured without training."""

import os
from pathlib import Path
from typing import Any

from moco.config.pretrained import EvaluateConfig
from moco.data.sources.source import PIXEL_SETTINGS
from moco.errors import InputError
from moco.evaluation.segmenter_measurement import (
    check_same_classes,
    measure_segmenter,
    rebuilt_segmenter,
)
from moco.evaluation.subject import Findings
from moco.models.swin.window_change import rewindow
from moco.runs.checkpoint_files import read_checkpoint
from moco.segmentation.mask_sources import build_segmentation_source, read_class_names
from moco.targets import check_named
from moco.training.hardware import choose_device


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
    content = read_checkpoint(path)
    learned = content["hyper_parameters"]
    if "decoder" not in learned:
        raise InputError(
            f"checkpoint={path}: evaluation=segmentation measures a model of moco.segment, and "
            "this one has no decoder; evaluation=dense segments by its features"
        )
    backbone = learned["backbone"]
    named, trust = config.backbone.target, config.trust_targets
    try:
        check_named(backbone.get("target"), named, "backbone.target", trust_targets=trust)
        segmenter = rebuilt_segmenter(learned, content["state_dict"])
    except InputError as error:
        raise InputError(f"checkpoint={path}: {error}") from error
    if config.backbone.window_size is not None:
        rewindow(segmenter.model.backbone, config.backbone.window_size)

    of_run = content["config"]
    data, run_data = config.data, of_run["data"]
    name = data.name or run_data["name"]
    root = run_data["root"] if data.root is None else data.root
    is_own = name == run_data["name"] and real_path(root) == real_path(run_data["root"])
    ignore_index = learned["ignore_index"] if is_own else data.ignore_index
    class_names = learned["class_names"]
    if not is_own and isinstance(root, str) and name == "segmentation_folder":
        names_file = Path(root, "classes.txt")
        own_names = read_class_names(names_file)
        is_named = class_names != [str(number) for number in range(len(class_names))]
        if is_named:
            check_same_classes(class_names, own_names, str(names_file))
    source = build_segmentation_source(
        name,
        root,
        download=data.download,
        class_names=class_names,
        ignore_index=ignore_index,
        max_image_pixels=data.max_image_pixels,
        # Of a dataset that the model has not seen, all images can be measured.
        is_trained_on=is_own,
    )
    pixel_settings: dict[str, Any] = {"name": name, "root": root}
    for key in PIXEL_SETTINGS:
        given = getattr(data, key)
        pixel_settings[key] = run_data.get(key) if given is None else given
    source.prepare(pixel_settings, learned["mean"], config.preview.bands)
    image_size = data.image_size or learned["image_size"]
    findings = measure_segmenter(
        segmenter,
        source,
        device,
        inference=config.evaluation.inference or of_run["inference"],
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
        "epoch": content["figures"].get("epoch", 0),
        "step": content["global_step"],
    }
    return findings, origin


def real_path(root: Any) -> str:
    """Return the path that stands for a dataset's folder, however it is written."""
    return os.path.realpath(str(root))
