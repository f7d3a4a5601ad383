"""Turn an error into the one line and the exit code with which a program ends.

Exit codes: 0 done, 1 the run failed, 2 bad input, 128 + signal after an interrupt.
"""

import difflib
import re
import shlex
import traceback
from dataclasses import dataclass, field

import yaml
from hydra.conf import HydraConf
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

from moco.config.parsing import CONFIG_DIR, unknown_key, wrong_value
from moco.errors import InputError, Interrupted, RunError, exit_code, printable, unknown_name
from moco.extras import install_command
from moco.runs.run_folder import as_override
from moco.screen import show_error

# What composing a config raises when the config is wrong.
CONFIG_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)
LAUNCHERS = "hydra/launcher"
SUBMITIT = "submitit_slurm"
"""The base of conf/hydra/launcher/slurm.yaml, which another package brings."""
HYDRA_GROUPS = (LAUNCHERS, "hydra/sweeper", "hydra/job_logging", "hydra/hydra_logging")


@dataclass
class HydraKeys:
    """The schema of Hydra's own settings."""

    hydra: HydraConf = field(default_factory=HydraConf)


SPACES = "'data.root=/data/my photos'"
"""An override that the shell does not divide."""


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
    if f"Could not load '{LAUNCHERS}/{SUBMITIT}'" in message:
        return f"{LAUNCHERS}=slurm needs another package: {install_command('slurm')}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name}: {unknown_name(group.lstrip('/'), name, error.options)}"
    if isinstance(error, OverrideParseException):
        return explain_override(error.override, message.splitlines()[0])
    several = re.match(r"Ambiguous value for argument '([^=]+)=(.*)'\n", message)
    if several:
        key, value = several.groups()
        as_list = shlex.quote(f"{key}=[{value}]")
        return (
            f"{key}={value}: several values are a sweep, which needs -m; one list is {as_list}; "
            f"one text is {as_override(key, value)}"
        )
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.full_key:
        return explain_key(str(cause.full_key), schema)
    if isinstance(cause, OmegaConfBaseException):
        return wrong_value(str(cause.full_key), str(cause).splitlines()[0], schema)
    if isinstance(error, ConfigCompositionException):
        in_file = re.search(
            r"In '(.+?)': .* raised while composing config:\n(.+)\n +full_key: (\S+)", message
        )
        if in_file:
            file, reason, key = in_file.groups()
            if reason.startswith("Key "):
                return f"in {file}.yaml: {unknown_key(key, schema)}"
            return f"in {file}.yaml: {wrong_value(key, reason, schema)}"
    return " ".join(message.split())


def explain_override(override: str, reason: str) -> str:
    """Return why Hydra cannot read an override, and how to write it.

    Args:
        override: as it was typed.
        reason: what Hydra says.
    """
    start = f"cannot read the override '{override}': "
    key, equals, value = override.partition("=")
    if not equals:
        return f"{start}expected key=value; a value with spaces needs quotes, as in {SPACES}"
    if "/" in key and "." in key:
        group, _, rest = key.partition(".")
        return f"{start}a group has no settings; did you mean {group.replace('/', '.')}.{rest}=..."
    if reason.startswith("LexerNoViableAltException"):
        reason = "a character in it needs quotes"
    return f"{start}{reason}; a text is quoted like this: {as_override(key, value)}"


def explain_key(full_key: str, schema: type) -> str:
    """Return a sentence about a key that neither the schema nor Hydra has, with the nearest key."""
    if "/" in full_key:
        groups = [path.name for path in CONFIG_DIR.iterdir() if path.is_dir()]
        groups.remove("hydra")
        return unknown_name("group", full_key, [*groups, *HYDRA_GROUPS])
    group, _, name = full_key.rpartition(".")
    if group == LAUNCHERS.replace("/", "."):
        settings = yaml.safe_load((CONFIG_DIR / LAUNCHERS / "slurm.yaml").read_text())
        choices = [key for key in settings if key not in ("defaults", "_target_")]
        if name in choices:
            return f"{full_key}: a setting of {LAUNCHERS}=slurm alone; add that"
        return f"{group}: {unknown_name('key', name, choices)}"
    if full_key.split(".")[0] == "hydra":
        return unknown_key(full_key, HydraKeys)
    if difflib.get_close_matches(full_key, ["hydra"]):
        return unknown_name("key", full_key, ["hydra"])
    return unknown_key(full_key, schema)


def innermost(error: BaseException) -> BaseException:
    """Return the first of the errors that were raised while another one was handled."""
    while error.__context__ is not None:
        error = error.__context__
    return error
