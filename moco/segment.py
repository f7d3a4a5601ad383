"""Semantic segmentation: ``python -m moco.segment checkpoint=PATH data.root=PATH image_size=565``."""

import dataclasses
import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moco.cli.checks import check_deterministic_segmentation, check_run
from moco.cli.launch import launch, save_hydra_files
from moco.config.pretrained import given_settings, with_usual_settings
from moco.config.segment import SegmentConfig
from moco.config.train import AugmentationConfig
from moco.errors import InputError

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from moco.segmentation.segmentation_data import SegmentationData
    from moco.segmentation.segmenter import Segmenter
    from moco.weights.pretrained import Pretrained

log = logging.getLogger("moco.segment")  # __name__ is __main__ under python -m

DEFAULTS = dataclasses.asdict(SegmentConfig())
SWIN_LAYER_DECAY = 0.9  # with which SimMIM (arXiv 2111.09886) fine-tunes Swin
LONGEST_TABLE = 40  # classes in the closing table


class Start(NamedTuple):
    """What training starts from."""

    backbone: Any
    """The backbone with its weights, in the windows that were asked for."""
    settings: dict[str, Any]
    """The arguments of `build_backbone` that make such a backbone."""
    image_size: int
    """Side of the crops, px."""
    mean: list[float]
    std: list[float]


def run(config: SegmentConfig, folder: Path) -> None:
    """Train as configured, in `folder`.

    Raises:
        InputError: something in the config does not fit the checkpoint, the data or the folder.
        RunError: training failed.
        Interrupted: a signal ended it, checkpoint saved.
    """
    check_run(config.resume, config.trainer)
    if config.trainer.devices * config.trainer.num_nodes > 1:
        raise InputError(
            f"trainer.devices={config.trainer.devices}: moco.segment trains on one device"
        )
    if config.trainer.compile:
        raise InputError(
            "trainer.compile=true: moco.segment does not compile its model; expected false"
        )
    if config.trainer.cuda_graphs:
        raise InputError(
            "trainer.cuda_graphs=true: moco.segment does not compile its model; expected false"
        )

    import pytorch_lightning as pl
    from rich.console import Console

    from moco.runs.faults import failures_named
    from moco.runs.interrupts import StopRequest
    from moco.runs.run_folder import claimed, find_checkpoint, is_finished, write_json
    from moco.runs.slurm import stop_signals

    pl.seed_everything(config.seed, verbose=False)
    start = starting_point(config)
    config.image_size = start.image_size
    check_image_size(start)
    decoder = decoder_settings(config)
    check_deterministic_segmentation(
        config.trainer, start.backbone, decoder["name"], start.image_size, config.freeze_backbone
    )
    data = build_data(config, start)
    segmenter = build_segmenter(config, start, decoder, data)
    plain = dataclasses.asdict(config)
    if is_finished(folder, plain, DEFAULTS):
        log.info("%s is finished; a larger trainer.max_epochs goes on", folder)
        return
    checkpoint = find_checkpoint(folder, plain, config.resume, DEFAULTS)
    if checkpoint:
        check_resumable(checkpoint, segmenter)
        log.info("going on from %s", checkpoint)

    figures: dict[str, Any] = origin(config, start)
    console = Console()
    with StopRequest(stop_signals(config.slurm.signal)) as stop:
        trainer = build_trainer(config, folder, plain, figures, console, stop)
        with failures_named(folder), claimed(folder, plain):
            save_hydra_files(folder)
            with failures_named(
                folder
            ):  # once more, since the folder's status is to hold the same line
                trainer.fit(
                    segmenter,
                    datamodule=data,
                    ckpt_path=str(checkpoint) if checkpoint else None,
                    weights_only=True,
                )
            write_json(folder / "metrics.json", figures)
    close(console, folder, figures, data)


