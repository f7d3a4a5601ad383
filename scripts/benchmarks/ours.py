"""This project's step, by itself and in Lightning's Trainer as `moco.train` runs it."""

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
from moco.cli.training_run import Run
from moco.config.train import TrainConfig
from moco.data.augment.views import EvaluationView, ViewPair
from moco.data.loading.datamodule import PretrainingData
from moco.data.loading.loaders import PairBatch
from moco.data.sources.source import ArrayImages, DataSource
from moco.methods.batch_norm import batch_norm_mode
from moco.methods.moco import MoCo
from moco.methods.momentum import update_key_encoder
from moco.runs.interrupts import StopRequest
from moco.training.hardware import keep_freed_memory


def pair_batch(query_view: Tensor, key_view: Tensor) -> PairBatch:
    """Return a batch as the loaders make it."""
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
    """Return the step of the method without a Trainer.

    It is the training step, the backward pass, the optimizer's step and the momentum update.

    Args:
        batch_norm: ``auto`` is the default of a training on one device; ``shuffle`` is the way of
            the official class.
        prepare: called with the method on its device before the first step, for instance to compile
            it.
    """
    keep_freed_memory()  # as `moco.train` does
    method = setting.placed(build_method(net.plain()))
    if prepare is not None:
        prepare(method)
    mode = batch_norm_mode(batch_norm, method.key_encoder, 1, setting.device.type)
    method.install_batch_norm(mode)
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
"""First steps that are not counted. They allocate memory, and on a GPU nets are compiled and CUDA
graphs recorded."""
COOL_DOWN = 1
"""Last steps that are not counted. The last step writes the checkpoint."""


class StepClock(pl.Callback):
    """Notes when steps end.

    The first `warm_up` steps are not counted, and neither are those after the next `num_steps`.
    """

    def __init__(self, num_steps: int, warm_up: int) -> None:
        self.num_steps = num_steps
        self.edges = (warm_up - 1, warm_up - 1 + num_steps)
        self.ends: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        if len(self.ends) in self.edges:  # other steps do not wait for the GPU
            wait_for(pl_module.device)
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Return the seconds of one step, with callbacks and loading."""
        first, last = self.edges
        return (self.ends[last] - self.ends[first]) / self.num_steps


class Repeated:
    """A loader that repeats one batch."""

    def __init__(self, batch: PairBatch, times: int) -> None:
        self.batch = batch
        self.times = times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[PairBatch]:
        return itertools.repeat(self.batch, self.times)


class SamePair(PretrainingData):
    """Data that costs nothing.

    Every batch has the same two views, which lie in the memory of the device.
    """

    def __init__(self, config: TrainConfig, views: list[Tensor]) -> None:
        pair, size = config.augmentation, int(config.data.image_size or 0)
        self.views = views
        images = np.zeros((len(views[0]), size, size, 3), np.uint8)
        super().__init__(
            DataSource(ArrayImages(images, "same"), None, None, size),
            ViewPair(pair.query, pair.key, pair.mean, pair.std, size, config.seed, "batch"),
            EvaluationView(size, config.data.crop_ratio, pair.mean, pair.std),
            image_size=size,
            batch_size=config.data.batch_size,
            in_memory=True,
        )
        # One more than needed, so that no step is the last one of an epoch.
        self.num_batches = config.trainer.max_steps + 1

    def train_dataloader(self) -> Any:
        return Repeated(pair_batch(*self.views), self.num_batches)


def for_steps(num_steps: int, device: torch.device) -> list[str]:
    """Return the overrides of a run with `num_steps` counted steps."""
    max_steps = WARM_UP[device.type] + num_steps + COOL_DOWN
    return [
        f"trainer.accelerator={device.type}",
        f"trainer.max_steps={max_steps}",
        "evaluation.plots_every_n_epochs=null",
    ]


def training(config: TrainConfig, data: PretrainingData) -> Turn:
    """Return a turn that trains a new model, with the Trainer and all callbacks of `moco.train`.

    Its seconds are those of one step.
    """
    plain = dataclasses.asdict(config)

    def turn() -> dict[str, float]:
        warm_up = WARM_UP[config.trainer.accelerator]
        clock = StepClock(config.trainer.max_steps - warm_up - COOL_DOWN, warm_up)
        with tempfile.TemporaryDirectory() as folder:
            console = Console(quiet=True)
            trainer = build_trainer(Run(config, Path(folder), StopRequest(()), console=console))
            trainer.callbacks.append(clock)
            trainer.fit(build_method(plain), datamodule=data)
        return {"seconds": clock.seconds, "images": config.data.batch_size}

    return turn
