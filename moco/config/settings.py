"""How a setting is declared: a dataclass field with a range or a list of choices."""

from dataclasses import field
from typing import Any

from omegaconf import MISSING


def setting(
    default: Any = MISSING,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Return a dataclass field whose value `moco.config.parsing.parse` checks.

    Args:
        default: the value if nobody gives one; by default the setting has to be given.
        above, at_least: lower limits, the first without the limit itself.
        below, at_most: upper limits, the first without the limit itself.
        choices: the allowed strings.
    """
    limits = {
        "above": above,
        "at_least": at_least,
        "below": below,
        "at_most": at_most,
        "choices": choices,
    }
    given = {name: limit for name, limit in limits.items() if limit is not None}
    return field(default=default, metadata=given)
