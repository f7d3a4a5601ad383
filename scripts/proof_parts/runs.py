"""The runs of the proof: pretraining, fine-tuning, and the figures of every held-out image."""

import csv
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from finished_runs import call, composed
from torch import Tensor

from moco import segment, train
from moco.config.parsing import SCHEMAS
from moco.config.segment import SegmentConfig
from moco.config.train import TrainConfig
from moco.data.augment.views import Normalized
from moco.data.sources.source import PIXEL_SETTINGS
from moco.models.backbones import build_backbone
from moco.models.swin.attention import WindowAttention
from moco.runs.atomic_files import write_atomically
from moco.runs.run_folder import LAST_CHECKPOINT
from moco.segmentation.inference import predicted_classes
from moco.segmentation.mask_batches import whole_image_loader
from moco.segmentation.mask_sources import build_segmentation_source
from moco.segmentation.metrics import confusion_matrix
from moco.segmentation.segmenter import Segmenter
from moco.training.hardware import choose_device
from moco.training.metrics_file import NAME as METRICS_TABLE
from moco.weights.load_encoder import load_pretrained
from proof_parts.grid import (
    LEARNING_RATES,
    PRETRAININGS,
    SCALES,
    TUNINGS,
    Budget,
    Cell,
    Scale,
)
from proof_parts.images import IMAGE_FOLDER, link_held_out, num_training_images, write_tiles

NUM_MEASUREMENTS = 5
"""How often a pretraining measures itself, at most."""
MONITORED_IMAGES = 30
"""Images of each part that ``monitor.dense`` takes."""
DIGITS = 4
"""Decimals of the figures of single images."""


class Settings(NamedTuple):
    """Overrides of a program: what the results say, and where the files of this machine are."""

    told: list[str]
    places: list[str]

    @property
    def overrides(self) -> list[str]:
        return [*self.told, *self.places]


@dataclass(frozen=True)
class Workplace:
    """Where the proof reads and writes, and at which scale."""

    data: Path
    """The folder of the datasets."""
    folder: Path
    """The folder of the runs."""
    scale_name: str
    learning_rates: dict[str, float]
    """What `--search` found, by `rate_key`."""
    pretraining_factor: float = 1.0
    """Multiplies the optimizer steps of every pretraining."""
    tuning_factor: float = 1.0
    """Multiplies the optimizer steps of every fine-tuning."""

    @property
    def scale(self) -> Scale:
        return SCALES[self.scale_name]

    def budget(self, cell: Cell) -> Budget:
        return cell.data_set.budgets[self.scale_name]

    def pretraining_steps(self, cell: Cell) -> int:
        """Return the optimizer steps of a cell's pretraining; whole epochs come near them."""
        return max(1, round(self.budget(cell).pretraining_steps * self.pretraining_factor))

    def tuning_steps(self, cell: Cell) -> int:
        """Return the optimizer steps of a cell's fine-tuning."""
        return max(1, round(self.budget(cell).tuning_steps[cell.tuning] * self.tuning_factor))

    def images(self, cell: Cell) -> Path:
        """Return the archive or folder of the images that a cell pretrains on."""
        sources = cell.data_set.sources
        if sources == (IMAGE_FOLDER,):
            return self.data / IMAGE_FOLDER
        side = self.budget(cell).tile
        return self.folder / "tiles" / f"{'_'.join(sources)}_{side}.npz"

    def pretraining_folder(self, cell: Cell) -> Path:
        name = f"{cell.data_set.name}_{cell.row.pretraining}_{cell.seed}"
        return self.folder / "pretraining" / name

    def tuning_folder(self, cell: Cell) -> Path:
        return self.folder / "tuning" / str(cell).replace("/", "_").replace("-", "_")


def prepare(work: Workplace, cell: Cell) -> None:
    """Write the tiles and the links that a cell needs, once."""
    data_set = cell.data_set
    images = work.images(cell)
    if not images.is_dir():
        write_tiles(work.data, data_set.sources, work.budget(cell).tile, images)
    link_held_out(work.data / data_set.root, data_set.held_out, held_out_folder(work, cell))


def held_out_folder(work: Workplace, cell: Cell) -> Path:
    """Return the segmentation folder that has only the images of the results."""
    return work.folder / "held_out" / cell.data_set.root


