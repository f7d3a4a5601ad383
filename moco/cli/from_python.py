"""Pretraining from Python, such as from a notebook: what ``python -m moco.train`` does."""

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from moco.cli.command_line import readable_overrides
from moco.cli.error_lines import CONFIG_ERRORS, explain_config
from moco.cli.log_setup import StdoutHandler
from moco.cli.preset_choice import PRESET_FILE, read_preset, with_preset
from moco.cli.run_names import CUSTOM, numbered, register_resolvers
from moco.config.parsing import CONFIG_DIR, parse, register_schema
from moco.config.train import TrainConfig
from moco.errors import InputError
from moco.runs.log_file import LogFile
from moco.screen import screen
from moco.targets import GIVEN

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import Logger
    from torch import nn

    from moco.cli.training_run import Run
    from moco.methods.moco import MoCo


@dataclass
class Pretrained:
    """What a pretraining leaves behind."""

    folder: Path
    """The run folder, with the checkpoints and TensorBoard's files."""
    figures: dict[str, Any]
    """What ``metrics.json`` holds, such as ``knn/top1``."""
    method: "MoCo"
    """The trained method. Its ``query_encoder.backbone`` is what pretraining is for."""


def pretrain(
    overrides: Sequence[str] = (),
    *,
    dataset: Any = None,
    bank: Any = None,
    queries: Any = None,
    backbone: "nn.Module | None" = None,
    callbacks: "Sequence[pl.Callback]" = (),
    logger: "Logger | Sequence[Logger]" = (),
    folder: str | Path | None = None,
) -> Pretrained:
    """Pretrain a backbone as ``python -m moco.train`` does, on one device, in this process.

    Called again with the same arguments and `folder`, it goes on from the last checkpoint there.

    Args:
        overrides: of the config, as on the command line: ``["+experiment=cifar10_moco_v2",
            "trainer.max_epochs=5"]``.
        dataset: the images to train on, a map-style or an iterable dataset of images or of
            (image, label). By default they are those of the config's ``data``. A dataset whose
            class was defined in a notebook needs ``data.num_workers=0``: loader processes cannot
            import it.
        bank, queries: labelled datasets for the kNN monitor; only together with `dataset`. See
            `moco.data.sources.own_dataset.dataset_source`.
        backbone: a module under the contract of `moco.models.contract`, in place of the config's.
        callbacks: of Lightning, besides those of the config.
        logger: one or several of Lightning's, besides those of the config.
        folder: the run folder. By default it is that of ``moco.train``, below ``runs/``.

    Raises:
        InputError: something in the config does not fit, or not to the data or the folder.
        RunError: the training failed.
        Interrupted: Ctrl-C or a signal ended it; the checkpoint is saved.

    Example:
        >>> result = moco.pretrain(["backbone=resnet18_cifar"], dataset=my_dataset)
        >>> result.figures["train/loss"]
        >>> features = result.method.query_encoder.encode(images)
    """
    if isinstance(overrides, str) or not all(isinstance(item, str) for item in overrides):
        raise InputError(f"overrides={overrides!r}: expected a list of texts, such as ['seed=1']")
    if dataset is None and (bank is not None or queries is not None):
        raise InputError("bank, queries: they need dataset=, the images to train on")
    if dataset is not None:
        check_not_chosen(overrides, "data", ("data.name", "data.root"), "dataset=")
    if backbone is not None:
        check_not_chosen(overrides, "backbone", ("backbone.name", "backbone.target"), "backbone=")

    import pytorch_lightning as pl
    from pytorch_lightning.loggers import Logger

    from moco.cli.build_pretraining import build_data
    from moco.cli.checks import check_pretraining
    from moco.cli.pretraining import Given, fill_in_from_data, given_backbone, train
    from moco.cli.training_run import Run
    from moco.data.sources.own_dataset import dataset_source
    from moco.runs.interrupts import StopRequest
    from moco.runs.slurm import stop_signals

    overrides = readable_overrides(overrides, TrainConfig)
    if dataset is not None:
        overrides.append(f"data.name={GIVEN}")
    with logged(f"moco.pretrain({overrides!r})"):
        config, folder, preset = composed(overrides, folder)
        if backbone is not None:
            config.backbone = given_backbone(backbone)
        if config.trainer.devices * config.trainer.num_nodes > 1:
            raise InputError("trainer.devices: moco.pretrain trains on one; moco.train on several")
        loggers = [logger] if isinstance(logger, (Logger, str)) else list(logger)
        check_kind("callbacks", callbacks, pl.Callback)
        check_kind("logger", loggers, Logger)
        # Only the main thread of a process can take signals.
        is_main = threading.current_thread() is threading.main_thread()
        signals = stop_signals(config.slurm.signal) if is_main else ()
        with StopRequest(signals) as stop:
            check_pretraining(config, folder)
            source = None
            if dataset is not None:
                taken = ("num_images", "held_out", "max_image_pixels")
                settings = {key: getattr(config.data, key) for key in taken}
                source = dataset_source(dataset, bank, queries, **settings)
            data = build_data(config, folder, source)
            fill_in_from_data(config, data)
            given = Given(data, backbone, callbacks, loggers)
            run = Run(config, folder, stop)
            if run.is_finished():
                method = finished_method(run, backbone)
            else:
                files = {"overrides.yaml": OmegaConf.to_yaml(OmegaConf.create(overrides)), **preset}
                method = train(config, folder, files, stop, given)
    figures = json.loads((folder / "metrics.json").read_text())
    return Pretrained(folder, figures, method)


