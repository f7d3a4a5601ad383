"""How a program starts and how it ends: Hydra composes the config, mistakes become one line and an exit code.

Exit codes: 0 done, 1 the run failed, 2 bad input, 128 + signal after an interrupt.
"""

import argparse
import dataclasses
import io
import logging
import multiprocessing
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from moco.cli.run_names import register_resolvers
from moco.config.parsing import CONFIG_DIR, parse, register_schemas, unknown_key
from moco.errors import InputError, Interrupted, RunError, printable, unknown_name
from moco.runs.interrupts import REQUEUEING, listen_early
from moco.runs.run_folder import CONFIG
from moco.runs.run_status import write_ending
from moco.runs.slurm import is_first_task, requeue, stop_signals

T = TypeVar("T")
# What composing a config raises when the config is wrong.
KNOWN = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError)


codes: list[int] = []
"""Exit codes of the jobs of this process's sweep that have failed."""


@dataclass
class Failure:
    """What a sweep's job returns when it has failed."""

    code: int
    line: str


def launch(program: Callable[[T, Path], None], schema: type[T], config_name: str) -> None:
    """Run ``program(config, run_folder)`` under Hydra's command line and exit with its code.

    In a sweep (``-m``) a job that fails does not end the others; the first failure's code is the sweep's.
    With ``HYDRA_FULL_ERROR=1`` an error shows its traceback instead of one line.
    """
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # Hydra would otherwise print its own report and exit with 1 for everything
    )
    argparse.ArgumentParser.error = refuse_option  # type: ignore[assignment]  # Hydra's would print its usage as well
    # --help copies all schemas for every group that it lists, most of its time. Hydra hands out copies of them anyhow.
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
    register_schemas()
    register_resolvers()
    is_training = any(item.name == "slurm" for item in dataclasses.fields(schema))  # type: ignore[arg-type]

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)
    def job(composed: DictConfig) -> Failure | None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        set_up_logging()
        try:
            config = parse(composed, schema)
            if is_training:
                listen_early(stop_signals(composed.slurm.signal))
            program(config, folder)
            return None
        except SystemExit:  # submitit has taken the scheduler's signal, and queued the job again
            raise
        except BaseException as error:
            if wants_traceback and not isinstance(error, Interrupted):
                raise
            if isinstance(error, Interrupted) and OmegaConf.select(composed, "slurm.requeue"):
                error = queued_again(error, folder)
            return end(error, folder)

    def end(error: BaseException, folder: Path) -> Failure:
        if isinstance(error, Interrupted) and not is_first_task():
            # Without a word, as the first task tells. With a code srun would end that one, perhaps while it saves.
            sys.exit(0)
        line, code = report(error, schema)
        is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        if is_sweep and not (folder / CONFIG).exists():  # the sweep's table has to know
            write_ending(folder, error)
        elif folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # made by Hydra for a run that never began
        if not is_sweep or isinstance(error, (Interrupted, KeyboardInterrupt)):
            sys.exit(code)
        codes.append(code)
        return Failure(code, line)

    try:
        if is_training:
            listen_early(stop_signals("auto"))
        job()
    except Interrupted as error:  # before the job began, or while a sweep's jobs run elsewhere
        if not is_first_task():
            sys.exit(0)  # as in `end`
        is_refused = any(
            re.fullmatch(r"slurm\.(requeue=false|signal=null)", argument) for argument in sys.argv
        )
        sys.exit(report(error if is_refused else queued_again(error), schema)[1])
    except Exception as error:
        if wants_traceback:
            raise
        if not isinstance(
            error, KNOWN
        ):  # Hydra found something in the command line that it has no name for
            error = InputError(str(error))
        sys.exit(report(error, schema)[1])
    finally:
        for child in multiprocessing.active_children():
            child.kill()  # loaders' workers, which take no SIGTERM: the interpreter would wait for them at its end
    sys.exit(codes[0] if codes else 0)


def queued_again(interrupted: Interrupted, folder: Path | None = None) -> Interrupted:
    """Have the job of an interrupted run queued again, if it was a scheduler's signal; what to say then."""
    if interrupted.signal_number not in REQUEUEING:
        return interrupted
    try:
        requeue(interrupted)
    except Interrupted as refused:
        return refused
    said = Interrupted(interrupted.signal_number, f"{interrupted}; the job is queued again")
    if folder is not None and is_first_task():
        write_ending(folder, said, state="requeued")
    return said


def refuse_option(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Raises InputError for an option that Hydra does not have."""
    raise InputError(f"{message}; --help lists the options")


class StdoutHandler(logging.StreamHandler):
    """Writes to what sys.stdout is at the moment: a live progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def set_up_logging() -> None:
    """The project's log to stdout; of the libraries' only what the user has to know."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # names of files hold what no encoding has
    handler = StdoutHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    )
    # A filter and not levels: Lightning sets its loggers' levels again when it is imported.
    handler.addFilter(
        lambda record: record.name.startswith("moco") or record.levelno >= logging.WARNING
    )
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


def hydra_files() -> dict[str, str]:
    """Hydra's own config and the overrides, for the run folder's ``.hydra``, by file name; nothing without Hydra.

    Hydra would write them before the program could look at what the folder already holds.
    """
    if not HydraConfig.initialized():
        return {}
    running = HydraConfig.get()
    return {
        "hydra.yaml": OmegaConf.to_yaml(OmegaConf.create({"hydra": running})),
        "overrides.yaml": OmegaConf.to_yaml(running.overrides.task),
    }


def save_hydra_files(folder: Path) -> None:
    """Write `hydra_files` into the folder's ``.hydra``."""
    for name, text in hydra_files().items():
        path = folder / ".hydra" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def report(error: BaseException, schema: type) -> tuple[str, int]:
    """Print one line for the error on stderr; that line, and the exit code that it stands for."""
    line, code = explain(error, schema)
    if code == 1 and not isinstance(
        error, RunError
    ):  # a defect, ours or a library's: its place matters
        traceback.print_exception(error)
    line = printable(" ".join(line.split()))
    print(line, file=sys.stderr)
    return line, code


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
    if isinstance(
        error, OSError
    ):  # while the run folder is made; a running program reports its own
        return f"error: {error}", 2
    return f"failed: {type(error).__name__}: {error}", 1


def explain_config(error: Exception, schema: type) -> str:
    """What is wrong with a config that did not compose: the file or the override, the key, the choices."""
    message, cause = str(error), error.__cause__
    if "submitit_slurm" in message:  # the base of conf/hydra/launcher/slurm.yaml
        return "hydra/launcher=slurm needs another package: pip install 'moco-ssl[slurm]'"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name}: {unknown_name(group.lstrip('/'), name, error.options)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read the override '{error.override}': {message.splitlines()[0]}; expected key=value"
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.full_key:
        return unknown_key(str(cause.full_key), schema)
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    in_file = re.search(
        r"In '(.+?)': .* raised while composing config:\n(.+)\n +full_key: (\S+)", message
    )
    if isinstance(error, ConfigCompositionException) and in_file:
        file, reason, key = in_file.groups()
        reason = unknown_key(key, schema) if reason.startswith("Key ") else f"{key}: {reason}"
        return f"in {file}.yaml: {reason}"
    return " ".join(line.strip() for line in message.splitlines())
