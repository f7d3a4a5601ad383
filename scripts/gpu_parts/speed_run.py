"""Measure the first seconds of `+experiment=cifar10_speedrun`: speed, loss and kNN."""

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from benchmarks.turns import wait_for
from hydra import compose, initialize_config_dir
from rich.console import Console
from torch import Tensor

from gpu_parts import shapes
from gpu_parts.measuring import Context, measured
from gpu_parts.results import Result
from gpu_parts.rows import FIRST_STEP, SPEED, knn_after, loss_after
from moco.callbacks.knn_monitor import KNNMonitor
from moco.cli.build_pretraining import build_data, build_method, build_trainer
from moco.cli.training_run import Run
from moco.config.parsing import CONFIG_DIR, parse, register_schemas
from moco.config.train import TrainConfig
from moco.runs.interrupts import StopRequest

NUM_IMAGES, NUM_QUERIES, IMAGE_SIZE = 50_000, 10_000, 32
"""The sizes of CIFAR-10."""
TINY = (
    "backbone=resnet_tiny",
    "data.image_size=16",
    "data.batch_size=16",
    "method.queue_size=64",
    "method.batch_norm_splits=2",
    "trainer.precision=32-true",
    "trainer.compile=false",
    "evaluation.num_neighbors=5",
    "evaluation.batch_size=64",
)
TINY_IMAGES, TINY_QUERIES, TINY_SIZE = 128, 32, 16


class Curve(pl.Callback):
    """Measures loss and kNN at given seconds of the training, and ends it after the last.

    The clock starts with the end of the first step, in which the nets are compiled. It stands still
    while kNN is measured.

    Args:
        monitor: measures kNN; it is not one of the training's callbacks.
        figures: the dict that gets the monitor's figures.
        marks: the seconds of the training at which to measure.
    """

    def __init__(self, monitor: KNNMonitor, figures: dict[str, Any], marks: list[float]) -> None:
        self.monitor = monitor
        self.figures = figures
        self.marks = list(marks)
        self.begun = time.perf_counter()
        self.first_step_seconds = 0.0
        self.measuring_seconds = 0.0
        self.num_steps = 0
        self.losses: list[Tensor] = []
        """Losses since the last mark, on the device. Reading each would be a wait in every step."""
        self.points: list[dict[str, float]] = []

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self.first_step_seconds:
            wait_for(pl_module.device)
            self.started = time.perf_counter()
            self.first_step_seconds = self.started - self.begun
            return
        self.num_steps += 1
        self.losses.append(outputs["loss"].detach().clone())
        if self.seconds >= self.marks[0]:
            self.add_point(trainer, pl_module)

    @property
    def seconds(self) -> float:
        """Return the seconds of training so far."""
        return time.perf_counter() - self.started - self.measuring_seconds

    def add_point(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measure loss and kNN, and stop the training after the last mark."""
        wait_for(pl_module.device)
        seconds = self.seconds
        self.marks = [mark for mark in self.marks if mark > seconds]
        begun = time.perf_counter()
        loss = float(torch.stack(self.losses).mean())
        self.losses = []
        self.monitor.measure(trainer, pl_module, trainer.current_epoch)
        self.points.append({
            "seconds": seconds,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "loss": loss,
            "kNN top-1, %": 100 * self.figures["knn/top1"],
        })  # fmt: skip
        print(self.points[-1], flush=True)
        wait_for(pl_module.device)
        self.measuring_seconds += time.perf_counter() - begun
        if not self.marks:
            trainer.should_stop = True


def measure(case: str, context: Context) -> list[Result]:
    """Train for the seconds of the speed run."""
    archive, images = archive_of(context)
    config = config_of(context, archive)
    run_folder = context.scratch / "run"
    run = Run(config, run_folder, StopRequest(()), console=Console(quiet=True))
    pl.seed_everything(config.seed, verbose=False)
    data, method = build_data(config), build_method(run.plain)
    trainer = build_trainer(run)
    (monitor,) = [callback for callback in trainer.callbacks if isinstance(callback, KNNMonitor)]
    trainer.callbacks.remove(monitor)
    curve = Curve(monitor, run.figures, context.sizes.speed_marks)
    trainer.callbacks.append(curve)
    trainer.fit(method, datamodule=data)
    return results_of(case, curve, context.sizes.speed_marks, config.data.batch_size, images)


def results_of(
    case: str,
    curve: Curve,
    marks: list[float],
    batch_size: int,
    images: str,
) -> list[Result]:
    """Return a result for each figure; marks that one slow step passed at once share a point."""
    speed = curve.num_steps * batch_size / curve.points[-1]["seconds"]
    results = [
        measured(case, FIRST_STEP, "s", curve.first_step_seconds, note=images, curve=curve.points),
        measured(case, SPEED, "images/s", speed, note=images),
    ]
    for mark in marks:
        point = next(point for point in curve.points if point["seconds"] >= mark)
        note = f"epoch {point['epoch']}, step {point['step']}"
        results.append(measured(case, loss_after(mark), "nats", point["loss"], note=note))
        results.append(measured(case, knn_after(mark), "%", point["kNN top-1, %"], note=note))
    return results


def archive_of(context: Context) -> tuple[Path, str]:
    """Return the archive of the training images, and their description."""
    if context.npz is not None:
        return Path(context.npz).resolve(), f"images of {Path(context.npz).name}"
    sizes = (NUM_IMAGES, NUM_QUERIES, IMAGE_SIZE)
    if context.is_rehearsal:
        sizes = (TINY_IMAGES, TINY_QUERIES, TINY_SIZE)
    return shapes.write(context.scratch / "shapes.npz", *sizes), "ten drawn shapes, no CIFAR-10"


def config_of(context: Context, archive: Path) -> TrainConfig:
    """Return the config of the experiment on these images; in a rehearsal, a smaller one."""
    overrides = ["+experiment=cifar10_speedrun", "data=npz", f"data.root={archive}"]
    overrides += [f"trainer.accelerator={context.device.type}"]
    overrides += TINY if context.is_rehearsal else []
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return parse(compose("train", overrides), TrainConfig)