def pretraining_settings(work: Workplace, cell: Cell) -> Settings:
    """Return the settings of the pretraining that a cell starts from."""
    assert cell.row.pretraining is not None
    budget = work.budget(cell)
    backbone, own = PRETRAININGS[cell.row.pretraining]
    images = work.images(cell)
    epochs = 1
    if images.exists():
        steps_per_epoch = num_training_images(images) // budget.pretraining_batch
        epochs = max(1, round(work.pretraining_steps(cell) / max(1, steps_per_epoch)))
    every_n_epochs = math.ceil(epochs / NUM_MEASUREMENTS)
    told = [
        *work.scale.backbones[backbone],
        "method=moco_v2_plus",
        "method.projector.hidden_dim=512",
        "method.embedding_dim=128",
        f"method.queue_size={budget.queue_size}",
        "method.queue_start=empty",
        "augmentation=moco_v2",
        f"data={'image_folder' if images.is_dir() else 'npz'}",
        f"data.image_size={budget.image_size}",
        f"data.batch_size={budget.pretraining_batch}",
        f"trainer.max_epochs={epochs}",
        f"evaluation.every_n_epochs={every_n_epochs}",
        "evaluation.plots_every_n_epochs=null",
        "evaluation.diagnostics_every_n_steps=null",
        "evaluation.projector_images=0",
        "monitor.dense.data=segmentation_folder",
        f"monitor.dense.image_size={cell.data_set.monitor_image_size}",
        f"monitor.dense.num_images={MONITORED_IMAGES}",
        "monitor.dense.maps=[2,3]",
        f"monitor.dense.every_n_epochs={every_n_epochs}",
        f"seed={cell.seed}",
    ]
    if cell.data_set.flips:
        told.append("+augmentation.query.vertical_flip.probability=0.5")
    if backbone == "resnet":
        told += [
            "optimizer=sgd",
            "optimizer.lr=0.06",
            "optimizer.lr_for_batch_size=128",
            f"optimizer.warmup_epochs={epochs / 20:g}",
            "method.batch_norm_splits=4",
        ]
    else:
        told += [
            "optimizer=adamw",
            "optimizer.lr=1e-3",
            "optimizer.lr_for_batch_size=null",
            f"optimizer.warmup_epochs={epochs / 20:g}",
            "trainer.gradient_clip_val=5.0",
            f"backbone.window_size={budget.window}",
        ]
    told += own
    places = [
        f"data.root={images}",
        f"monitor.dense.root={work.data / cell.data_set.root}",
        *machine_settings(work),
    ]
    return Settings(told, places)


def machine_settings(work: Workplace) -> list[str]:
    """Return the settings of both programs that do not change the results."""
    return [
        f"trainer.accelerator={work.scale.accelerator}",
        f"data.num_workers={work.scale.num_workers}",
        "logger=[csv]",
    ]


def tuning_settings(work: Workplace, cell: Cell, lr: float) -> Settings:
    """Return the settings with which a cell is fine-tuned."""
    row, budget = cell.row, work.budget(cell)
    steps = work.tuning_steps(cell)
    told = [
        f"data.batch_size={budget.tuning_batch}",
        f"image_size={budget.new_image_size}",
        f"label_fraction={cell.label_fraction:g}",
        f"label_seed={cell.seed}",
        "augmentation.scale=[0.75,1.5]",
        f"optimizer.lr={lr:g}",
        "optimizer.layer_decay=1",
        f"trainer.max_steps={steps}",
        # An epoch of few images has few steps. Every epoch has at least one.
        f"trainer.max_epochs={steps}",
        f"evaluation.every_n_epochs={steps}",
        f"checkpoint_every_n_epochs={steps}",
        *TUNINGS[cell.tuning],
        f"seed={cell.seed}",
    ]
    if row.backbone != "resnet":
        told.append(f"backbone.window_size={budget.new_window}")
    if row.windows == "stretched":
        told.append(f"backbone.pretrained_window_size={budget.new_window}")
    checkpoint = "null"
    if row.pretraining is None:
        told += work.scale.backbones[row.backbone]
    else:
        checkpoint = str(pretraining_checkpoint(work, cell))
        if row.windows == "table":
            checkpoint = str(table_checkpoint(work, cell))
    places = [
        f"checkpoint={checkpoint}",
        "data=segmentation_folder",
        f"data.root={work.data / cell.data_set.root}",
        *machine_settings(work),
    ]
    return Settings(told, places)


def pretraining_checkpoint(work: Workplace, cell: Cell) -> Path:
    """Return the file from which a cell is fine-tuned."""
    return work.pretraining_folder(cell) / LAST_CHECKPOINT


def table_checkpoint(work: Workplace, cell: Cell) -> Path:
    """Return the file of `write_as_table`."""
    return work.pretraining_folder(cell) / "as_table.pth"


