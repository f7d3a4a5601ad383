"""What ``moco.segment`` trains with, built from its config: backbone, data, model, Trainer."""

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch

from moco.callbacks.segmentation_monitor import SegmentationMonitor
from moco.callbacks.training_monitor import LossMonitor
from moco.cli import training_run
from moco.cli.checks import check_deterministic_segmentation
from moco.cli.closing_tables import metric_in_words
from moco.cli.resuming import Resumed
from moco.cli.segmentation_settings import check_metric, settle_intervals, tell_of_draw
from moco.cli.starting_backbone import StartingBackbone
from moco.cli.starting_decoder import StartingDecoder, find_decoder
from moco.cli.training_run import Run
from moco.config.segment import SegmentConfig
from moco.data.sources.source import PIXEL_SETTINGS
from moco.errors import InputError
from moco.models.contract import check_feature_maps
from moco.models.swin.backbone import Swin
from moco.runs.training_set import TrainingSet, training_set
from moco.segmentation.label_draw import label_draw
from moco.segmentation.mask_augmentation import SegmentationView
from moco.segmentation.mask_sources import build_segmentation_source
from moco.segmentation.segmentation_data import SegmentationData
from moco.segmentation.segmenter import Segmenter
from moco.weights.pretrained_decoder import load_pretrained_decoder
from moco.weights.weight_files import source_in_errors

log = logging.getLogger(__name__)

SWIN_LAYER_DECAY = 0.9  # with which SimMIM (arXiv 2111.09886) fine-tunes Swin


def build_data(config: SegmentConfig, start: StartingBackbone) -> SegmentationData:
    """Return the loaders of the dataset, with every file checked.

    Raises:
        InputError: the dataset cannot be used, or a setting of the data, of the augmentation, of
            the loss or of the best checkpoint is wrong.
    """
    draw = label_draw(config.label_fraction, config.num_images, config.label_seed)
    source_settings = dataclasses.asdict(config.data)
    batch_size = source_settings.pop("batch_size")
    num_workers = source_settings.pop("num_workers")
    # What is not given is as in pretraining.
    pixel_settings: dict[str, Any] = {"name": config.data.name, "root": config.data.root}
    for key in PIXEL_SETTINGS:
        given = source_settings.pop(key)
        pixel_settings[key] = start.pixel_settings.get(key) if given is None else given
    source = build_segmentation_source(**source_settings, draw=draw)
    check_metric(config.evaluation.metric, source.class_names)
    values = source.prepare(pixel_settings, start.mean, config.preview.bands)
    augmentation = dataclasses.asdict(config.augmentation)
    augmentation |= {"mean": start.mean, "std": start.std}
    view = SegmentationView(
        start.image_size,
        **augmentation,
        ignore_index=config.data.ignore_index,
        seed=config.seed,
        bands=values.bands,
        is_float=values.is_float,
    )
    data = SegmentationData(
        source,
        view,
        batch_size=batch_size,
        batches_per_step=config.trainer.accumulate_grad_batches,
        evaluation_batch_size=config.evaluation.batch_size,
        num_workers=num_workers,
        seed=config.seed,
    )
    settle_intervals(data, config)
    tell_of_draw(data, config)
    return data


def check_decoder(config: SegmentConfig, start: StartingBackbone) -> StartingDecoder:
    """Return the decoder that the run starts with.

    Raises:
        InputError: a package is missing, a pretrained decoder cannot be taken over, the images are
            too small, or the decoder cannot be deterministic where it has to be.
    """
    check_feature_maps(start.backbone, "moco.segment")
    decoder = find_decoder(config, start)
    cell = start.backbone.feature_map_strides[-1]
    if start.image_size < cell:
        raise InputError(
            f"image_size={start.image_size}: expected at least {cell}, "
            "a cell of the backbone's last map"
        )
    check_deterministic_segmentation(
        config.trainer, start.backbone, decoder.name, start.image_size, config.freeze_backbone
    )
    return decoder


