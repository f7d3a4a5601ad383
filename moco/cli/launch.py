"""How a program starts and ends: Hydra composes the config, an error becomes one line.

`moco.cli.error_lines` lists the exit codes.
"""

import argparse
import itertools
import logging
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from moco.cli.command_line import readable
from moco.cli.completion import answer_shell
from moco.cli.error_lines import CONFIG_ERRORS, report
from moco.cli.help_pages import answer_question
from moco.cli.log_setup import set_up_logging
from moco.cli.preset_choice import (
    PRESET_FILE,
    chosen_keys,
    is_open,
    read_preset,
    with_kind_of_data,
    with_preset,
)
from moco.cli.run_folders import check_folder
from moco.cli.run_names import register_resolvers, renamed_by_preset, takes_name_of_preset
from moco.cli.typed_command import typed_command
from moco.config.parsing import CONFIG_DIR, SCHEMAS, parse, register_schema
from moco.errors import InputError, Interrupted, printable
from moco.runs.interrupts import ENDING, REQUEUEING, listen_early
from moco.runs.processors import allowed_processors, fit_threads, processor_quota
from moco.runs.run_folder import CONFIG, as_override, has_checkpoint
from moco.runs.run_status import write_ending
from moco.runs.slurm import is_first_task, requeue, stop_signals

log = logging.getLogger("moco.cli")

codes: list[int] = []
"""Exit codes of the failed jobs of this process's sweep."""
chosen_files: dict[str, str] = {}
"""What was chosen for the job that runs, for the ``.hydra`` of its folder. See `with_preset`."""


@dataclass
class Failure:
    """What a job of a sweep returns when it has failed."""

    code: int
    line: str


def launch(program: Callable[[Any, Path], None], config_name: str) -> NoReturn:
    """Run ``program(config, run_folder)`` under Hydra's command line and exit with its code.

    In a sweep (``-m``) a job that fails does not end the others. The sweep ends with the code of
    its first failure. With ``HYDRA_FULL_ERROR=1`` an error shows its traceback instead of one line.

    Args:
        program: what to run.
        config_name: of its schema, and of its YAML file in ``conf/``.
    """
    schema = SCHEMAS[config_name]
    is_training = config_name in ("train", "segment")
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Without this Hydra prints its own report of an error and always exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)
    def job(composed: DictConfig) -> Failure | None:
        """Run the program once: the whole run, or one job of a sweep."""
        folder = Path(HydraConfig.get().runtime.output_dir)
        set_up_logging(config_name)
        fit_threads(os.environ, processor_quota(), allowed_processors())
        try:
            config: Any = parse(composed, schema)
            if is_training:
                listen_early(stop_signals(composed.slurm.signal))
            check_folder(config, folder)
            config, folder = begun(config_name, composed, config, folder)
            program(config, folder)
            return None
        except SystemExit:  # submitit took the scheduler's signal and queued the job again
            raise
        except BaseException as error:
            if wants_traceback and not isinstance(error, Interrupted):
                raise
            if isinstance(error, Interrupted) and OmegaConf.select(composed, "slurm.requeue"):
                error = queued_again(error, folder)
            return end_job(error, folder, config_name)

    usual_error = argparse.ArgumentParser.error
    change_hydra()
    try:
        if answer_shell(sys.argv[1:]) or answer_question(config_name, sys.argv[1:]):
            sys.exit()
        sys.argv[1:] = readable(sys.argv[1:], schema)
        if config_name == "train":
            sys.argv[1:] = shown_with_preset(sys.argv[1:])
        register_schema(config_name)
        register_resolvers()
        if is_training:
            listen_early(stop_signals("auto"))
        job()
    except Interrupted as error:  # before the job began, or while a sweep's jobs run elsewhere
        exit_interrupted(error, schema)
    except Exception as error:
        if wants_traceback:
            raise
        if not isinstance(error, (*CONFIG_ERRORS, OSError)):
            # Hydra found a mistake in the command line for which it has no class of errors.
            error = InputError(str(error))
        sys.exit(report(error, schema)[1])
    finally:
        # The caller may be a test, or a program with arguments of its own.
        argparse.ArgumentParser.error = usual_error  # type: ignore[method-assign]
        # Loader processes ignore SIGTERM, and the interpreter would wait for them.
        for child in multiprocessing.active_children():
            child.kill()
    sys.exit(codes[0] if codes else 0)


def begun(config_name: str, composed: DictConfig, config: Any, folder: Path) -> tuple[Any, Path]:
    """Print the first line of a program, and choose what the user leaves to the images.

    Args:
        config_name: of the program.
        composed: the config as Hydra composed it.
        config: the same as an instance of its schema.
        folder: the run folder.

    Returns:
        The config, and the run folder, which may have got another name.
    """
    chosen_files.clear()
    # As typed: a value may be an interpolation of the config.
    given = HydraConfig.get().overrides.task
    overrides: Any = OmegaConf.to_container(given, resolve=False)
    if config_name in ("pack", "stats"):
        say_start(config_name, folder)
        composed = with_kind_of_data(config_name, composed, config, overrides)
        return parse(composed, SCHEMAS[config_name]), folder
    if config_name not in ("train", "preview"):
        say_start(config_name, folder)
        return config, folder
    moves = is_open(config, chosen_keys(overrides)) and takes_name_of_preset(folder)
    if moves:
        say_line(config_name, f"looking for images in {config.data.root}")
    else:
        say_start(config_name, folder)
    composed, files = with_preset(config_name, composed, config, overrides, folder)
    chosen_files.update(files)
    if moves and files:
        folder = renamed_by_preset(folder, read_preset(files[PRESET_FILE]).name)
        say_start(config_name, folder)
    return parse(composed, SCHEMAS[config_name]), folder


