"""How a program starts and how it ends: Hydra composes the config, mistakes become one line and an exit code.

Exit codes: 0 done, 1 the run failed, 2 bad input, 128 + signal after an interrupt.
"""

import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from moco.config import CONFIG_DIR, parse, register_schemas, unknown_key
from moco.errors import InputError, Interrupted, RunError, unknown_name

T = TypeVar("T")
# What composing a config raises when the config is wrong.
KNOWN = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError)


def launch(program: Callable[[T, Path], None], schema: type[T], config_name: str) -> None:
    """Run ``program(config, run_folder)`` under Hydra's command line and exit with its code.

    In a sweep (``-m``) a job that fails does not end the others; the first failure's code is the sweep's.
    With ``HYDRA_FULL_ERROR=1`` an error shows its traceback instead of one line.
    """
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would otherwise print its own report and exit with 1 for everything
    register_schemas()
    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)
    def job(composed: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        set_up_logging()
        try:
            program(parse(composed, schema), folder)
        except BaseException as error:
            if wants_traceback and not isinstance(error, Interrupted):
                raise
            codes.append(report(error, schema))
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()  # made by Hydra for a run that never began
            if isinstance(error, (Interrupted, KeyboardInterrupt)) or HydraConfig.get().mode == RunMode.RUN:
                sys.exit(codes[-1])

    try:
        job()
    except Exception as error:
        if wants_traceback:
            raise
        if not isinstance(error, KNOWN):  # Hydra found something in the command line that it has no name for
            error = InputError(str(error))
        sys.exit(report(error, schema))
    sys.exit(codes[0] if codes else 0)


class StdoutHandler(logging.StreamHandler):
    """Writes to what sys.stdout is at the moment: a live progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def set_up_logging() -> None:
    """The project's log to stdout; of the libraries' only what the user has to know."""
    handler = StdoutHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    # A filter and not levels: Lightning sets its loggers' levels again when it is imported.
    handler.addFilter(lambda record: record.name.startswith("moco") or record.levelno >= logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)  # stderr is for the one line that says why the program ended
    for message in (
        ".*does not have many workers.*",
        ".*number of training batches.*smaller than the logging interval.*",
        ".*srun.*available on your system.*",
        ".*GPU available but not used.*",
        ".*in eval mode at the start of training.*",  # of segment's backbone with freeze_backbone=true, and meant
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)


def save_config(folder: Path) -> None:
    """Write Hydra's own config and the overrides to ``folder/.hydra``, as Hydra does.

    Hydra would write them before the program could look at what the folder already holds. Without Hydra, nothing.
    """
    if not HydraConfig.initialized():
        return
    running = HydraConfig.get()
    target = folder / ".hydra"
    target.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create({"hydra": running}), target / "hydra.yaml")
    OmegaConf.save(running.overrides.task, target / "overrides.yaml")


def report(error: BaseException, schema: type) -> int:
    """Print one line for the error on stderr; the exit code that it stands for."""
    line, code = explain(error, schema)
    if code == 1 and not isinstance(error, RunError):  # a defect, ours or a library's: its place matters
        traceback.print_exception(error)
    print(" ".join(line.split()), file=sys.stderr)
    return code


def explain(error: BaseException, schema: type) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, InputError):
        return f"error: {error}", 2
    if isinstance(error, RunError):
        return f"failed: {error}", 1
    if isinstance(error, Interrupted):
        return f"interrupted: {error}", 128 + error.signal_number
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 128 + signal.SIGINT
    if isinstance(error, (HydraException, OmegaConfBaseException, yaml.YAMLError)):
        return f"error: {explain_config(error, schema)}", 2
    if isinstance(error, OSError):  # while the run folder is made; a running program reports its own
        return f"error: {error}", 2
    return f"failed: {type(error).__name__}: {error}", 1


def explain_config(error: Exception, schema: type) -> str:
    """What is wrong with a config that did not compose: the file or the override, the key, the choices."""
    message, cause = str(error), error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name}: {unknown_name(group.lstrip('/'), name, error.options)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read the override '{error.override}': {message.splitlines()[0]}; expected key=value"
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.full_key:
        return unknown_key(str(cause.full_key), schema)
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    in_file = re.search(r"In '(.+?)': .* raised while composing config:\n(.+)\n +full_key: (\S+)", message)
    if isinstance(error, ConfigCompositionException) and in_file:
        file, reason, key = in_file.groups()
        reason = unknown_key(key, schema) if reason.startswith("Key ") else f"{key}: {reason}"
        return f"in {file}.yaml: {reason}"
    return " ".join(line.strip() for line in message.splitlines())