def check_not_chosen(
    overrides: Sequence[str], group: str, keys: Sequence[str], argument: str
) -> None:
    """Raise InputError if an override chooses what is also given as an object."""
    for override in overrides:
        if override.partition("=")[0].lstrip("+") in (group, *keys):
            raise InputError(f"{override}: {argument} is given, too; expected one of the two")


def check_kind(argument: str, objects: Sequence[Any], kind: type) -> None:
    """Raise InputError if one of the objects is of another kind."""
    for thing in objects:
        if not isinstance(thing, kind):
            name = f"{kind.__name__.lower()}s"
            raise InputError(f"{argument}: expected {name} of Lightning, got {thing!r}")


def finished_method(run: "Run", backbone: "nn.Module | None") -> "MoCo":
    """Return the method of a run that has reached its end, from its checkpoint."""
    from moco.cli.build_pretraining import build_method
    from moco.runs.checkpoint_files import sound_checkpoint

    content = sound_checkpoint(run.folder)
    if content is None:
        raise InputError(f"{run.folder}: the run is finished, and its checkpoint is gone")
    method = build_method(run.plain, backbone)
    method.load_state_dict(content["state_dict"])
    return method


@contextmanager
def logged(command: str) -> Iterator[None]:
    """Show the log and the progress inside the ``with`` block, and write the log to a file.

    If the caller has set up logging already, the log is shown as they want it.

    Args:
        command: what was called.
    """
    ours = logging.getLogger("moco")
    level = ours.level
    handlers: list[logging.Handler] = [LogFile("train", command)]
    if not ours.hasHandlers():
        shown = StdoutHandler()
        shown.setFormatter(logging.Formatter("%(message)s"))
        handlers.append(shown)
        ours.setLevel(logging.INFO)
    for handler in handlers:
        ours.addHandler(handler)
    screen.turn_on()
    try:
        yield
    finally:
        screen.turn_off()
        for handler in handlers:
            ours.removeHandler(handler)
        ours.setLevel(level)


def free(wanted: Path) -> Path:
    """Return a path where nothing is: `wanted`, or the same name with a number."""
    return next(path for path in numbered(wanted) if not path.exists())


def composed(
    overrides: Sequence[str], folder: str | Path | None
) -> tuple[TrainConfig, Path, dict[str, str]]:
    """Return the config with these overrides, the run folder, and the file that keeps a preset.

    Raises:
        InputError: an override is wrong, or the images of a preset cannot be listed.
    """
    register_schema("train")
    register_resolvers()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            whole = compose("train", list(overrides), return_hydra_config=True)
            is_named = folder is not None
            folder = Path(folder) if folder is not None else free(Path(whole.hydra.run.dir))
        with open_dict(whole):
            del whole["hydra"]
        config = parse(whole, TrainConfig)
        with_its_preset, files = with_preset("train", whole, config, overrides, folder)
        if files and not is_named and folder.parent.name == CUSTOM:
            preset = read_preset(files[PRESET_FILE]).name
            folder = free(folder.parent.parent / preset / folder.name)
        config = parse(with_its_preset, TrainConfig)
    except CONFIG_ERRORS as error:
        raise InputError(explain_config(error, TrainConfig)) from error
    return config, folder, files