def say_start(config_name: str, folder: Path) -> None:
    """Print the line that names the run folder, before imports that take seconds."""
    say_line(config_name, f"run folder {os.path.relpath(folder)}")


def say_line(config_name: str, line: str) -> None:
    """Log a line, once for all processes."""
    if is_first_task() and os.environ.get("RANK", "0") == "0":
        log.info("moco.%s: %s", config_name, printable(line))


def shown_with_preset(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of ``moco.train --cfg`` with the preset that the run would take.

    Args:
        arguments: overrides first, from `moco.cli.command_line.readable`. Without ``--cfg`` they
            are returned as they are.
    """
    overrides = list(itertools.takewhile(lambda argument: argument[:1] != "-", arguments))
    has_root = any(key_of_text(override) == "data.root" for override in overrides)
    if not has_root or not {"--cfg", "-c"} & set(arguments):
        return list(arguments)

    from moco.cli.from_python import composed

    _, _, files = composed(overrides, None)
    if not files:
        return list(arguments)
    return [*yaml.safe_load(files[PRESET_FILE])["overrides"], *arguments]


def key_of_text(override: str) -> str:
    """Return the key of an override as it was typed."""
    return override.partition("=")[0].lstrip("+")


def end_job(error: BaseException, folder: Path, config_name: str) -> Failure:
    """Report the error. Exit, or return the failure if a sweep has to go on."""
    schema = SCHEMAS[config_name]
    if isinstance(error, Interrupted) and not is_first_task():
        # The first task reports for the job. Another exit code than 0 would make srun end the
        # first task, perhaps while it saves.
        sys.exit(0)
    line, code = report(error, schema)
    is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if is_sweep and not (folder / CONFIG).exists():
        write_ending(folder, error)  # for the sweep's table
    elif folder.is_dir() and not any(folder.iterdir()):
        remove_empty(folder)  # Hydra made it for a run that never began
    if isinstance(error, Interrupted) and not is_sweep:
        print_way_on(error, folder, config_name)
    if not is_sweep or isinstance(error, (Interrupted, KeyboardInterrupt)):
        sys.exit(code)
    codes.append(code)
    return Failure(code, line)


def print_way_on(error: Interrupted, folder: Path, config_name: str) -> None:
    """Print the whole command that goes on with a run which the user has interrupted.

    With a forgotten setting it would be another run. A job that is queued again needs no command.
    """
    is_first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    if not is_first or error.signal_number not in ENDING or not has_checkpoint(folder):
        return
    where = as_override("hydra.run.dir", os.path.relpath(folder))
    command = typed_command(config_name, drops={"hydra.run.dir"}, extra=[where])
    print(f"next: {printable(command)}")


def remove_empty(folder: Path) -> None:
    """Remove an empty run folder, and those above it that are empty then, inside ``runs``.

    Other folders above it may be the user's own.
    """
    runs = Path("runs").absolute()
    with suppress(OSError):  # another program may write there now
        folder.rmdir()
        for parent in folder.absolute().parents:
            if runs not in parent.parents:
                return
            parent.rmdir()  # refused if it holds anything


def exit_interrupted(error: Interrupted, schema: type) -> NoReturn:
    """Report a signal that came outside of a job, after queueing the SLURM job again."""
    if not is_first_task():
        sys.exit(0)  # as in `end_job`
    # The config may not be composed yet, so the command line has to tell.
    refusal = re.compile(r"slurm\.(requeue=false|signal=null)")
    if not any(refusal.fullmatch(argument) for argument in sys.argv):
        error = queued_again(error)
    sys.exit(report(error, schema)[1])


def change_hydra() -> None:
    """Change two things of Hydra for which there is no setting.

    Every program starts earlier by 0.3 s of processor time, and ``--hydra-help`` takes 0.8 s
    instead of 2.7 s: Hydra copies the whole store of configs for every config group that it lists,
    and only reads the copies. Here the store is its own copy.

    A wrong option becomes one line: argparse would print several and exit.
    """
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
    argparse.ArgumentParser.error = refuse_option  # type: ignore[assignment, method-assign]


def refuse_option(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    raise InputError(f"{message}; --help lists the options")


def queued_again(interrupted: Interrupted, folder: Path | None = None) -> Interrupted:
    """Queue the SLURM job again if a scheduler's signal interrupted it.

    Args:
        interrupted: how the run ended.
        folder: the run folder, whose status becomes "requeued".

    Returns:
        The interrupt to report: it says whether the job is queued again.
    """
    if interrupted.signal_number not in REQUEUEING:
        return interrupted
    try:
        requeue(interrupted)
    except Interrupted as refused:
        return refused
    message = f"{interrupted}; the job is queued again"
    queued = Interrupted(interrupted.signal_number, message)
    if folder is not None and is_first_task():
        write_ending(folder, queued, state="requeued")
    return queued


def hydra_files() -> dict[str, str]:
    """Return Hydra's config and the overrides, by their file names in ``.hydra``.

    Hydra would write them before the program could look at what the folder already holds. The dict
    is empty if Hydra does not run the program.
    """
    if not HydraConfig.initialized():
        return {}
    running = HydraConfig.get()
    return {
        "hydra.yaml": OmegaConf.to_yaml(OmegaConf.create({"hydra": running})),
        "overrides.yaml": OmegaConf.to_yaml(running.overrides.task),
        **chosen_files,
    }
