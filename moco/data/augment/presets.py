"""The pairs of ``conf/augmentation`` by name, for Python; programs read them through Hydra."""

from typing import Any

import yaml

from moco.config_folder import CONFIG_DIR
from moco.errors import InputError, unknown_name

FOLDER = CONFIG_DIR / "augmentation"


def read_preset(name: str) -> dict[str, Any]:
    """Return the settings of a pair: ``query``, ``key``, ``mean`` and ``std``.

    Raises:
        InputError: there is no such pair.
    """
    # `custom` has no operations.
    names = {path.stem for path in FOLDER.glob("*.yaml")} - {"custom"}
    if name not in names:
        raise InputError(unknown_name("augmentation", name, names))
    settings: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    if settings["key"] == "${.query}":
        settings["key"] = settings["query"]
    return settings
