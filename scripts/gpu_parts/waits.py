"""Find what makes the host wait for the GPU between logged steps, with all callbacks."""

import contextlib
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

import moco
from gpu_parts import shapes
from gpu_parts.measuring import Context, measured
from gpu_parts.results import Result
from gpu_parts.rows import WAITING, WAITS
from gpu_parts.waiting_operations import WAITING_OPERATIONS
from moco.cli.build_pretraining import build_data, build_method, build_trainer
from moco.cli.training_run import Run
from moco.config.train import TrainConfig
from moco.runs.interrupts import StopRequest

PACKAGE = Path(moco.__file__).resolve().parent
LOGGED = 6
"""Steps from one logged row to the next. The first ones, in which nets are compiled, are not
watched."""
STEPS = 3 * LOGGED
WARNING = "called a synchronizing CUDA operation"
"""What CUDA's sync debug mode says."""
MOST_PLACES = 5
OWN_FRAMES = ("/warnings.py", "/gpu_parts/waits.py")
"""Files whose frames say nothing about a wait."""

UNCOMPILED = ["trainer.compile=false"]
PLAIN, CLIPPED, SYMMETRIC = WAITING
SETTINGS = {
    PLAIN: [],
    CLIPPED: [
        *UNCOMPILED,
        "optimizer=adamw",
        "optimizer.lr_for_batch_size=null",
        "trainer.gradient_clip_val=1.0",
    ],
    SYMMETRIC: [*UNCOMPILED, "method.symmetric=true", "method.dense_weight=0.5"],
}


class Places:
    """Counts, by place in the code, what made the host wait while `is_on`."""

    def __init__(self) -> None:
        self.is_on = False
        self.found: Counter[str] = Counter()

    def note(self) -> None:
        if self.is_on:
            self.found[place()] += 1


def place() -> str:
    """Return the innermost line of this project's package that runs, else the innermost of all."""
    frames = traceback.extract_stack()[:-2]
    for frame in reversed(frames):
        path = Path(frame.filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE.parent)}:{frame.lineno}"
    others = [frame for frame in frames if not frame.filename.endswith(OWN_FRAMES)]
    return "/".join(Path(others[-1].filename).parts[-3:]) + f":{others[-1].lineno}"


class OfCuda:
    """Hands the warnings of CUDA's sync debug mode to `places`."""

    def __init__(self, places: Places) -> None:
        self.places = places

    def switch(self, is_on: bool) -> None:
        self.places.is_on = is_on
        torch.cuda.set_sync_debug_mode("warn" if is_on else "default")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        def show(message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
            if WARNING in str(message):
                self.places.note()
            else:
                print(f"{filename}:{lineno}: {category.__name__}: {message}")

        with warnings.catch_warnings():
            warnings.filterwarnings("always", f".*{WARNING}")
            warnings.showwarning = show
            try:
                yield
            finally:
                self.switch(False)


class OfOperations(TorchDispatchMode):
    """Notes, on a CPU, the operations for which the host would wait on a GPU."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def switch(self, is_on: bool) -> None:
        self.places.is_on = is_on

    def watching(self) -> TorchDispatchMode:
        return self

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function.overloadpacket.__name__ in WAITING_OPERATIONS:
            self.places.note()
        return function(*args, **(kwargs or {}))


class BetweenLoggedSteps(pl.Callback):
    """Watches the steps after the first `LOGGED` that are not logged, and the loading between."""

    def __init__(self, watcher: OfCuda | OfOperations) -> None:
        self.watcher = watcher
        self.num_steps = 0

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        is_watched = batch_idx >= LOGGED and not is_logged(batch_idx)
        self.num_steps += is_watched
        self.watcher.switch(is_watched)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # Callbacks behind this one may still log a step's row.
        is_between = not is_logged(batch_idx) and not is_logged(batch_idx + 1)
        self.watcher.switch(batch_idx >= LOGGED and is_between)


def is_logged(batch_idx: int) -> bool:
    return (batch_idx + 1) % LOGGED == 0


def measure(case: str, context: Context) -> list[Result]:
    """Measure the waits per step, with the places that wait most."""
    places = Places()
    watcher = OfOperations(places) if context.is_rehearsal else OfCuda(places)
    steps = BetweenLoggedSteps(watcher)
    config = config_of(context, SETTINGS[case])
    run_folder = context.scratch / "run"
    run = Run(config, run_folder, StopRequest(()), console=Console(quiet=True))
    pl.seed_everything(config.seed, verbose=False)
    trainer = build_trainer(run)
    trainer.callbacks.append(steps)
    data = build_data(config)
    with watcher.watching():
        trainer.fit(build_method(run.plain), datamodule=data)
    for where, count in places.found.most_common():
        print(f"{count:6} waits at {where}", flush=True)
    note = ", ".join(where for where, _ in places.found.most_common(MOST_PLACES))
    return [measured(case, WAITS, "per step", places.found.total() / steps.num_steps, note=note)]


def config_of(context: Context, settings: list[str]) -> TrainConfig:
    """Return the config of MoCo v2 on the net of the speed run, with the defaults of ``conf/``."""
    (net,) = context.sizes.trainings.values()
    archive = context.scratch / "shapes.npz"
    if not archive.exists():
        shapes.write(archive, (STEPS + 1) * net.batch_size, 0, net.image_size, has_labels=False)
    return net.config(
        "data=npz",
        f"data.root={archive}",
        "data.num_workers=0",
        "augmentation=cifar",
        f"trainer.accelerator={context.device.type}",
        f"trainer.max_steps={STEPS}",
        f"trainer.log_every_n_steps={LOGGED}",
        "evaluation.plots_every_n_epochs=null",
        *settings,
    )
