"""The command that was typed, with changes, as a line that can be pasted."""

import shlex
from collections.abc import Collection, Sequence

from hydra.core.hydra_config import HydraConfig

from moco.cli.help_pages import command_name

OF_HYDRA_ITSELF = "hydra.mode"
"""An override that Hydra adds."""


def typed_command(program: str, drops: Collection[str] = (), extra: Sequence[str] = ()) -> str:
    """Return a command with the overrides of this one.

    Args:
        program: the program of the command, such as ``embed``.
        drops: keys and groups that the command does not have, and with a group all of its keys.
        extra: further words, as they are typed in a shell.
    """
    words = [command_name(program)]
    if HydraConfig.initialized():
        typed = HydraConfig.get().overrides
        for override in [*typed.task, *typed.hydra]:
            key = override.partition("=")[0].lstrip("+~")
            is_dropped = key in drops or key.partition(".")[0] in drops
            if key != OF_HYDRA_ITSELF and not is_dropped:
                words.append(shlex.quote(override))
    return " ".join([*words, *extra])