def starting_point(config: SegmentConfig) -> Start:
    """The backbone of the checkpoint, or an untrained one, with what the data have to know of it.

    Raises:
        InputError: the backbone or the image size is missing and no checkpoint says it; or the checkpoint cannot be used, or
            has another backbone than was asked for.
    """
    from moco.models.backbones import build_backbone
    from moco.weights.pretrained import load_pretrained

    given = given_settings(config.backbone)
    default = AugmentationConfig()
    mean, std = config.augmentation.mean, config.augmentation.std
    if config.checkpoint is None:
        if "name" not in given:
            raise InputError("backbone: missing; without a checkpoint give backbone=NAME")
        if config.image_size is None:
            raise InputError("image_size: missing; without a checkpoint give image_size=PIXELS")
        if config.freeze_backbone:
            log.warning(
                "freeze_backbone=true and checkpoint=null: the backbone stays at its random weights"
            )
        return Start(
            build_backbone(**given),
            given,
            config.image_size,
            mean or default.mean,
            std or default.std,
        )
    pretrained = load_pretrained(config.checkpoint, config.encoder, given)
    of_run = with_usual_settings(pretrained.config)
    image_size = config.image_size or of_run["data"]["image_size"]
    if image_size is None:
        raise InputError(
            f"image_size: missing; {config.checkpoint} does not say it, give image_size=PIXELS"
        )
    log_window(pretrained, given, image_size)
    settings = pretrained.settings | {"freeze_patch_embed": given.get("freeze_patch_embed")}
    of_pretraining = of_run["augmentation"]
    return Start(
        pretrained.encoder.backbone,
        {key: value for key, value in settings.items() if value is not None},
        image_size,
        mean or of_pretraining["mean"],
        std or of_pretraining["std"],
    )


def log_window(pretrained: "Pretrained", given: dict[str, Any], image_size: int) -> None:
    """Say which windows are in force, or which would suit the images."""
    from moco.models.swin.backbone import Swin
    from moco.weights.pretrained import log_window_advice

    backbone = pretrained.encoder.backbone
    if isinstance(backbone, Swin) and "window_size" in given:
        log.info(
            "attention windows of %s cells, pretrained with %s",
            backbone.window_size,
            backbone.pretrained_window_size,
        )
    log_window_advice(pretrained, given, image_size)


def check_image_size(start: Start) -> None:
    """Raises InputError if the images are smaller than one cell of the last map."""
    stride = start.backbone.feature_map_strides[-1]
    if start.image_size < stride:
        raise InputError(
            f"image_size={start.image_size}: expected at least {stride}, a cell of the backbone's last map"
        )


def decoder_settings(config: SegmentConfig) -> dict[str, Any]:
    """The arguments of `build_decoder` that are known without the data.

    Raises:
        InputError: the decoder needs a package that is not installed.
    """
    from moco.segmentation.decoders import PYRAMID_DECODERS, pyramid_decoders

    name = config.decoder.name
    if name == "auto":
        name = "linear" if config.freeze_backbone else "upernet"
    if name in PYRAMID_DECODERS:
        pyramid_decoders(name)
    return {"name": name, "channels": config.decoder.channels}


def build_data(config: SegmentConfig, start: Start) -> "SegmentationData":
    """The loaders of the config's data set and augmentation, every file of it checked."""
    from moco.segmentation.mask_augmentation import SegmentationView
    from moco.segmentation.mask_sources import build_segmentation_source
    from moco.segmentation.segmentation_data import SegmentationData

    data, augmentation = config.data, config.augmentation
    view = SegmentationView(
        start.image_size,
        scale=augmentation.scale,
        horizontal_flip=augmentation.horizontal_flip,
        color_jitter=augmentation.color_jitter,
        mean=start.mean,
        std=start.std,
        ignore_index=data.ignore_index,
        seed=config.seed,
    )
    source = build_segmentation_source(
        data.name,
        data.root,
        download=data.download,
        num_classes=data.num_classes,
        class_names=data.class_names,
        ignore_index=data.ignore_index,
        max_image_pixels=data.max_image_pixels,
    )
    return SegmentationData(
        source,
        view,
        image_size=start.image_size,
        batch_size=data.batch_size,
        batches_per_step=config.trainer.devices * config.trainer.accumulate_grad_batches,
        evaluation_batch_size=config.evaluation.batch_size,
        num_workers=data.num_workers,
        seed=config.seed,
    )


def build_segmenter(
    config: SegmentConfig, start: Start, decoder: dict[str, Any], data: "SegmentationData"
) -> "Segmenter":
    """The model with the backbone's weights; the decoder's are the same with every backbone of an architecture and seed."""
    import torch

    from moco.models.swin.backbone import Swin
    from moco.segmentation.segmenter import Segmenter

    optimizer = dataclasses.asdict(config.optimizer)
    if optimizer["layer_decay"] is None:
        is_pretrained_swin = isinstance(start.backbone, Swin) and config.checkpoint is not None
        optimizer["layer_decay"] = SWIN_LAYER_DECAY if is_pretrained_swin else 1.0
    torch.manual_seed(config.seed)
    segmenter = Segmenter(
        backbone=start.settings,
        decoder=decoder,
        optimizer=optimizer,
        num_classes=len(data.source.class_names),
        ignore_index=config.data.ignore_index,
        freeze_backbone=config.freeze_backbone,
        image_size=start.image_size,
        class_names=list(data.source.class_names),
        mean=start.mean,
        std=start.std,
    )
    segmenter.model.backbone.load_state_dict(start.backbone.state_dict())
    log.info(
        "decoder: %s; %d classes; layer decay %g",
        decoder["name"],
        segmenter.num_classes,
        optimizer["layer_decay"],
    )
    return segmenter