def build_segmenter(
    config: SegmentConfig,
    start: StartingBackbone,
    decoder: StartingDecoder,
    class_names: Sequence[str],
    class_weights: list[float] | None = None,
) -> Segmenter:
    """Return the model with the weights of the backbone, and of the decoder if it is pretrained.

    New weights of a decoder are the same for every backbone of one architecture and seed.

    Args:
        config: the config of the run.
        start: the backbone.
        decoder: the decoder.
        class_names: of the dataset.
        class_weights: of the loss, see `resolved_class_weights`.

    Raises:
        InputError: the pretrained decoder does not fit the backbone.
    """
    optimizer = dataclasses.asdict(config.optimizer)
    if optimizer["layer_decay"] is None:
        is_pretrained = config.checkpoint is not None
        is_swin = isinstance(start.backbone, Swin)
        optimizer["layer_decay"] = SWIN_LAYER_DECAY if is_pretrained and is_swin else 1.0
    # Building the backbone has drawn random numbers, and how many depends on where it is from.
    torch.manual_seed(config.seed)
    segmenter = Segmenter(
        backbone=start.settings,
        decoder={"name": decoder.name, "channels": decoder.channels},
        optimizer=optimizer,
        num_classes=len(class_names),
        ignore_index=config.data.ignore_index,
        freeze_backbone=config.freeze_backbone,
        image_size=start.image_size,
        class_names=list(class_names),
        mean=start.mean,
        std=start.std,
        loss=config.loss,
        class_weights=class_weights,
    )
    segmenter.model.backbone.load_state_dict(start.backbone.state_dict())
    if decoder.pretrained is not None:
        with source_in_errors(f"checkpoint={config.checkpoint}"):
            load_pretrained_decoder(segmenter.model.decoder, decoder.pretrained)
        log.info(
            "decoder: the pretrained %s of the checkpoint, %d channels wide, with a new head",
            decoder.name,
            decoder.pretrained.channels,
        )
    log.info(
        "decoder: %s; %d classes; layer decay %g",
        decoder.name,
        len(class_names),
        optimizer["layer_decay"],
    )
    return segmenter


def build_trainer(run: Run, resumed: Resumed | None) -> pl.Trainer:
    """Return Lightning's Trainer with the callbacks of a segmentation run.

    Args:
        run: the run.
        resumed: the checkpoint that the run goes on from.
    """
    config: SegmentConfig = run.config
    assert config.evaluation.every_n_epochs is not None  # `build_data` settles both intervals
    monitor = SegmentationMonitor(
        run.figures,
        inference=config.inference,
        every_n_epochs=config.evaluation.every_n_epochs,
        num_plotted_images=config.evaluation.num_plotted_images,
        should_stop=partial(bool, run.stop),
    )
    metric = config.evaluation.metric
    scores = [(f"segment/{metric}", metric_in_words(metric))]
    if metric != "miou":
        scores.append(("segment/miou", "mIoU"))
    return training_run.build_trainer(
        run,
        LossMonitor(run.figures, config.trainer.log_every_n_steps),
        [monitor],
        scores,
        {"every_n_epochs": config.checkpoint_every_n_epochs},
        resumed=resumed,
    )


def backbone_origin(config: SegmentConfig, start: StartingBackbone) -> dict[str, Any]:
    """Return where the backbone is from, under the names of ``metrics.json``."""
    figures = {
        "segment/checkpoint": config.checkpoint,
        "segment/encoder": config.encoder if config.checkpoint is not None else None,
        "segment/backbone": start.settings["name"],
        "segment/freeze_backbone": config.freeze_backbone,
    }
    if hasattr(start.backbone, "window_size"):
        figures["segment/window_size"] = list(start.backbone.window_size)
    return figures


def decoder_origin(decoder: StartingDecoder) -> dict[str, Any]:
    """Return whether the decoder is pretrained, under the name of ``metrics.json``."""
    return {"segment/decoder_from_checkpoint": decoder.pretrained is not None}


def images_origin(config: SegmentConfig, data: SegmentationData) -> dict[str, Any]:
    """Return which images are trained on, and what chooses the best checkpoint of them."""
    train = data.source.train
    figures: dict[str, Any] = {
        "segment/metric": config.evaluation.metric,
        "segment/num_train_images": len(train),
    }
    draw = data.source.draw
    if draw is not None:
        num_all = len(train) + data.source.num_undrawn
        figures["segment/label_fraction"] = len(train) / num_all
        figures["segment/label_seed"] = draw.label_seed
    return figures


def images_of_run(config: SegmentConfig, data: SegmentationData) -> TrainingSet:
    """Return what a checkpoint keeps of the images that the run trains on."""
    train = data.source.train
    images = training_set(train.images.files, len(train), config.data.batch_size, config.data.root)
    # An epoch on few images takes several crops of each.
    return dataclasses.replace(images, steps_per_epoch=data.steps_per_epoch)


def tensor_settings(config: Any, hparams: Any) -> dict[str, Any]:
    """Return the hyperparameters that decide which tensors a checkpoint holds."""
    keys = ("backbone", "decoder", "num_classes", "freeze_backbone")
    settings: dict[str, Any] = {key: hparams.get(key) for key in keys}
    settings["optimizer"] = {"layer_decay": hparams["optimizer"].get("layer_decay")}
    return settings
