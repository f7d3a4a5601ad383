"""Pretrain a backbone: ``python -m moco.train +experiment=NAME [key=value ...]``."""

import dataclasses
import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.config import TrainConfig, check_run
from moco.errors import InputError, Interrupted
from moco.launch import launch, save_config

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from moco.data.datamodule import PretrainingData
    from moco.methods.moco import MoCo
    from moco.models.encoder import Encoder

log = logging.getLogger("moco.train")  # __name__ is __main__ under python -m

# torch and Lightning are imported where they are first needed: a mistake in the config or a path shows in a second.


def run(config: TrainConfig, folder: Path) -> None:
    """Train as configured, in `folder`.

    Raises:
        InputError: something in the config does not fit the data or the folder.
        RunError: training failed.
        Interrupted: a signal ended it, checkpoint saved.
    """
    check_run(config.resume, config.trainer)
    data = build_data(config)

    import pytorch_lightning as pl
    from rich.console import Console

    from moco.evaluation.features import EmbeddingStopped
    from moco.training.interrupts import StopRequest
    from moco.training.run_folder import claimed, find_checkpoint, write_json
    from moco.training.trainer import failures_named

    config.data.image_size = data.image_size
    plain = dataclasses.asdict(config)
    pl.seed_everything(config.seed, verbose=False)
    method = build_method(plain)
    check_splits(method.query_encoder, config)
    checkpoint = find_checkpoint(folder, plain, config.resume)
    if checkpoint:
        check_resumable(checkpoint, plain)
        log.info("going on from %s", checkpoint)

    figures: dict[str, Any] = {}
    console = Console()
    with StopRequest() as stop:
        trainer = build_trainer(config, folder, plain, figures, console, stop)
        with claimed(folder, plain):
            save_config(folder)
            try:
                with failures_named(folder):
                    trainer.fit(
                        method, datamodule=data, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True
                    )
            except EmbeddingStopped as error:
                assert stop.signal_number is not None
                raise Interrupted(stop.signal_number, "before the first training step; nothing to save") from error
            write_json(folder / "metrics.json", figures)
    close(console, folder, figures, data)


def build_data(config: TrainConfig) -> "PretrainingData":
    """The loaders for the config's data set and augmentation pair."""
    from moco.data.datasets import build_source

    data, pair = config.data, config.augmentation
    source = build_source(data.name, data.root, download=data.download, num_images=data.num_images)

    from moco.data.augmentations import ViewPair, build_evaluation_view
    from moco.data.datamodule import PretrainingData

    image_size = data.image_size or source.image_size
    return PretrainingData(
        source,
        ViewPair(pair.query, pair.key, pair.mean, pair.std, image_size, config.seed),
        build_evaluation_view(image_size, data.crop_ratio, pair.mean, pair.std),
        image_size=image_size,
        batch_size=data.batch_size,
        batches_per_step=config.trainer.devices * config.trainer.accumulate_grad_batches,
        evaluation_batch_size=config.evaluation.batch_size,
        num_workers=data.num_workers,
        max_bad_fraction=data.max_bad_fraction,
        seed=config.seed,
    )


def build_method(plain: dict[str, Any]) -> "MoCo":
    """The method of a config as plain data, its learning rates scaled to the batch."""
    from moco.methods.moco import MoCo
    from moco.training.optimizers import scaled_to_batch

    batch_size, given = plain["data"]["batch_size"], plain["optimizer"]
    optimizer = scaled_to_batch(given, batch_size)
    if given["lr_for_batch_size"] is not None:
        log.info(
            "learning rate %.6g for batch %d: optimizer.lr=%.6g is meant for %d; warm-up from %.6g, end at %.6g",
            optimizer["lr"], batch_size, given["lr"], given["lr_for_batch_size"],
            optimizer["warmup_start_lr"], optimizer["final_lr"],
        )  # fmt: skip
    return MoCo(backbone=plain["backbone"], optimizer=optimizer, **plain["method"])


