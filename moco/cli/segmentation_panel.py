"""What ``moco.segment`` is about to train, on what and where: the panel before the first step."""

from typing import TYPE_CHECKING, Any

from moco.cli.closing_tables import metric_in_words
from moco.cli.resuming import Resumed
from moco.cli.start_panel import (
    Row,
    describe_batch,
    describe_steps,
    print_rows,
    rows_of_folder,
)
from moco.cli.training_run import Run
from moco.config.segment import SegmentConfig

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from moco.segmentation.segmentation_data import SegmentationData
    from moco.segmentation.segmenter import Segmenter

MOST_CLASSES = 8
"""Classes that the panel names."""


def print_segmentation_start(
    run: Run,
    trainer: "pl.Trainer",
    segmenter: "Segmenter",
    data: "SegmentationData",
    resumed: Resumed | None,
) -> None:
    """Print what a segmentation run is about to do: a panel, or plain lines without a terminal.

    Args:
        run: the run.
        trainer: its Trainer.
        segmenter: the model.
        data: the images.
        resumed: the checkpoint that the run goes on from; None: a new run.
    """
    config: SegmentConfig = run.config
    step = None if resumed is None else resumed.step
    rows = [
        ("backbone", describe_backbone(config, segmenter)),
        *rows_of_window(config, segmenter, data),
        ("decoder", describe_decoder(segmenter)),
        ("images", describe_images(data)),
        ("classes", describe_classes(data)),
        ("loss", describe_loss(config)),
        ("crops", describe_crops(config, data)),
        ("steps", describe_steps(config, data.num_crops, step)),
        ("batch", describe_batch(config, trainer)),
        ("precision", str(trainer.precision)),
        ("best.ckpt by", metric_in_words(config.evaluation.metric)),
    ]
    print_rows(run, "Segmentation", rows + rows_of_folder(run))


def describe_backbone(config: SegmentConfig, segmenter: "Segmenter") -> str:
    """Return the backbone's name, parameters, windows and origin."""
    backbone: Any = segmenter.model.backbone
    number = sum(weight.numel() for weight in backbone.parameters())
    name = segmenter.hparams["backbone"]["name"]
    parts = [name, f"{number / 1e6:.1f} million parameters"]
    if hasattr(backbone, "window_size"):
        # Usually one window for all stages.
        sides = dict.fromkeys(backbone.window_size)
        parts.append(f"window {' '.join(map(str, sides))}")
    if config.freeze_backbone:
        parts.append("frozen")
    origin = "random weights"
    if config.checkpoint is not None:
        origin = f"from {config.checkpoint}"
    parts.append(origin)
    return ", ".join(parts)


def rows_of_window(
    config: SegmentConfig, segmenter: "Segmenter", data: "SegmentationData"
) -> list[Row]:
    """Return a row if attention windows are larger than the maps of crops or held-out images."""
    from moco.models.swin.window_change import clipped_in_words

    side = data.view.image_size
    what = f"crops of {side} px"
    smallest = int(data.source.validation.sizes.min())
    if config.inference == "whole" and smallest < side:
        side = smallest
        what = f"held-out images of {side} px"
    text = clipped_in_words(segmenter.model.backbone, side, what)
    return [("window", text)] if text else []


def describe_decoder(segmenter: "Segmenter") -> str:
    """Return the decoder's name and its number of parameters."""
    number = sum(weight.numel() for weight in segmenter.model.decoder.parameters())
    name = segmenter.hparams["decoder"]["name"]
    return f"{name}, {number:,} parameters"


def describe_images(data: "SegmentationData") -> str:
    """Return how many images there are to train and to measure on, and how they were drawn."""
    source = data.source
    number = len(source.train)
    train = f"{number:,} to train on"
    if source.draw is not None:
        num_all = number + source.num_undrawn
        train = f"{number:,} of {num_all:,} to train on ({source.draw.setting()})"
    return f"{train}, {len(source.validation):,} held out"


def describe_classes(data: "SegmentationData") -> str:
    """Return the number of classes and the names of the first ones."""
    from moco.data.sources.source import classes_in_words

    names = classes_in_words(data.source.class_names)
    shown = ", ".join(names[:MOST_CLASSES])
    if len(names) > MOST_CLASSES:
        shown += ", ..."
    return f"{len(names)}: {shown}"


def describe_loss(config: SegmentConfig) -> str:
    """Return the name of the loss and its class weights."""
    weights = config.class_weights
    if weights is None:
        return config.loss
    return f"{config.loss}, class weights {weights}"


def describe_crops(config: SegmentConfig, data: "SegmentationData") -> str:
    """Return the size of the training crops, and how held-out images are predicted."""
    side = data.view.image_size
    held_out = "held-out images whole"
    if config.inference == "slide":
        held_out = f"held-out images in windows of {side} px"
    return f"{side} px; {held_out}"
