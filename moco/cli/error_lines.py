"""Turn an error into the one line and the exit code with which a program ends.

Exit codes: 0 done, 1 the run failed, 2 bad input, 128 + signal after an interrupt.
"""

import re
import traceback

import yaml
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from moco.config.parsing import unknown_key
from moco.errors import InputError, Interrupted, RunError, exit_code, printable, unknown_name
from moco.extras import install_command
from moco.screen import show_error

# What composing a config raises when the config is wrong.
CONFIG_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)


def report(error: BaseException, schema: type) -> tuple[str, int]:
    """Print one line about the error on stderr. Return that line and the exit code."""
    code = exit_code(error)
    if isinstance(error, InputError):
        line = f"error: {error}"
    elif isinstance(error, RunError):
        line = f"failed: {error}"
    elif isinstance(error, Interrupted):
        line = f"interrupted: {error}"
    elif isinstance(error, KeyboardInterrupt):
        line = "interrupted"
    elif isinstance(error, CONFIG_ERRORS):
        line, code = f"error: {explain_config(error, schema)}", 2
    elif isinstance(error, OSError):
        # Hydra could not make the run folder. A running program explains its own OSErrors.
        line, code = f"error: {error}", 2
    else:
        line = f"failed: {type(error).__name__}: {error}"
        # A defect of ours or of a library: developers need to see where.
        traceback.print_exception(error)
    line = printable(" ".join(line.split()))
    show_error(line)
    return line, code


def explain_config(error: Exception, schema: type) -> str:
    """Return what is wrong with a config: the file or the override, the key, the choices."""
    message = str(error)
    cause = error.__cause__
    if isinstance(error, InterpolationResolutionError):
        resolver_error = innermost(error)
        if isinstance(resolver_error, InputError):
            return str(resolver_error)
    if "submitit_slurm" in message:  # the base of conf/hydra/launcher/slurm.yaml is missing
        return f"hydra/launcher=slurm needs another package: {install_command('slurm')}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name}: {unknown_name(group.lstrip('/'), name, error.options)}"
    if isinstance(error, OverrideParseException):
        reason = message.splitlines()[0]
        return f"cannot read the override '{error.override}': {reason}; expected key=value"
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.full_key:
        return unknown_key(str(cause.full_key), schema)
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    if isinstance(error, ConfigCompositionException):
        in_file = re.search(
            r"In '(.+?)': .* raised while composing config:\n(.+)\n +full_key: (\S+)", message
        )
        if in_file:
            file, reason, key = in_file.groups()
            is_unknown = reason.startswith("Key ")
            reason = unknown_key(key, schema) if is_unknown else f"{key}: {reason}"
            return f"in {file}.yaml: {reason}"
    return " ".join(message.split())


def innermost(error: BaseException) -> BaseException:
    """Return the first of the errors that were raised while another one was handled."""
    while error.__context__ is not None:
        error = error.__context__
    return error
