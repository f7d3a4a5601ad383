"""Measure what the training loop costs, with a method that computes almost nothing.

    python scripts/bench_loop.py [--steps 500] [--repeats 5] [--json FILE] [--profile]

The method has one weight, and the batch is made once. The script runs a bare loop in PyTorch,
Lightning alone, and Lightning with all callbacks and the logger of a pretraining, in turns. It
prints the median milliseconds per step of each, and what each adds to the bare loop. It measures
the processor time of the training thread, which does not depend on other processes of the machine.
``--profile`` shows how the time of the last kind is spent, function by function.
"""

import argparse
import cProfile
import dataclasses
import json
import logging
import pstats
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from rich.console import Console
from torch import Tensor, nn

from moco.cli.build_pretraining import build_data, build_trainer
from moco.cli.training_run import Run
from moco.config.parsing import CONFIG_DIR, parse, register_schemas
from moco.config.train import TrainConfig
from moco.data.loading.loaders import PairBatch
from moco.runs.interrupts import StopRequest

ROWS, WIDTH = 64, 128
KINDS = ("PyTorch", "Lightning", "Lightning with our callbacks")
SETTINGS = (
    "+experiment=quickstart",
    "trainer.max_steps=-1",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "evaluation.diagnostics_every_n_steps=null",
    "evaluation.plots_every_n_epochs=null",
)


class EmptyMethod(pl.LightningModule):
    """A method whose step multiplies two numbers, with all that the callbacks read."""

    queue = None
    symmetric = False

    def __init__(self) -> None:
        super().__init__()
        self.query_encoder = nn.Linear(1, 1, bias=False)
        rows = F.normalize(torch.randn(3, ROWS, WIDTH), dim=-1)
        self.outputs = dict(zip(("query", "key", "negatives"), rows, strict=True))

    def training_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.query_encoder.weight.square().sum(), **self.outputs}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)

    @property
    def num_steps(self) -> int:
        return int(self.trainer.estimated_stepping_batches)

    def loss_of_chance(self, num_negatives: int) -> float:
        return 0.0

    def key_momentum_at(self, step: int) -> float:
        return 0.99


class SameBatch:
    """A loader that repeats one batch `num_steps` times."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        images = torch.zeros(ROWS, 3, 1, 1)
        self.batch = PairBatch(
            (images, images), torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.bool), 0
        )

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[PairBatch]:
        for _ in range(self.num_steps):
            yield self.batch


class StepClock(pl.Callback):
    """Notes the time of the thread when the first and the last step of an epoch start."""

    def on_train_batch_start(self, *args: Any) -> None:
        now = time.thread_time()
        if args[-1] == 0:
            self.first = now
        self.last = now


def bare(num_steps: int) -> float:
    """Return the seconds per step in a bare loop."""
    method = EmptyMethod()
    optimizer = method.configure_optimizers()
    started = time.thread_time()
    for index, batch in enumerate(SameBatch(num_steps)):
        optimizer.zero_grad()
        method.training_step(batch, index)["loss"].backward()
        optimizer.step()
    return (time.thread_time() - started) / num_steps


def lightning_alone(num_steps: int, folder: Path) -> float:
    """Return the seconds per step in Lightning, without logger and callbacks."""
    clock = StepClock()
    alone = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    alone.fit(EmptyMethod(), SameBatch(num_steps))
    return (clock.last - clock.first) / (num_steps - 1)


def as_pretraining(num_steps: int, folder: Path, profile: cProfile.Profile | None = None) -> float:
    """Return the seconds per step with the Trainer of `moco.train`."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = parse(compose("train", list(SETTINGS)), TrainConfig)
    data = build_data(config)
    data.source = dataclasses.replace(data.source, bank=None, queries=None)  # no kNN
    data.train_dataloader = lambda: SameBatch(num_steps)
    clock = StepClock()
    with StopRequest([]) as stop, Console(quiet=True) as console:
        full = build_trainer(Run(config, folder, stop, console=console))
        full.callbacks.insert(0, clock)
        if profile:
            profile.enable()
        full.fit(EmptyMethod(), datamodule=data)
        if profile:
            profile.disable()
    return (clock.last - clock.first) / (num_steps - 1)


def measured(num_steps: int, repeats: int) -> dict[str, float]:
    """Return the median milliseconds per step of each kind."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats + 1):
            once = (
                bare(num_steps),
                lightning_alone(num_steps, Path(folder)),
                as_pretraining(num_steps, Path(folder, str(repeat))),
            )
            if repeat == 0:
                continue  # this one was for imports and caches
            for kind, value in zip(KINDS, once, strict=True):
                seconds[kind].append(value)
    return {kind: 1000 * statistics.median(values) for kind, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    register_schemas()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.profile:
        profile = cProfile.Profile()
        with tempfile.TemporaryDirectory() as folder:
            as_pretraining(arguments.steps, Path(folder), profile)
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        return
    figures = measured(arguments.steps, arguments.repeats)
    for kind, milliseconds in figures.items():
        added = milliseconds - figures[KINDS[0]]
        print(f"{kind:30} {milliseconds:7.3f} ms per step  {added:+7.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
