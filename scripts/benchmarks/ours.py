"""This project's step: the method by itself, and in Lightning's Trainer as `moco.train` runs it."""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.nets import Net, Setting
from benchmarks.recipe import KEY_MOMENTUM
from benchmarks.turns import Turn, wait_for
from moco.cli.build_pretraining import build_method, build_trainer
from moco.config.train import TrainConfig
from moco.data.augment.views import ViewPair, build_evaluation_view
from moco.data.loading.datamodule import Engine, PretrainingData
from moco.data.loading.loaders import PairBatch
from moco.data.sources.registry import ArrayImages, DataSource
from moco.methods.batch_norm import batch_norm_mode
from moco.methods.moco import MoCo
from moco.methods.momentum import update_key_encoder
from moco.runs.interrupts import StopRequest
from moco.training.hardware import keep_freed_memory


def pair_batch(query_view: Tensor, key_view: Tensor) -> PairBatch:
    """A batch as the loaders make it."""
    indices = torch.arange(len(query_view))
    return PairBatch(
        (query_view, key_view), indices, torch.zeros_like(indices, dtype=torch.bool), 0
    )


def step(
    net: Net,
    setting: Setting,
    batch_norm: str = "auto",
    prepare: Callable[[MoCo], None] | None = None,
) -> Callable[[Tensor, Tensor], None]:
    """The method's training step, backward, its optimizer's step and the momentum update, without a Trainer.

    Args:
        batch_norm: ``auto`` is what a training on one device has; ``shuffle`` is what the official class does.
        prepare: called with the method on its device before the first step, for instance to compile it.
    """
    keep_freed_memory()  # as `moco.train` does
    method = setting.placed(build_method(net.plain()))
    if prepare is not None:
        prepare(method)
    method.put_in_force(batch_norm_mode(batch_norm, method.key_encoder, 1, setting.device.type))
    optimizer = method.configure_optimizers()

    def step(query_view: Tensor, key_view: Tensor) -> None:
        with setting.autocast():
            loss = method.training_step(pair_batch(query_view, key_view), 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_key_encoder(method.key_encoder, method.query_encoder, KEY_MOMENTUM)

    return step


WARM_UP = {"cpu": 3, "cuda": 5}
"""Steps that do not count: the first take their memory, and on a GPU nets are compiled and their graphs recorded."""
COOL_DOWN = 1
"""Nor does a training's last, which writes the checkpoint."""


class StepClock(pl.Callback):
    """Notes when steps end; the first `warm_up` do not count, nor what comes after the next `num_steps`."""

    def __init__(self, num_steps: int, warm_up: int) -> None:
        self.num_steps = num_steps
        self.edges = (warm_up - 1, warm_up - 1 + num_steps)
        self.ends: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        if len(self.ends) in self.edges:  # between them nothing waits for a GPU
            wait_for(pl_module.device)
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of one step, from the end of one to the end of the next: callbacks and loading included."""
        first, last = (self.ends[edge] for edge in self.edges)
        return (last - first) / self.num_steps


class Repeated:
    """A loader of the same batch again and again."""

    def __init__(self, batch: PairBatch, times: int) -> None:
        self.batch = batch
        self.times = times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[PairBatch]:
        return itertools.repeat(self.batch, self.times)


class SamePair(PretrainingData):
    """The same two views in every batch, in the device's memory: a training whose data costs nothing."""

    def __init__(self, config: TrainConfig, views: list[Tensor]) -> None:
        pair, size = config.augmentation, int(config.data.image_size or 0)
        self.views = views
        super().__init__(
            DataSource(
                ArrayImages(np.zeros((len(views[0]), size, size, 3), np.uint8), "same"),
                None,
                None,
                size,
            ),
            ViewPair(pair.query, pair.key, pair.mean, pair.std, size, config.seed, "batch"),
            build_evaluation_view(size, config.data.crop_ratio, pair.mean, pair.std),
            image_size=size,
            batch_size=config.data.batch_size,
            engine=Engine("batch", in_memory=True, reason=""),
        )
        self.num_batches = (
            config.trainer.max_steps + 1
        )  # one more than are asked for: no step is at an epoch's end

    def train_dataloader(self) -> Any:
        return Repeated(pair_batch(*self.views), self.num_batches)


def for_steps(num_steps: int, device: torch.device) -> list[str]:
    """Overrides of a run that has so many steps between those that do not count; what is no step is left out."""
    return [
        f"trainer.accelerator={device.type}",
        f"trainer.max_steps={WARM_UP[device.type] + num_steps + COOL_DOWN}",
        "evaluation.plots_every_n_epochs=null",
    ]


def training(config: TrainConfig, data: PretrainingData) -> Turn:
    """A turn is a training of a new model with `moco.train`'s Trainer and all its callbacks; of one step, the seconds."""
    plain = dataclasses.asdict(config)

    def turn() -> dict[str, float]:
        warm_up = WARM_UP[config.trainer.accelerator]
        clock = StepClock(config.trainer.max_steps - warm_up - COOL_DOWN, warm_up)
        with tempfile.TemporaryDirectory() as folder:
            arguments = (config, Path(folder), plain, {}, Console(quiet=True), StopRequest(()))
            trainer = build_trainer(*arguments)
            trainer.callbacks.append(clock)
            trainer.fit(build_method(plain), datamodule=data)
        return {"seconds": clock.seconds, "images": config.data.batch_size}

    return turn
