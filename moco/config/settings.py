"""How a setting is declared: a dataclass field with a range or a list of choices."""

from dataclasses import field
from typing import Any

from omegaconf import MISSING


def setting(default: Any = MISSING, **limits: Any) -> Any:
    """Return a dataclass field whose value `moco.config.parsing.parse` checks.

    Args:
        default: the value if nobody gives one; by default the setting has to be given.
        limits: ``choices``, a tuple of the allowed strings; or for a number any of ``at_least`` and
            ``at_most``, and of ``above`` and ``below``, which exclude the limit itself.
    """
    return field(default=default, metadata=limits)