def build_trainer(
    config: TrainConfig, folder: Path, plain: dict[str, Any], figures: dict[str, Any], console: Any, stop: Any
) -> "pl.Trainer":
    """Lightning's Trainer with the callbacks of pretraining; `figures` is what they report into."""
    from moco.evaluation.monitor import KNNMonitor, TrainingMonitor, ViewPairPicture
    from moco.training import trainer
    from moco.training.checkpoints import Checkpoints
    from moco.training.progress import ProgressBar
    from moco.training.run_folder import last_good

    checkpoints = Checkpoints(folder, plain, figures, stop, config.checkpoint.every_n_epochs)
    knn = config.evaluation
    callbacks = [
        TrainingMonitor(figures, config.trainer.log_every_n_steps, partial(last_good, folder)),
        KNNMonitor(
            figures,
            num_neighbors=knn.num_neighbors,
            temperature=knn.temperature,
            feature=knn.feature,
            every_n_epochs=knn.every_n_epochs,
            baselines=knn.baselines,
            should_stop=lambda: bool(stop),
        ),
        ViewPairPicture(),
        ProgressBar(figures, console),
        checkpoints,
    ]
    return trainer.build_trainer(dataclasses.asdict(config.trainer), folder, callbacks)


def check_splits(encoder: "Encoder", config: TrainConfig) -> None:
    """Raises InputError if BatchNorm's groups do not divide the images that a device gets at once."""
    from moco.methods.batch_norm import batch_norm_mode

    devices, splits = config.trainer.devices, config.method.batch_norm_splits
    at_once = config.data.batch_size // (devices * config.trainer.accumulate_grad_batches)
    if batch_norm_mode(config.method.batch_norm, encoder, devices) == "split" and at_once % splits:
        raise InputError(
            f"data.batch_size={config.data.batch_size}: the {at_once} images that a device gets at once are no multiple "
            f"of method.batch_norm_splits={splits}"
        )


def check_resumable(path: Path, plain: dict[str, Any]) -> None:
    """Raises InputError if the checkpoint holds other tensors than the config's run has; it names the keys."""
    from moco.training.checkpoint_files import read_checkpoint
    from moco.training.run_folder import differences

    there, here = (tensor_settings(config) for config in (read_checkpoint(path)["config"], plain))
    if differing := differences(there, here):
        raise InputError(
            f"resume={path}: the checkpoint is of another architecture or optimizer: {'; '.join(differing)}"
        )


def tensor_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide which tensors a run's checkpoint holds, and their shapes."""
    method, optimizer = config["method"], config["optimizer"]
    shapes = ("projector", "predictor", "embedding_dim", "queue_size", "num_queues")
    return {
        "backbone": config["backbone"],
        "method": {key: method.get(key) for key in shapes}
        | {"dense_weight": "above 0" if method.get("dense_weight") else 0},
        "optimizer": {key: optimizer.get(key) for key in ("name", "decay_all")},
    }


def close(console: Any, folder: Path, figures: dict[str, Any], data: "PretrainingData") -> None:
    """The closing table: what was reached, where it is, what to type next."""
    from moco.training.progress import print_table
    from moco.training.run_folder import LAST_CHECKPOINT, as_override

    rows = [("epochs, steps", f"{figures.get('epoch', 0)}, {figures.get('step', 0)}")]
    if "train/loss" in figures:
        rows.append(("loss of the last epoch", f"{figures['train/loss']:.4f}"))
        rows.append(("images per second", f"{figures['images_per_second']:,.0f}"))
    if "knn/top1" in figures:
        rows.append(("kNN protocol", knn_protocol(figures)))
        for key, name in (
            ("knn_raw_pixels/top1", "raw pixels"),
            ("knn_untrained/top1", "untrained backbone"),
            ("knn/top1", "pretrained backbone"),
        ):
            if key in figures:
                rows.append((f"kNN top-1, {name}", f"{figures[key]:.4f}"))
    if data.unreadable:
        rows.append(("unreadable pictures skipped", str(len(data.unreadable))))
    checkpoint = os.path.relpath(folder / LAST_CHECKPOINT)
    rows.append(("checkpoint", checkpoint))
    print_table(console, "Pretraining is done", rows)
    console.print(
        f"next: python -m moco.evaluate {as_override('checkpoint', checkpoint)}", soft_wrap=True, highlight=False
    )


def knn_protocol(figures: dict[str, Any]) -> str:
    """The conditions of a kNN figure in words."""
    return (
        f"k {figures['knn/num_neighbors']}, T {figures['knn/temperature']}, {figures['knn/feature']} feature, "
        f"{figures['knn/num_queries']:,} queries against a bank of {figures['knn/bank_size']:,}"
    )


def main() -> None:
    """Entry point of ``moco-train``."""
    launch(run, TrainConfig, "train")


if __name__ == "__main__":
    main()
