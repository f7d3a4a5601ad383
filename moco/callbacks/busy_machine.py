"""Say once if other programs take the processors on which a run trains."""

import logging
import multiprocessing
import os
import time
from typing import Any

import pytorch_lightning as pl
import torch

from moco.runs.processors import (
    ProcessorTime,
    allowed_processors,
    busy_line,
    processor_quota,
    processor_time,
)

log = logging.getLogger(__name__)

NOTHING = ProcessorTime(0.0, 0.0)


class BusyMachine(pl.Callback):
    """Compare, in a training on the CPU, how long its threads ran and how long they waited.

    Two threads of one run share each operation, and the slower one decides. On a machine with other
    work one of them is always waiting for a processor, so that one thread alone is faster.

    Args:
        seconds: between two looks. A look reads a small file for each thread.
    """

    def __init__(self, seconds: float = 20.0) -> None:
        self.seconds = seconds
        self.is_said = False
        self.started = 0.0
        self.before: tuple[ProcessorTime, ProcessorTime] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.num_processors = min(allowed_processors(), processor_quota() or float("inf"))
        is_on_cpu = pl_module.device.type == "cpu"
        self.is_said = not is_on_cpu or not trainer.is_global_zero or torch.get_num_threads() < 2
        self._begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seconds = time.monotonic() - self.started
        if self.is_said or seconds < self.seconds:
            return
        before = self.before
        self._begin()
        if before is None or self.before is None:
            return
        own, others = (now.since(then) for now, then in zip(self.before, before, strict=True))
        threads = torch.get_num_threads()
        line = busy_line(own, others, seconds, threads, self.num_processors, os.environ)
        if line is not None:
            log.warning("%s", line)
            self.is_said = True

    def _begin(self) -> None:
        self.started = time.monotonic()
        self.before = None
        own = processor_time()
        if own is not None:
            loaders = [child.pid for child in multiprocessing.active_children() if child.pid]
            self.before = own, processor_time(loaders) or NOTHING