def rate_key(cell: Cell) -> str:
    """Return the name under which a learning rate is searched for all cells alike.

    Networks from scratch and pretrained ones may need other learning rates; so may the families.
    """
    start = "scratch" if cell.row.pretraining is None else "pretrained"
    family = "resnet" if cell.row.backbone == "resnet" else "swin"
    return f"{cell.data_set.name}/{cell.tuning}/{family}/{start}"


def learning_rate(work: Workplace, cell: Cell) -> float:
    """Return the learning rate of a cell's fine-tuning."""
    rates = LEARNING_RATES[cell.tuning]
    return work.learning_rates.get(rate_key(cell), rates[len(rates) // 2])


def check(work: Workplace, cell: Cell) -> None:
    """Compose the configs of a cell's runs.

    Raises:
        InputError: a setting is wrong.
        hydra.errors.ConfigCompositionException: a key or a name is unknown.
    """
    if cell.row.pretraining is not None:
        check_settings("train", tuple(pretraining_settings(work, cell).overrides))
    settings = tuning_settings(work, cell, learning_rate(work, cell))
    check_settings("segment", tuple(settings.overrides))


@cache
def check_settings(program: str, overrides: tuple[str, ...]) -> None:
    """Compose the config of a program, once for the cells that share a pretraining."""
    composed(program, SCHEMAS[program], overrides)


def pretrain(work: Workplace, cell: Cell) -> dict[str, Any] | None:
    """Pretrain what a cell starts from, once. Return its part of the results, None from scratch."""
    if cell.row.pretraining is None:
        return None
    settings = pretraining_settings(work, cell)
    run = work.pretraining_folder(cell)
    figures = call(train.run, "train", TrainConfig, run, settings.overrides)
    for name in ("previous.ckpt", "best.ckpt", "backbone.pth"):
        (run / "checkpoints" / name).unlink(missing_ok=True)  # a third of the space is enough
    with (run / METRICS_TABLE).open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    return {
        "name": cell.row.pretraining,
        "settings": settings.told,
        "steps": figures["step"],
        "seconds": figures["seconds"],
        "dense": column(table, "dense/knn_miou"),
        "knn": column(table, "knn/top1"),
        "final_dense": figures.get("dense/knn_miou"),
        "final_knn": figures.get("knn/top1"),
    }


def column(table: list[dict[str, str]], name: str) -> list[tuple[int, float]]:
    """Return the steps at which a column of ``metrics.csv`` has a value, with the values."""
    found = []
    for row in table:
        if row.get(name):
            found.append((int(row["step"]), round(float(row[name]), DIGITS)))
    return found


def write_as_table(work: Workplace, cell: Cell) -> None:
    """Write a pretrained Swin V2 whose position biases are tables, once.

    The tables hold what the position MLPs give for the window of the pretraining. So the network is
    the same, until its window grows: then the tables are resized, as those of Swin V1 are.
    """
    path = table_checkpoint(work, cell)
    if path.exists():
        return
    pretrained = load_pretrained(str(pretraining_checkpoint(work, cell)), "query", {})
    backbone, settings = with_tables(pretrained.encoder.backbone, pretrained.settings)
    content = {
        "state_dict": backbone.state_dict(),
        "backbone": settings,
        "encoder": "query",
        "image_size": pretrained.config["data"]["image_size"],
        "mean": pretrained.config["augmentation"]["mean"],
        "std": pretrained.config["augmentation"]["std"],
        "epoch": pretrained.epoch,
        "step": pretrained.step,
        "config": pretrained.config,
    }
    write_atomically(path, lambda file: torch.save(content, file))


def with_tables(backbone: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a Swin V2 with the same outputs, whose position biases are tables.

    Args:
        backbone: has position MLPs, and the windows of its pretraining.
        settings: the arguments of `build_backbone` that make it.

    Returns:
        The network, and the arguments that make it.
    """
    settings = settings | {"position_bias": "table"}
    settings.pop("pretrained_window_size", None)  # a table has no coordinates to normalise
    network = build_backbone(**settings)
    weights = network.state_dict()
    for name, tensor in backbone.state_dict().items():
        if name in weights:
            weights[name] = tensor
    for name, module in backbone.named_modules():
        if isinstance(module, WindowAttention):
            table = module.bias_table(module.window_size)
            weights[f"{name}.relative_position_bias_table"] = table.detach()
    network.load_state_dict(weights)
    return network, settings


def tune(work: Workplace, cell: Cell, lr: float, folder: Path) -> dict[str, Any]:
    """Fine-tune in `folder`, once. Return the figures of the program."""
    settings = tuning_settings(work, cell, lr)
    return call(segment.run, "segment", SegmentConfig, folder, settings.overrides)


def result_of(work: Workplace, cell: Cell) -> dict[str, Any]:
    """Run a cell to its end. Return its line of the results."""
    prepare(work, cell)
    pretraining = pretrain(work, cell)
    if cell.row.windows == "table":
        write_as_table(work, cell)
    lr = learning_rate(work, cell)
    run = work.tuning_folder(cell)
    checkpoint = run / LAST_CHECKPOINT
    if not checkpoint.exists():
        # A finished run of a cell whose line is not in the results: its weights were removed.
        shutil.rmtree(run, ignore_errors=True)
    figures = tune(work, cell, lr, run)
    device = choose_device(work.scale.accelerator)
    confusions, names = confusions_of_images(checkpoint, held_out_folder(work, cell), device)
    return {
        "data_set": cell.data_set.name,
        "row": cell.row.name,
        "tuning": cell.tuning,
        "label_fraction": cell.label_fraction,
        "seed": cell.seed,
        "scale": work.scale_name,
        **figures_of(confusions, names),
        "validation_miou": figures["segment/miou"],
        "steps": figures["step"],
        "seconds": figures["seconds"],
        "settings": tuning_settings(work, cell, lr).told,
        "pretraining": pretraining,
    }


def remove_checkpoints(work: Workplace, cell: Cell) -> None:
    """Remove the weights of a finished cell. Its figures stay."""
    remove_weights(work.tuning_folder(cell))


def remove_weights(run: Path) -> None:
    """Remove the checkpoints of a run folder, because those of a grid would fill a disk."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


@torch.no_grad()
def confusions_of_images(
    checkpoint: Path, root: Path, device: torch.device
) -> tuple[Tensor, Sequence[str]]:
    """Segment every held-out image as a whole, and count its pixels.

    Args:
        checkpoint: of moco.segment.
        root: a segmentation folder with the held-out images alone.

    Returns:
        Confusion matrices (M, classes, classes) of the images in the order of their names, and the
        names of the classes.
    """
    segmenter = Segmenter.load_from_checkpoint(checkpoint, map_location=device, weights_only=True)
    segmenter.eval()
    learned = segmenter.hparams
    source = build_segmentation_source(
        "segmentation_folder",
        str(root),
        class_names=learned["class_names"],
        ignore_index=learned["ignore_index"],
        is_trained_on=False,
    )
    pixels: dict[str, Any] = dict.fromkeys(PIXEL_SETTINGS)  # images of 8-bit RGB need none
    source.prepare(pixels | {"name": "segmentation_folder", "root": str(root)}, learned["mean"])
    images = source.validation
    normalize = Normalized(learned["mean"], learned["std"])
    num_classes = segmenter.num_classes
    confusions = torch.zeros(len(images), num_classes, num_classes, dtype=torch.int64)
    for batch in whole_image_loader(images, normalize, 1, device=device):
        predicted = predicted_classes(
            segmenter.logits, batch.images.to(device), "whole", learned["image_size"]
        )
        counts = confusion_matrix(
            predicted.cpu(), batch.classes, num_classes, learned["ignore_index"]
        )
        confusions[batch.indices[0]] = counts
    return confusions, learned["class_names"]


def figures_of(confusions: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Return mIoU and Dice of a dataset and of each image.

    A class that is neither in an image nor predicted there does not count for that image.

    Args:
        confusions: (M, classes, classes), see `confusions_of_images`.
        names: of the classes.
    """
    ious, dices = overlaps(confusions.sum(dim=0, keepdim=True))
    image_ious, image_dices = overlaps(confusions)
    iou_of_class = {}
    for name, iou in zip(names, ious[0].tolist(), strict=True):
        iou_of_class[name] = round(iou, DIGITS)
    return {
        "miou": round(float(ious.nanmean()), 6),
        "dice": round(float(dices.nanmean()), 6),
        "iou": iou_of_class,
        "images": {
            "miou": np.round(image_ious.nanmean(dim=1).numpy(), DIGITS).tolist(),
            "dice": np.round(image_dices.nanmean(dim=1).numpy(), DIGITS).tolist(),
        },
    }


def overlaps(confusions: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and Dice (M, classes) of confusion matrices (M, classes, classes).

    Both are NaN for a class that is nowhere.
    """
    confusions = confusions.double()
    right = confusions.diagonal(dim1=1, dim2=2)
    true_and_predicted = confusions.sum(dim=1) + confusions.sum(dim=2)
    return right / (true_and_predicted - right), 2 * right / true_and_predicted