def check_resumable(path: Path, segmenter: "Segmenter") -> None:
    """Raises InputError if the checkpoint holds other tensors than this run has; it names the settings."""
    from moco.runs.checkpoint_files import read_checkpoint
    from moco.runs.run_folder import differences

    there, here = (
        {key: hparams.get(key) for key in ("backbone", "decoder", "num_classes", "freeze_backbone")}
        | {"optimizer": {"layer_decay": hparams["optimizer"].get("layer_decay")}}
        for hparams in (read_checkpoint(path)["hyper_parameters"], segmenter.hparams)
    )
    if differing := differences(there, here):
        raise InputError(
            f"resume={path}: the checkpoint is of another model or optimizer: {'; '.join(differing)}"
        )


def origin(config: SegmentConfig, start: Start) -> dict[str, Any]:
    """Where the backbone is from, under the names of ``metrics.json``."""
    figures = {
        "segment/checkpoint": config.checkpoint,
        "segment/encoder": config.encoder if config.checkpoint else None,
        "segment/backbone": start.settings["name"],
        "segment/freeze_backbone": config.freeze_backbone,
    }
    windows = getattr(start.backbone, "window_size", None)
    return figures | ({"segment/window_size": list(windows)} if windows else {})


def build_trainer(
    config: SegmentConfig,
    folder: Path,
    plain: dict[str, Any],
    figures: dict[str, Any],
    console: Any,
    stop: Any,
) -> "pl.Trainer":
    """Lightning's Trainer with the callbacks of segmentation; `figures` is what they report into."""
    from moco.callbacks.checkpoints import Checkpoints
    from moco.callbacks.monitors import LossMonitor
    from moco.callbacks.segmentation_monitor import SegmentationMonitor
    from moco.cli.progress import ProgressBar
    from moco.runs.faults import BadSteps
    from moco.runs.run_folder import last_good
    from moco.training import trainer
    from moco.training.logger import RunDescription

    callbacks = [
        LossMonitor(figures, config.trainer.log_every_n_steps),
        BadSteps(
            figures,
            config.trainer.max_bad_steps,
            config.trainer.log_every_n_steps,
            partial(last_good, folder),
        ),
        SegmentationMonitor(
            figures,
            inference=config.inference,
            every_n_epochs=config.evaluation.every_n_epochs,
            num_plotted_images=config.evaluation.num_plotted_images,
            should_stop=lambda: bool(stop),
        ),
        RunDescription(folder, plain, ["segment/miou", "epoch/loss"]),
        ProgressBar(figures, console, ("segment/miou", "mIoU")),
        Checkpoints(
            folder, plain, figures, stop, config.checkpoint_every_n_epochs, monitor="segment/miou"
        ),
    ]
    return trainer.build_trainer(dataclasses.asdict(config.trainer), folder, callbacks)


def close(console: Any, folder: Path, figures: dict[str, Any], data: "SegmentationData") -> None:
    """The closing table: what was reached, and where it is."""
    from moco.cli.progress import print_table
    from moco.runs.run_folder import LAST_CHECKPOINT

    rows = [("epochs, steps", f"{figures.get('epoch', 0)}, {figures.get('step', 0)}")]
    if "train/loss" in figures:
        rows.append(("loss of the last epoch", f"{figures['train/loss']:.4f}"))
        rows.append(("images per second", f"{figures['images_per_second']:,.1f}"))
    if "segment/miou" in figures:
        how = f"{figures['segment/num_images']:,} images, inference={figures['segment/inference']}"
        rows.append(("measured on", how))
        rows.append(("mIoU", f"{figures['segment/miou']:.4f}"))
        rows.append(("pixel accuracy", f"{figures['segment/pixel_accuracy']:.4f}"))
        names = data.source.class_names if len(data.source.class_names) <= LONGEST_TABLE else ()
        for name in names:
            iou = figures[f"segment/iou/{name}"]
            rows.append(
                (f"IoU, {name}", "neither there nor predicted" if iou is None else f"{iou:.4f}")
            )
    rows.append(("checkpoint", os.path.relpath(folder / LAST_CHECKPOINT)))
    print_table(console, "Segmentation is done", rows)
    console.print(
        f"next: tensorboard --logdir {os.path.relpath(folder)}", soft_wrap=True, highlight=False
    )


def main() -> None:
    """Entry point of ``moco-segment``."""
    launch(run, SegmentConfig, "segment")


if __name__ == "__main__":
    main()
