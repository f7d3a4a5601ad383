"""Masks of new images: ``python -m moco.predict checkpoint=RUN data.root=PATH output=FOLDER``."""

import copy
import dataclasses
import time
from pathlib import Path

from moco.cli.checks import check_masked_data, check_weights
from moco.cli.launch import hydra_files, launch
from moco.config.predict import PredictConfig, check_averaging


def run(config: PredictConfig, folder: Path) -> None:
    """Write a mask of every image, and the figures if the dataset has masks.

    What is written already is skipped, so the same command continues after an interruption.
    `folder` keeps a record of the settings, and the figures.

    Raises:
        InputError: the checkpoint or the data cannot be used, or the folder for the masks holds
            something else.
        RunError: a score is not a number, or the machine ran out of memory or disk.
    """
    check_averaging(config)
    check_weights(config.checkpoint)
    check_masked_data(config.data.name, config.data.root, is_trained_on=False)

    # These imports take seconds. The mistakes above do not wait for them.
    from moco.cli.closing_tables import print_next, print_plain, print_table
    from moco.cli.predicted_images import (
        build_images,
        check_masks_folder,
        chosen_devices,
        figures_of,
        next_step,
        output_of,
        prediction_rows,
        say_clipped_windows,
        settings_of,
    )
    from moco.data.loading.every_image import IndexedSet
    from moco.phases import phase
    from moco.runs.atomic_files import write_json
    from moco.runs.failures import failures_without_training_named
    from moco.runs.interrupts import ending_at_once
    from moco.runs.run_folder import claimed
    from moco.screen import screen
    from moco.segmentation.mask_files import MaskFolder
    from moco.segmentation.mask_names import check_names
    from moco.segmentation.mask_prediction import MaskPass
    from moco.segmentation.pixel_classifier import PixelClassifier
    from moco.weights.load_segmenter import inference_of, load_fine_tuned

    if config.output is not None:
        check_masks_folder(Path(config.output))
    devices = chosen_devices(config.accelerator, config.devices)
    tuned = load_fine_tuned(
        config.checkpoint,
        window_size=config.backbone.window_size,
        target=config.backbone.target,
        trust_targets=config.trust_targets,
        purpose="moco.predict needs",
    )
    how = inference_of(
        tuned,
        inference=config.inference,
        image_size=config.image_size,
        tta_scales=tuple(config.tta_scales) if config.tta else (1.0,),
        tta_flip=config.tta and config.tta_flip,
        blend=config.blend,
        batch_size=config.batch_size,
        max_forward_pixels=config.max_forward_pixels,
    )
    found = build_images(config, tuned)
    images = found.images
    if isinstance(images, IndexedSet):
        check_names(map(images.images.name, range(len(images))), found.roots)
    say_clipped_windows(tuned.segmenter.model.backbone, how, found)
    settings = settings_of(config, tuned, how, found)
    output = output_of(config, settings, folder)
    class_names = tuned.learned["class_names"]
    masks = MaskFolder(output, class_names, config.probabilities, overlays=config.overlays)
    # Every device computes with a copy of its own.
    classifiers = []
    for device in devices:
        segmenter = copy.deepcopy(tuned.segmenter)
        classifiers.append(PixelClassifier(segmenter, found.values, how, device))
    prediction = MaskPass(
        images,
        found.roots,
        masks,
        classifiers,
        config.batch_size,
        found.num_workers(),
        config.data.max_bad_fraction,
    )
    started = time.monotonic()
    kept = f"the masks that are whole are kept in {output}, and the same command goes on there"
    failures_named = failures_without_training_named("batch_size", kept)
    with masks.taken(settings), ending_at_once(), failures_named:
        with phase("predicting", len(images)) as say:
            outcome = prediction.run(say)
        figures = figures_of(found, masks, outcome, how, time.monotonic() - started)
        figures |= {"checkpoint": config.checkpoint, "epoch": tuned.epoch, "step": tuned.step}
        write_json(output / "metrics.json", figures)
    with (
        failures_without_training_named("batch_size"),
        claimed(folder, dataclasses.asdict(config), hydra_files()),
    ):
        write_json(folder / "metrics.json", figures)
    console = screen.console
    print_table(console, "Predicted", prediction_rows(figures, how, class_names, masks))
    print_plain(console, f"written to {output}")
    print_next(console, next_step(config, output))


def main() -> None:
    """Entry point of ``moco-predict``."""
    launch(run, "predict")


if __name__ == "__main__":
    main()
