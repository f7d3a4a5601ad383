"""The user's callbacks, and the loggers: what the config says of them, checked and built.

The checks come before the data are read. They import what the config names.
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.errors import InputError, encodable, unknown_name
from moco.extras import install_command
from moco.targets import call_target, check_options, import_target

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import Logger

log = logging.getLogger(__name__)

LOGGERS = ("csv", "mlflow", "tensorboard", "wandb")
TRACKERS = ("mlflow", "wandb")
"""The loggers with options and a package of their own. The extra to install has the same name."""
CALLBACK_KEYS = ("target", "options")


def check_callbacks(callbacks: Mapping[str, Any]) -> None:
    """Raise InputError if a callback of the config cannot be built.

    Args:
        callbacks: ``{name: {target: package.module:function, options: {name: value}}}``.
    """
    for name, given in callbacks.items():
        if given is None:  # taken away from an experiment
            continue
        key = f"callbacks.{name}"
        if not isinstance(given, Mapping):
            raise InputError(
                f"{key}={given}: expected {{target: package.module:function, options: {{}}}}"
            )
        for part in given:
            if part not in CALLBACK_KEYS:
                raise InputError(f"{key}.{part}: {unknown_name('key', part, CALLBACK_KEYS)}")
        target = given.get("target")
        if target is None:
            raise InputError(f"{key}.target: missing; give {key}.target=package.module:function")
        function = import_target(target, f"{key}.target")
        check_options(function, options_of(given, key), key, target)
        if isinstance(function, type):
            check_callback(function, f"{key}.target={target}")


def check_callback(found: Any, source: str) -> None:
    """Raise InputError if this is neither a callback of Lightning nor a class of them."""
    import pytorch_lightning as pl

    kind = found if isinstance(found, type) else type(found)
    if not issubclass(kind, pl.Callback):
        raise InputError(f"{source}: expected a pytorch_lightning.Callback, got {kind.__name__}")


def options_of(given: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the options of a group of settings.

    Raises:
        InputError: they are no mapping.
    """
    options = given.get("options")
    if not isinstance(options, Mapping | None):
        raise InputError(f"{key}.options={options}: expected {{name: value}}")
    return dict(options or {})


def build_callbacks(
    callbacks: Mapping[str, Any],
    objects: "Sequence[pl.Callback]" = (),
    ours: "Sequence[pl.Callback]" = (),
) -> "list[pl.Callback]":
    """Return the user's callbacks.

    Args:
        callbacks: those of the config, see `check_callbacks`.
        objects: those that were given as objects. They come last.
        ours: those that the run has anyway.

    Raises:
        InputError: a target returns something else; or two callbacks that have a state would have
            the same name in a checkpoint.
    """
    named: dict[str, pl.Callback] = {}
    for callback in ours:
        named[f"moco's own {type(callback).__name__}"] = callback
    for name, given in callbacks.items():
        if given is not None:
            key = f"callbacks.{name}"
            callback = call_target(given["target"], given.get("options"), key)
            check_callback(callback, f"{key}.target={given['target']}")
            named[key] = callback
    for number, callback in enumerate(objects):
        named[f"callbacks[{number}]"] = callback
    check_state_keys(named)
    return list(named.values())[len(ours) :]


def check_state_keys(named: "Mapping[str, pl.Callback]") -> None:
    """Raise InputError if a checkpoint could not tell the states of two callbacks apart.

    Args:
        named: callbacks by what a message calls them.
    """
    import pytorch_lightning as pl

    owners: dict[str, str] = {}
    for name, callback in named.items():
        if type(callback).state_dict is pl.Callback.state_dict:
            continue  # it has no state
        other = owners.setdefault(callback.state_key, name)
        if other != name:
            raise InputError(
                f"{name}: {other} has the state_key '{callback.state_key}', too; a second "
                f"{type(callback).__name__} needs a state_key of its own, see Lightning's Callback"
            )


def logger_names(setting: Any) -> list[str]:
    """Return the loggers of ``logger``: a name, a list of names, or null.

    Raises:
        InputError: there is no such logger.
    """
    names = [setting] if isinstance(setting, str) else setting or []
    if not isinstance(names, list):
        raise InputError(f"logger={setting}: expected a list of {', '.join(LOGGERS)}")
    for name in names:
        if name not in LOGGERS:
            raise InputError(f"logger: {unknown_name('value', str(name), LOGGERS)}")
    return list(dict.fromkeys(names))


def check_loggers(setting: Any, options: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError if a logger's package is missing, or it has no such option.

    Args:
        setting: ``logger``.
        options: ``logger_options``, by logger.
    """
    names = logger_names(setting)
    for name in TRACKERS:
        key = f"logger_options.{name}"
        if name not in names:
            if options[name]:
                raise InputError(f"{key}: without {name} in logger it has no effect")
            continue
        spec = importlib.util.find_spec(name)
        # W&B makes folders of the name wandb. Python takes such a folder for an empty package.
        if spec is None or spec.origin is None:
            raise InputError(f"logger={name} needs {name}: {install_command(name)}")
        check_tracker_options(name, options[name])


def check_tracker_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise InputError if Lightning's class, or W&B itself, has no such option."""
    if not options:
        return
    import inspect

    from pytorch_lightning.loggers import MLFlowLogger, WandbLogger

    if name == "mlflow":
        check_tracker(MLFlowLogger, options, "mlflow")
        return

    import wandb

    # Lightning's class hands on to wandb.init what it does not know.
    known = inspect.signature(WandbLogger).parameters
    others = {key: value for key, value in options.items() if key not in known}
    check_tracker(wandb.init, others, "wandb")


def check_tracker(function: Any, options: Mapping[str, Any], name: str) -> None:
    """Raise InputError for an option that `function` does not have."""
    try:
        check_options(function, options, "", name)
    except InputError as error:
        # There is no level "options" in logger_options.
        message = str(error).replace(".options.", f"logger_options.{name}.", 1)
        raise InputError(message) from error


def build_loggers(
    names: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    folder: Path,
    config: Mapping[str, Any],
    metrics: Sequence[str],
    step: int | None,
) -> "list[Logger]":
    """Return the loggers of a run, which have the config already.

    The table ``metrics.csv`` is always one of them. Rank 0 alone logs. On the other ranks there is
    one logger that does nothing, so that all ranks take the same branches.

    Args:
        names: from `logger_names`.
        options: ``logger_options``, by logger.
        folder: the run folder.
        config: of the run, as plain data.
        metrics: figures that TensorBoard's HPARAMS tab shows.
        step: number of optimizer steps of the checkpoint that the run goes on from; None for a new
            run.

    Raises:
        InputError: W&B or MLflow cannot start.
    """
    from pytorch_lightning.loggers.logger import DummyLogger

    from moco.training.distributed.collectives import rank
    from moco.training.experiment_trackers import start_mlflow, start_wandb
    from moco.training.logger import RunLogger, given_keys
    from moco.training.metrics_file import MetricsFile

    if rank() > 0:
        return [DummyLogger()]
    # A process that died without a checkpoint may have logged beyond the step from which this run
    # goes on.
    loggers: list[Logger] = []
    for name in names:
        if name == "tensorboard":
            if encodable(str(folder)) != str(folder):
                log.warning(
                    "%s: TensorBoard cannot write to a folder whose name is not UTF-8; the "
                    "scalars are in metrics.csv there, and another hydra.run.dir=PATH has both",
                    folder,
                )
                continue
            # TensorBoard hides what was logged at `purge_step` and later.
            board = RunLogger(folder, purge_step=0 if step is None else step + 1)
            board.describe(config, metrics, given_keys(folder), step or 0)
            loggers.append(board)
        elif name in TRACKERS:
            start = start_wandb if name == "wandb" else start_mlflow
            try:
                loggers.append(start(folder, config, options[name]))
            except Exception as error:
                # Whatever a server or an account does not like.
                reason = f"{type(error).__name__}: {error}"
                raise InputError(f"logger={name}: it cannot start: {reason}") from error
    loggers.append(MetricsFile(folder, step))
    return loggers
